"""The one place where the trainer meets inference: requests go in, completions come out.

`Generator` is what the trainer needs; `BatchGenerator` fulfils it with the jitted loop of `m1jax.inference.decode`.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Key

from m1jax.inference import decode, pad_prompts
from m1jax.inference.types import Completion, Finish, Request
from m1jax.model import MiniMaxM1
from m1jax.processes import on_host
from m1jax.train.step import Params


class Generator(Protocol):
    """Continues contexts under the parameters that it was last given."""

    def load(self, params: Params, version: int) -> None:
        """Parameters to go on with; `version` says which they are."""
        ...

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """`samples` completions of each request, in order."""
        ...


class BatchGenerator:
    """All requests of a call in step, in one program; sizes are rounded up, so that few programs are compiled.

    Args:
        graph: of `nnx.split(model)`.
        prompt_tokens: contexts up to this length share one program.
    """

    def __init__(self, graph: nnx.GraphDef[MiniMaxM1], prompt_tokens: int):
        self._graph, self._prompt_tokens = graph, prompt_tokens
        self._params: Params | None = None
        self._version = 0

    def load(self, params: Params, version: int) -> None:
        self._params, self._version = params, version

    def run(self, requests: Sequence[Request]) -> list[list[Completion]]:
        alike = {(r.samples, r.sampling.temperature, r.sampling.top_p, r.sampling.end_ids) for r in requests}
        assert len(alike) == 1, "one call, one kind of request"
        ((samples, temperature, top_p, end_ids),) = alike
        assert top_p == 1, "whose log-probabilities are those of the policy itself"
        longest = max(len(request.tokens) for request in requests)
        time = self._prompt_tokens if longest <= self._prompt_tokens else 1 << (longest - 1).bit_length()
        out = on_host(
            decode(
                self._graph,
                self._params,
                *pad_prompts([request.tokens for request in requests], time),  # pyright: ignore[reportArgumentType]
                _keys_of_samples(jax.numpy.stack([request.key for request in requests]), samples),
                np.array(end_ids, np.int32),
                np.float32(temperature),
                samples_per_prompt=samples,
                max_new_tokens=max(request.sampling.max_new_tokens for request in requests),
            )
        )
        completions = []
        for row, (tokens, logp, length, finished) in enumerate(zip(*out)):
            limit = requests[row // samples].sampling.max_new_tokens
            finish: Finish = "stop" if finished and length <= limit else "length"
            n = min(int(length), limit)
            completions.append(
                Completion(
                    tokens=tokens[:n],
                    logp=logp[:n],
                    nucleus_logp=logp[:n],
                    written=np.ones(n, bool),
                    version=np.full(n, self._version, np.int32),
                    routes=None,
                    finish=finish,
                    sample=row % samples,
                )
            )
        return [completions[i : i + samples] for i in range(0, len(completions), samples)]


@jax.jit(static_argnums=1)
def _keys_of_samples(requests: Key[Array, " requests"], samples: int) -> Key[Array, " rows"]:
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(requests, np.arange(samples)).reshape(-1)
