"""Whether a judge pays for length what the truth does not (MiniMax-M1 report, section 4.2.2).

A policy finds out that longer answers please a generative judge, and grows longer without growing better. What shows it
is the slope of the judge's score against length beside that of rule-based truth, within groups: among answers to one
problem, so that hard problems, which take long answers, do not count as bias.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from m1jax.errors import UserError, require_positive


@dataclasses.dataclass
class Slope:
    """Regression of a value on length within groups, with weights that fade; sums of centred products."""

    freedom: float = 0.0
    """responses less groups"""
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0

    def add(self, lengths: Int[np.ndarray, " G"], values: Float[np.ndarray, " G"]) -> None:
        """A group: responses to one problem, their lengths in tokens and what they got."""
        if len(lengths) < 2:
            return
        x, y = (np.asarray(each, np.float64) - np.mean(each, dtype=np.float64) for each in (lengths, values))
        self.freedom += len(x) - 1
        self.xx += float(x @ x)
        self.xy += float(x @ y)
        self.yy += float(y @ y)

    def fade(self, factor: float) -> None:
        """What was seen so far counts so much less."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) * factor)

    @property
    def value(self) -> float:
        """Per token; 0 where lengths do not differ."""
        return self.xy / self.xx if self.xx > 0 else 0.0

    @property
    def error(self) -> float:
        """Standard error of the value; infinite where there is too little to say."""
        if self.xx <= 0 or self.freedom <= 2:
            return math.inf
        return math.sqrt(max(self.yy - self.xy**2 / self.xx, 0.0) / (self.freedom - 1) / self.xx)

    @property
    def deviation(self) -> float:
        """Standard deviation of lengths within groups, in tokens."""
        return math.sqrt(self.xx / self.freedom) if self.freedom > 0 else 0.0


class Finding(NamedTuple):
    """After a generation batch."""

    judge: float
    """what a thousand tokens more bring in the judge's score"""
    truth: float
    """and in the share of right answers"""
    z: float
    """the difference in its standard errors"""
    alarm: str | None
    """what to do, where the judge pays for length"""


@dataclasses.dataclass(kw_only=True)
class LengthBias:
    """Watches over a training; its fields are all there is to keep for one that goes on.

    Raises:
        UserError: a value is out of range.
    """

    half_life: float = 10.0
    """generation batches after which one counts half"""
    z: float = 4.0
    """standard errors by which the judge's slope must exceed the truth's"""
    gain: float = 0.02
    """and what a standard deviation of length more must bring at least"""
    judge: Slope = dataclasses.field(default_factory=Slope)
    truth: Slope = dataclasses.field(default_factory=Slope)

    def __post_init__(self) -> None:
        require_positive(self, "half_life", "z")
        require_positive(self, "gain", zero=True)
        if self.gain >= 1:
            raise UserError(f"length bias: gain = {self.gain} must be less than the whole of the score, 1")

    def observe(
        self,
        judged: list[tuple[Int[np.ndarray, " G"], Float[np.ndarray, " G"]]],
        verified: list[tuple[Int[np.ndarray, " G"], Float[np.ndarray, " G"]]],
    ) -> Finding:
        """A generation batch.

        Args:
            judged: of each group that the judge scored, lengths in tokens and its scores.
            verified: of each group whose truth rules know (the same groups or others), lengths and 1 or 0.
        """
        for slope, groups in ((self.judge, judged), (self.truth, verified)):
            slope.fade(0.5 ** (1 / self.half_life))
            for lengths, values in groups:
                slope.add(lengths, values)
        # Without any truth, it is taken not to depend on length.
        truth, error = (self.truth.value, self.truth.error) if self.truth.freedom > 2 else (0.0, 0.0)
        excess = self.judge.value - truth
        spread = math.hypot(self.judge.error, error)
        if math.isinf(spread) or excess == 0:
            z = 0.0
        else:
            z = excess / spread if spread > 0 else math.copysign(math.inf, excess)
        alarm = None
        if z > self.z and excess * self.judge.deviation > self.gain:
            alarm = (
                f"the judge pays {1000 * self.judge.value:+.3g} for a thousand tokens, the truth {1000 * truth:+.3g}: "
                "recalibrate the judge before going on; meanwhile shape, clip and normalise its rewards"
            )
        return Finding(1000 * self.judge.value, 1000 * truth, z, alarm)
