"""An episode while it happens."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from m1jax.inference.types import Completion, Finish
from m1jax.rl.environment import Environment
from m1jax.rl.tasks.base import Problem
from m1jax.rl.types import Ended, Episode


class Attempt:
    """What was said so far, and by whom.

    Args:
        environment: made for this attempt, or what became of it instead: an error in words.
        problem: what is attempted.
        messages: what the environment said first.
        prompt: the same as tokens.
        sample: number of the attempt within its group.
        key: of the problem.
    """

    def __init__(
        self,
        environment: Environment | str,
        problem: Problem,
        messages: Sequence[Mapping[str, Any]],
        prompt: list[int],
        sample: int,
        key: Key[Array, ""],
    ):
        self.problem = problem
        self.messages, self.prompt, self.sample, self.key = list(messages), prompt, sample, key
        self.tokens: list[int] = []
        self.turns: list[str] = []
        self.ended: Ended | None = None
        """None: it goes on"""
        self.reward: float | None = None
        self._environment = environment
        self._failure = ""
        self._finish: Finish = "length"
        self._written: list[bool] = []
        self._logp = [np.zeros(0, np.float32)]
        self._version: list[int] = []
        self._routes: np.ndarray | None = None
        if isinstance(environment, str):
            self.fail(environment)

    @property
    def environment(self) -> Environment:
        assert not isinstance(self._environment, str)
        return self._environment

    def context(self) -> np.ndarray:
        """All tokens so far, int32."""
        return np.array([*self.prompt, *self.tokens], np.int32)

    def write(self, completion: Completion, text: str) -> None:
        """A turn of the policy; `text` is without its end token."""
        self.tokens += completion.tokens.tolist()
        self._written += completion.written.tolist()
        self._logp.append(completion.logp)
        self._version += completion.version.tolist()
        self._routes = completion.routes  # those of the context are among them
        self.turns.append(text)
        self.messages.append({"role": "assistant", "content": text})
        self._finish = completion.finish
        if completion.finish != "stop":
            self.ended = "cut"

    def hear(self, messages: Sequence[Mapping[str, Any]], tokens: list[int]) -> None:
        """What the environment answers."""
        self.messages += messages
        self.tokens += tokens
        self._written += [False] * len(tokens)
        self._logp.append(np.zeros(len(tokens), np.float32))
        self._version += [-1] * len(tokens)

    def stop(self, ended: Ended) -> None:
        """Nothing more is said; the policy would have had to, unless the environment is done."""
        self.ended = ended
        if ended != "done":
            self._finish = "length"

    def fail(self, why: str) -> None:
        """The environment broke down."""
        self.stop("failed")
        self._failure = why

    def episode(self) -> Episode:
        """All of it."""
        assert self.ended is not None
        return Episode(
            prompt=np.array(self.prompt, np.int32),
            tokens=np.array(self.tokens, np.int32),
            written=np.array(self._written, bool),
            logp=np.concatenate(self._logp),
            version=np.array(self._version, np.int32),
            turns=tuple(self.turns),
            finish=self._finish,
            routes=self._routes,
            ended=self.ended,
            reward=self.reward,
            failure=self._failure,
        )


@jax.jit
def key_of_turn(problem: Key[Array, ""], sample: np.uint32, turn: np.uint32) -> Key[Array, ""]:
    """What an attempt draws a turn with, where attempts ask for themselves.

    Behind all that a group's common request draws with, which folds in the number of a token.
    """
    return jax.random.fold_in(jax.random.fold_in(problem, sample), np.uint32(2**31) + turn)
