"""The one place where the trainer meets inference: requests go in, completions come out.

`Generator` is what the trainer needs; `BatchGenerator` fulfils it with the jitted loop of `m1jax.inference.decode`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8, UInt32

from m1jax.inference import decode, pad_prompts
from m1jax.model import MiniMaxM1
from m1jax.rl.types import Finish
from m1jax.train.placement import on_host
from m1jax.train.step import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens. From the whole distribution: log-probabilities are then those of the policy itself."""

    temperature: float
    max_new_tokens: int
    end_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A context to be continued."""

    tokens: Int[np.ndarray, " time"]
    key: UInt32[np.ndarray, "2"]
    """data of a random key; sample g draws its token t with fold_in(fold_in(key, g), t)"""
    sampling: Sampling
    samples: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of a request."""

    tokens: Int[np.ndarray, " new"]
    """int32, the end token included"""
    logp: Float[np.ndarray, " new"]
    """float32, under the tempered policy"""
    version: int
    """of the parameters that wrote it"""
    finish: Finish
    routes: UInt8[np.ndarray, "new layers k"] | None = None


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
        first = requests[0]
        samples, temperature, end_ids = first.samples, first.sampling.temperature, first.sampling.end_ids
        alike = {(r.samples, r.sampling.temperature, r.sampling.end_ids) for r in requests}
        assert len(alike) == 1, "one call, one kind of request"
        longest = max(len(request.tokens) for request in requests)
        time = self._prompt_tokens if longest <= self._prompt_tokens else 1 << (longest - 1).bit_length()
        out = on_host(
            decode(
                self._graph,
                self._params,
                *pad_prompts([request.tokens for request in requests], time),  # pyright: ignore[reportArgumentType]
                _keys_of_samples(np.stack([request.key for request in requests]), samples),
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
            completions.append(Completion(tokens=tokens[:n], logp=logp[:n], version=self._version, finish=finish))
        return [completions[i : i + samples] for i in range(0, len(completions), samples)]


@jax.jit(static_argnums=1)
def _keys_of_samples(requests: UInt32[jax.Array, "requests 2"], samples: int) -> jax.Array:
    def one(key: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.wrap_key_data(key), np.arange(samples))

    return jax.vmap(one)(requests).reshape(-1)


@jax.jit
def folded(keys: UInt32[jax.Array, "n 2"], numbers: UInt32[jax.Array, " n"]) -> jax.Array:
    """Data of the keys fold_in(key, number)."""
    return jax.random.key_data(jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(keys), numbers))
