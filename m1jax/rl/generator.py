"""The one place where the trainer meets inference: requests go in, completions come out.

`Generator` is what the trainer needs; `EngineGenerator` fulfils it.
"""

from collections.abc import Sequence
from typing import Protocol

from flax import nnx

from m1jax.inference import Completion, Engine, Finished, Request, Ticket
from m1jax.inference.memory import batch_capacity
from m1jax.inference.runner import ModelRunner
from m1jax.inference.scheduler import Counts
from m1jax.model import MiniMaxM1
from m1jax.train.step import Params


class Generator(Protocol):
    """Continues contexts under the parameters that it was last given."""

    def load(self, params: Params, version: int) -> None:
        """Parameters to go on with; `version` says which they are."""
        ...

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`samples` completions of each request, in order."""
        ...

    @property
    def rows(self) -> int:
        """Completions that can be in work at once."""
        ...

    def submit(self, request: Request) -> Ticket:
        """Takes in a request for one sample, for `step`."""
        ...

    def step(self) -> list[tuple[Ticket, Completion]]:
        """Works a little on what was submitted: the completions that have ended now."""
        ...

    def cancel(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Completion]]:
        """Ends all that is in work where it is; these must be all."""
        ...

    def rest(self) -> None:
        """Give memory back until parameters are loaded again."""
        ...


class EngineGenerator:
    """The engine, in a size for a generation batch. A row that has ended takes the next sequence at once.

    Nothing is kept from one `load` to the next, so that what is generated depends on parameters and requests alone.

    Args:
        graph: of `nnx.split(model)`.
        prompts, samples: requests that come together, and completions of each.
        prompt_tokens, new_tokens: the longest context at first, and what may be written after it in all turns.
        record_routes: whether requests may ask for routes.
        alone: nobody else needs the devices' memory, so that none is given back.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[MiniMaxM1],
        *,
        prompts: int,
        samples: int,
        prompt_tokens: int,
        new_tokens: int,
        record_routes: bool = False,
        alone: bool = False,
    ):
        self._record_routes, self._alone = record_routes, alone
        self._graph, self._prompts, self._samples = graph, prompts, samples
        self._prompt_tokens, self._new_tokens = prompt_tokens, new_tokens
        self._engine: Engine | None = None

    def load(self, params: Params, version: int) -> None:
        if self._engine is not None:
            self._engine.load(params, version)
            return
        model = nnx.merge(self._graph, params)
        capacity = batch_capacity(
            model.config,
            model.dtype,
            prompts=self._prompts,
            samples=self._samples,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
        )
        self._rows = capacity.rows * capacity.parts
        runner = ModelRunner(self._graph, params, capacity, record_routes=self._record_routes)
        self._engine = Engine(runner, version)

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        assert self._engine is not None, "nothing is loaded"
        completions: list[list[Completion]] = [[] for _ in requests]
        for number, completion in self._engine.run(requests):
            completions[number].append(completion)
        return [sorted(found, key=lambda completion: completion.sample) for found in completions]

    @property
    def rows(self) -> int:
        assert self._engine is not None, "nothing is loaded"
        return self._rows

    @property
    def counts(self) -> Counts:
        """What the engine has done so far."""
        assert self._engine is not None, "nothing is loaded"
        return self._engine.counts

    def submit(self, request: Request) -> Ticket:
        assert self._engine is not None, "nothing is loaded"
        return self._engine.submit(request)

    def step(self) -> list[tuple[Ticket, Completion]]:
        assert self._engine is not None, "nothing is loaded"
        return [(event.ticket, event.completion) for event in self._engine.step() if isinstance(event, Finished)]

    def cancel(self, tickets: Sequence[Ticket]) -> list[tuple[Ticket, Completion]]:
        assert self._engine is not None, "nothing is loaded"
        for ticket in tickets:
            self._engine.cancel(ticket)
        return self.step()

    def rest(self) -> None:
        if self._engine is not None and not self._alone:
            self._engine.rest()
