"""Windowed FIFO (arXiv 2605.26494): a generation batch takes the groups that are whole first, within a window.

Problems stand in a queue in their order. So many of them are in work, counted from the first that no batch has had; a
batch takes those whose responses have all ended, so that one long response does not hold it up, and nobody overtakes by
more than the window. A response that has not ended when a batch is full is cut off there and goes on with the next one:
the parameters of then read what is written, and write on; every token carries the version that wrote it. Nothing else
is kept, so that it is of no account where a run was killed.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Generator as Coming
from typing import Any

import numpy as np

from m1jax.inference.types import Completion, Ticket
from m1jax.rl.generator import Generator
from m1jax.rl.rollout import Rollout
from m1jax.rl.stored import from_arrays, to_arrays
from m1jax.rl.tasks import Problem
from m1jax.rl.types import Episode, Group, Scored


class Fifo:
    """The queue of a training.

    Args:
        rollout: where problems come from.
        generator: the policy.
        seed: of problems and sampling.
        window: problems in work.
    """

    def __init__(self, rollout: Rollout, generator: Generator, seed: int, window: int):
        self._rollout, self._generator, self._seed, self._window = rollout, generator, seed, window
        self._next = 0
        """number of the next problem"""
        self._groups: dict[int, Group] = {}
        """those in work, by number of the problem, in the order of the queue"""
        self._whole: list[int] = []
        """of those, the ones that can be taken, in the order in which they became so"""
        self._taken: list[int] = []
        """numbers behind the first in work that were taken"""

    def groups(self, max_tokens: int, skip: Callable[[Problem], bool]) -> Coming[Group, None, None]:
        """Groups as they become whole. Whoever stops and closes the iterator leaves the rest to the next call.

        Args:
            max_tokens: that a response may have.
            skip: says of a problem that it is not to be asked.
        """
        writing: dict[Ticket, tuple[int, int]] = {}
        try:
            self._submit(list(self._groups), max_tokens, writing)
            while True:
                while self._whole:
                    yield self._take()
                self._submit(self._begin(skip), max_tokens, writing)
                self._extend(self._generator.step(), writing)
        finally:
            self._extend(self._generator.cancel(list(writing)), writing)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what JSON can hold, arrays) from which `restore` goes on; between two batches. Whatever the queue does
        until that is written, it stays as it is."""
        rest = {"next": self._next, "whole": self._whole.copy(), "taken": self._taken}
        return rest, to_arrays([_unscored(group) for group in self._groups.values()])

    def restore(self, stored: dict[str, Any], arrays: dict[str, Any]) -> None:
        self._next, self._whole, self._taken = stored["next"], stored["whole"], stored["taken"]
        self._groups = {scored.group.number: scored.group for scored in from_arrays(arrays)}

    def _begin(self, skip: Callable[[Problem], bool]) -> list[int]:
        """Lets as many problems in as the window has room for: their numbers."""
        count = self._window - len(self._groups) - len(self._taken)
        begun = self._rollout.unbegun("train", self._seed, self._next, count, skip) if count > 0 else []
        for group in begun:
            self._groups[group.number] = group
            self._next = group.number + 1
        return [group.number for group in begun]

    def _submit(self, numbers: list[int], max_tokens: int, writing: dict[Ticket, tuple[int, int]]) -> None:
        groups = [self._groups[number] for number in numbers]
        for group, requests in zip(groups, self._rollout.continued("train", self._seed, groups, max_tokens)):
            for sample, request in requests:
                writing[self._generator.submit(request)] = group.number, sample

    def _extend(self, ended: list[tuple[Ticket, Completion]], writing: dict[Ticket, tuple[int, int]]) -> None:
        """What was written becomes part of its episodes."""
        for ticket, completion in ended:
            number, sample = writing.pop(ticket)
            episodes = list(self._groups[number].episodes)
            episodes[sample] = self._rollout.extended(episodes[sample], completion)
            self._groups[number] = dataclasses.replace(self._groups[number], episodes=tuple(episodes))
            if all(not unended(episode) for episode in episodes):
                self._whole.append(number)

    def _take(self) -> Group:
        number = self._whole.pop(0)
        group = self._groups.pop(number)
        head = next(iter(self._groups), self._next)
        self._taken = [taken for taken in [*self._taken, number] if taken > head]
        return group


def unended(episode: Episode) -> bool:
    """Whether it was cut off, and goes on; or has not begun."""
    return episode.finish == "cancelled"


def _unscored(group: Group) -> Scored:
    """Nobody has judged it yet."""
    nothing = np.zeros(len(group.episodes), np.float32)
    return Scored(group=group, raw=nothing, rewards=nothing, parts={}, correct=nothing > 0)
