"""Phases 1 and 2 of a training: problems are asked and judged until a generation batch is full."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Generator as Coming
from collections.abc import Sequence
from typing import Any

import numpy as np

from m1jax.config import ModelConfig
from m1jax.flops import forward_flops
from m1jax.rl.evaluation import examine, summary
from m1jax.rl.fifo import Fifo
from m1jax.rl.generator import Generator
from m1jax.rl.prepare import useful
from m1jax.rl.recipe import RLRecipe
from m1jax.rl.rewards import Judge, score
from m1jax.rl.rollout import Draw, Rollout
from m1jax.rl.stored import from_arrays, to_arrays
from m1jax.rl.tasks import Problem
from m1jax.rl.types import Group, Scored
from m1jax.rl.window import Window, perplexity
from m1jax.train.step import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A generation batch."""

    version: int
    """of the parameters that wrote it"""
    scored: list[Scored]
    """every group of it, those too that teach nothing; those that waited come first"""
    figures: dict[str, float]
    """for the record"""
    work: tuple[int, int] = (0, 0)
    """tokens that were generated for it, and the operations they took"""
    said: tuple[str, ...] = ()
    """for whoever watches"""

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what JSON can hold, arrays) for a checkpoint."""
        rest = {"version": self.version, "figures": self.figures, "work": list(self.work), "said": list(self.said)}
        return rest, to_arrays(self.scored)

    @classmethod
    def from_arrays(cls, stored: dict[str, Any], arrays: dict[str, Any]) -> "Made":
        work, said = tuple(stored["work"]), tuple(stored["said"])
        return cls(**stored | {"scored": from_arrays(arrays), "work": work, "said": said})


class Experience:
    """Makes generation batches, one after the other. What it knows besides parameters is in `state`.

    Args:
        rollout: lets the policy attempt problems.
        generator: the policy.
        judge: what rewards.
        recipe: how much, and when to stop asking.
        seed: of problems and sampling.
        config: the model's.
    """

    def __init__(
        self, rollout: Rollout, generator: Generator, judge: Judge, recipe: RLRecipe, seed: int, config: ModelConfig
    ):
        self._rollout, self._generator, self._judge = rollout, generator, judge
        self._recipe, self._seed, self._config = recipe, seed, config
        window = recipe.generation.fifo_window
        self._fifo = Fifo(rollout, generator, seed, window) if window else None
        self._asked = 0
        """number of the next problem"""
        self._carried: list[Scored] = []
        """useful groups that no batch has had yet"""
        self._retired: set[str] = set()
        """problems that are not asked again"""
        self._window = Window()

    def batch(self, params: Params, version: int) -> Made:
        """Groups until P of them teach something, in rounds of P."""
        recipe = self._recipe.generation
        window = self._window.tokens(self._recipe.window, recipe.max_new_tokens)
        scored, self._carried = self._carried, []
        waited = len(scored)
        tokens = flops = 0
        source = self._rounds if self._fifo is None else self._windowed
        with contextlib.closing(source(params, version, window)) as coming:
            while (
                len(useful(scored, self._recipe)) < recipe.prompts
                and len(scored) - waited < recipe.rounds * recipe.prompts
            ):
                groups = next(coming)
                scored += score(groups, self._judge, self._recipe.reward, max_tokens=window)
                written, took = work(self._config, groups)
                tokens, flops = tokens + written, flops + took
        new = scored[waited:]
        self._retire(new)
        kept = useful(scored, self._recipe)
        if recipe.keep_surplus and len(kept) > recipe.prompts:
            self._carried = kept[recipe.prompts :]
        figures: dict[str, float] = {"asked": len(new), "kept": len(kept), "waited": waited, "window": window}
        if recipe.retire_above is not None:
            figures["retired"] = len(self._retired)
        if new and self._fifo is not None:
            versions = np.concatenate([episode.version for group in new for episode in group.group.episodes])
            figures["older_tokens"] = float(np.mean(versions < version))
        if new:
            figures |= summary(new) | {"perplexity": perplexity(new)}
        said = []
        if self._window.see(new, self._recipe.window):
            now = self._window.tokens(self._recipe.window, recipe.max_new_tokens)
            said.append(f"the window grows from {window} to {now} tokens: perplexity stands still, lengths near it")
        return Made(version=version, scored=scored, figures=figures, work=(tokens, flops), said=tuple(said))

    def heldout(self, params: Params, version: int, rounds: int) -> list[Scored]:
        """So many times P held-out problems, the same each time."""
        prompts, limit = self._recipe.generation.prompts, self._recipe.generation.max_new_tokens
        draw = Draw(self._recipe.evaluation.evaluate_temperature, self._recipe.evaluation.evaluate_top_p)
        self._generator.load(params, version)
        scored = examine(
            self._rollout,
            self._judge,
            self._recipe.reward,
            seed=self._seed,
            starts=range(0, rounds * prompts, prompts),
            draw=draw,
            max_tokens=limit,
        )
        self._generator.rest()
        return scored

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what JSON can hold, arrays) from which `restore` goes on."""
        rest = {"asked": self._asked, "retired": sorted(self._retired), "window": dataclasses.asdict(self._window)}
        arrays = {"carried": to_arrays(self._carried)}
        if self._fifo is not None:
            rest["fifo"], arrays["fifo"] = self._fifo.state()
        return rest, arrays

    def restore(self, stored: dict[str, Any], arrays: dict[str, Any]) -> None:
        self._asked, self._retired = stored["asked"], set(stored["retired"])
        self._window = Window(**stored["window"])
        self._carried = from_arrays(arrays["carried"])
        if self._fifo is not None:
            self._fifo.restore(stored["fifo"], arrays["fifo"])

    def _rounds(self, params: Params, version: int, window: int) -> Coming[list[Group], None, None]:
        """Rounds of P problems."""
        while True:
            self._generator.load(params, version)
            groups = self._rollout("train", self._seed, self._asked, window=window, skip=self._is_retired)
            self._generator.rest()
            self._asked = groups[-1].number + 1
            yield groups

    def _windowed(self, params: Params, version: int, window: int) -> Coming[list[Group], None, None]:
        """One after the other, as they become whole."""
        assert self._fifo is not None
        self._generator.load(params, version)
        try:
            with contextlib.closing(self._fifo.groups(window, self._is_retired)) as whole:
                for group in whole:
                    yield [group]
        finally:
            self._generator.rest()

    def _retire(self, scored: Sequence[Scored]) -> None:
        above = self._recipe.generation.retire_above
        if above is not None:
            self._retired |= {
                _mark(group.group.problem) for group in scored if len(group.correct) and group.correct.mean() > above
            }

    def _is_retired(self, problem: Problem) -> bool:
        return bool(self._retired) and _mark(problem) in self._retired


def work(config: ModelConfig, groups: Sequence[Group]) -> tuple[int, int]:
    """Generated tokens, and the operations they took; the responses to a problem share its prompt."""
    tokens = flops = 0
    for group in groups:
        start = len(group.episodes[0].prompt)
        flops += forward_flops(config, start)
        flops += sum(forward_flops(config, len(episode.tokens), start=start) for episode in group.episodes)
        tokens += sum(episode.length for episode in group.episodes)
    return tokens, flops


def _mark(problem: Problem) -> str:
    """A short name of a problem, the same in every process."""
    return hashlib.blake2b(f"{problem.source}\n{problem.id}\n{problem.prompt}".encode(), digest_size=8).hexdigest()
