"""The families of reasoning-gym (extra `tasks`) as tasks: problems made from seeds and judged by their own scorers."""

import difflib
import functools
import importlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from m1jax.errors import UserError
from m1jax.rl.tasks.base import Problem, Split

_TABLE: Mapping[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
LEVELS: Mapping[str, tuple[int, int]] = {name: (first, last) for name, (first, last) in _TABLE["levels"].items()}
"""family -> the first and last level of its curriculum that problems are drawn from"""
EXCLUDED: Mapping[str, str] = _TABLE["excluded"]
"""family -> why it is not to be had"""
_PLACE = re.compile(r"(\w+)(?:@(\d+)(?:-(\d+))?)?")


class ReasoningGym:
    """One family by its name there, e.g. `chain_sum`; a response is right where the family's score reaches 0.99.

    `chain_sum@2-5` draws from levels 2 to 5 of the family's curriculum, `chain_sum@2` from one; without them, from the
    range in `LEVELS`, or, of a family that has none there, from the family's defaults.

    Args:
        others: names of tasks that are none of its families, for messages.

    Raises:
        UserError: the extra is not installed, there is no family of this name or no such level, or it cannot be
            constructed.
    """

    def __init__(self, place: str, others: Sequence[str] = ()):
        match = _PLACE.fullmatch(place)
        family = match[1] if match else place
        try:
            self._gym = importlib.import_module("reasoning_gym")
        except ImportError as error:
            raise UserError(
                f"task {family!r} is not built in ({', '.join(others)}), and reasoning-gym, which has more, is not "
                "installed: pip install 'm1jax[tasks]' (needs a C compiler)"
            ) from error
        self._factory = factory = importlib.import_module("reasoning_gym.factory")
        if family not in factory.DATASETS:
            near = difflib.get_close_matches(family, factory.DATASETS, n=5, cutoff=0)
            raise UserError(
                f"task {family!r} is neither built in ({', '.join(others)}) nor one of the {len(factory.DATASETS)} "
                f"families of reasoning-gym, of which the nearest are {', '.join(near)}"
            )
        if family in EXCLUDED:
            raise UserError(f"task {family!r} of reasoning-gym is left out: {EXCLUDED[family]}")
        assert match is not None
        self.name, self._family = place, family
        self._levels = LEVELS.get(family)
        if match[2]:
            self._levels = int(match[2]), int(match[3] or match[2])
            self._check()
        self._entry = functools.lru_cache(1024)(self._made)
        self._scorer = functools.cache(functools.partial(self._dataset, 0))
        try:
            if place not in LEVELS:  # those are tested
                self._dataset(0, self._range[-1])
        except Exception as error:  # its generators are many people's work
            raise UserError(f"task {place!r}: reasoning-gym cannot make problems of this family ({error})") from error

    def problem(self, split: Split, seed: int, index: int) -> Problem:
        # Odd seeds are held out: their generators share no problem by construction, only (rarely) by chance.
        number = (2 * (seed * 1_000_003 + index) + (split == "heldout")) % 2**32
        entry = self._entry(number)
        return Problem(entry["question"], str(entry["answer"]), family=self._family, id=str(number))

    def correct(self, problem: Problem, answer: str) -> bool:
        number = int(problem.id)
        scorer = self._scorer(self._level(number))
        try:
            return scorer.score_answer(answer=answer, entry=self._entry(number)) >= 0.99
        except Exception:  # what a scorer cannot even read is not the answer
            return False

    @property
    def _range(self) -> Sequence[int | None]:
        return [None] if self._levels is None else range(self._levels[0], self._levels[1] + 1)

    def _level(self, number: int) -> int | None:
        return self._range[number // 2 % len(self._range)]

    def _made(self, number: int) -> Any:
        return self._dataset(number, self._level(number))[0]

    def _dataset(self, seed: int, level: int | None) -> Any:
        if level is None:
            return self._gym.create_dataset(self._family, size=1, seed=seed)
        curriculum = self._factory.create_curriculum(self._family)
        curriculum.set_global_level(level)
        return self._gym.create_dataset(
            self._family, **vars(curriculum.generate_configuration({"size": 1, "seed": seed}))
        )

    def _check(self) -> None:
        assert self._levels is not None
        first, last = self._levels
        if self._family not in self._factory.CURRICULA:
            raise UserError(f"task {self.name!r}: the family has no levels; write {self._family}")
        attributes = self._factory.create_curriculum(self._family).attributes.values()
        highest = max(len(attribute.levels) for attribute in attributes) - 1
        if not first <= last <= highest:
            raise UserError(f"task {self.name!r}: levels go from 0 to {highest}; write {self._family}@0-{highest}")
