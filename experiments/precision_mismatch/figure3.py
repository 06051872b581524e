"""The engine's probabilities of what it wrote against the trainer's, everything in bfloat16 but what an arm says."""

import dataclasses
import itertools
import sysconfig
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from experiments.precision_mismatch import language
from experiments.precision_mismatch.language import Schedule
from experiments.precision_mismatch.switches import Bits
from m1jax.chat import Tokenizer
from m1jax.config import ModelConfig
from m1jax.inference import Request, Sampling
from m1jax.model import MiniMaxM1
from m1jax.rl.generator import EngineGenerator
from m1jax.rl.tasks import get_task


class Arm(NamedTuple):
    head: Bits
    state: Bits
    replay: bool

    def __str__(self) -> str:
        return f"head {self.head}, states {self.state}, routes {'replayed' if self.replay else 'free'}"


ARMS = tuple(Arm(*arm) for arm in itertools.product(("bfloat16", "float32"), ("bfloat16", "float32"), (False, True)))


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large: by what the platform can do."""

    config: ModelConfig
    steps: int
    rows: int
    length: int
    """of training rows and of samples, in bytes"""
    samples: int


def scale() -> Scale:
    if jax.default_backend() == "cpu":
        return Scale(ModelConfig.preset("m1-demo"), 60, 8, 96, 8)
    shape = ModelConfig.preset("m1-100m")
    return Scale(dataclasses.replace(shape, layer_types=shape.layer_types * 2), 1200, 24, 512, 64)


PROMPT = 32
RATE, WARM = 6e-4, 100
TASK = "sums"
THINKING = 0.2
"""share of the demonstrations that think step by step"""
DEMONSTRATIONS = 0.25
"""of the training rows"""


def corpus() -> Int[np.ndarray, " bytes"]:
    """The source of Python's standard library, some 10 MB."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(f.parts)]
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


class Text:
    """Rows of training: source code, and demonstrations of the task that reinforcement learning is given."""

    def __init__(self, size: Scale, seed: int) -> None:
        self._size, self._seed, self._rng = size, seed, np.random.default_rng(seed)
        self._demonstrations = round(DEMONSTRATIONS * size.rows)
        self._code, self._task, self._words = corpus(), get_task(TASK), Tokenizer.tiny()
        self._number = 0

    def code(self, rows: int, length: int) -> Int[np.ndarray, "rows time"]:
        starts = self._rng.integers(0, len(self._code) - length, rows)
        return np.stack([self._code[s : s + length] for s in starts]).astype(np.int32)

    def batch(self) -> Int[np.ndarray, "rows time+1"]:
        wanted = self._size.length + 1
        rows = self.code(self._size.rows, wanted)
        for row in rows[: self._demonstrations]:
            ids: list[int] = []
            while len(ids) < wanted:
                problem = self._task.problem("train", self._seed + 1_000_000, self._number)
                said = problem.prompt + problem.demonstration(bool(self._rng.random() < THINKING))
                ids += [*self._words.encode(said), self._words.eos_id]
                self._number += 1
            row[:] = ids[:wanted]
        return rows


def trained(size: Scale, text: Text, seed: int) -> tuple[nnx.State, float]:
    """Float32 parameters after language modelling in bfloat16 (CPU: float32), and the last losses, nats a byte."""
    model = MiniMaxM1(size.config, rngs=nnx.Rngs(seed))
    schedule = Schedule(RATE, min(WARM, size.steps // 4), size.steps)
    return language.train(model, schedule, (text.batch() for _ in range(size.steps)))


class Written(NamedTuple):
    """What the sampler wrote after the prompts."""

    tokens: Int[np.ndarray, "rows time"]
    logp: Float[np.ndarray, "rows new"]
    routes: Integer[np.ndarray, "rows time-1 layers k"]


def graph_of(size: Scale) -> nnx.GraphDef[MiniMaxM1]:
    """Of the model that computes in bfloat16 wherever it is."""
    return nnx.graphdef(nnx.eval_shape(lambda: MiniMaxM1(size.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))


def sample(size: Scale, params: nnx.State, prompts: Int[np.ndarray, "rows prompt"], seed: int) -> Written:
    """The engine's, as reinforcement learning runs it; at temperature 1 from the whole distribution."""
    new = size.length - prompts.shape[1]
    generator = EngineGenerator(
        graph_of(size),
        prompts=len(prompts),
        samples=1,
        prompt_tokens=prompts.shape[1],
        new_tokens=new,
        record_routes=True,
    )
    generator.load(params, 0)
    drawn = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=new)
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    found = generator.run([Request(p, key, drawn, record_routes=True, keep=False) for p, key in zip(prompts, keys)])
    completions = [each[0] for each in found]
    routes = [completion.routes for completion in completions]
    return Written(
        np.concatenate([prompts, np.stack([c.tokens for c in completions])], axis=1),
        np.stack([c.logp for c in completions]),
        np.stack([r for r in routes if r is not None]),
    )


def score(size: Scale, params: nnx.State, written: Written, *, replay: bool) -> Float[np.ndarray, "rows new"]:
    """The trainer's log-probabilities of what the sampler wrote, from passes over whole rows."""
    graph, new = graph_of(size), written.logp.shape[1]

    @jax.jit
    def log_probs(params: nnx.State, tokens: Array, routes: Array | None) -> Array:
        model = nnx.merge(graph, params)
        hidden = model.forward(tokens[:, :-1], routes=routes).hidden
        return model.log_probs(hidden, tokens[:, 1:])[0][:, -new:]

    found = []
    for first in range(0, len(written.tokens), size.rows):
        some = slice(first, first + size.rows)
        routes = written.routes[some] if replay else None
        found.append(np.asarray(log_probs(params, written.tokens[some], routes)))
    return np.concatenate(found)


class Gap(NamedTuple):
    correlation: float
    """Pearson's, of the probabilities of the sampled tokens"""
    mean: float
    """|log-probability of the trainer - of the sampler|"""
    largest: float


def compare(sampler: Float[np.ndarray, "..."], trainer: Float[np.ndarray, "..."]) -> Gap:
    gap = np.abs(trainer - sampler)
    correlation = np.corrcoef(np.exp(sampler).ravel(), np.exp(trainer).ravel())[0, 1]
    return Gap(float(correlation), float(gap.mean()), float(gap.max()))
