"""Problems that are solved with tools."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from m1jax import agent
from m1jax.rl.environment import Messages, Step

if TYPE_CHECKING:  # tasks may bring an environment
    from m1jax.rl.tasks.base import Problem


class ToolUse:
    """The policy calls tools, reads their results, and has answered with the first turn that calls nothing.

    Calls are found and made as by `m1jax.Agent`; what goes wrong in one is the model's to read. Where a tool is a
    coroutine function, turns are answered while other attempts go on.

    Args:
        toolbox: of all attempts.
    """

    def __init__(self, toolbox: agent.Toolbox):
        self._toolbox = toolbox
        self._slow = any(inspect.iscoroutinefunction(tool.function) for tool in toolbox.tools)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return [tool.schema for tool in self._toolbox.tools]

    def reset(self, problem: Problem, rng: np.random.Generator) -> Messages:
        return [{"role": "user", "content": problem.prompt}]

    def step(self, text: str) -> Step | Awaitable[Step]:
        return self._later(text) if self._slow else _answer(self._toolbox.step(text))

    async def _later(self, text: str) -> Step:
        return _answer(await self._toolbox.astep(text))


def _answer(step: agent.Step) -> Step:
    return Step([], True) if step.done else Step([step.reply], False)
