"""The programs of a `ModelRunner`: states and pages copied, prompts read, tokens decoded; and decode steps in halves,
between which the host looks up what may follow (`guides`).

Each takes the pool and gives it back renewed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from m1jax.compiling import jit
from m1jax.config import ModelConfig
from m1jax.inference.capacity import Capacity
from m1jax.inference.device import Decoded
from m1jax.inference.rows import Last, Prompts, Rows, pack_decoded
from m1jax.inference.sampling import sample
from m1jax.inference.stopping import Stops, ended
from m1jax.model import Cache, MiniMaxM1, head
from m1jax.sharding import ambient_mesh
from pallas_kernels import target_platform
from pallas_kernels.mailbox import Layout, ask, tell

T = TypeVar("T")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["tree"])
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model taken apart once: to do so for every call takes longer than all else that the host does for one."""

    leaves: list[jax.Array]
    tree: Any

    @classmethod
    def of(cls, model: MiniMaxM1) -> Weights:
        return cls(*jax.tree.flatten(model))

    @property
    def model(self) -> MiniMaxM1:
        return jax.tree.unflatten(self.tree, self.leaves)


def _pool(cache: Cache) -> Cache:
    """The memory without rows: the same tree, where it was, whatever it was used for."""
    cache = cache._replace(lengths=jnp.zeros(0, jnp.int32), slots=None, pages=None)
    if ambient_mesh() is None:
        return cache
    return cache._replace(runs=jax.lax.with_sharding_constraint(cache.runs, cache.specs().runs))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def empty(config: ModelConfig, capacity: Capacity, dtype: jnp.dtype) -> Cache:
    slots, pages = capacity.parts * capacity.slots, capacity.parts * capacity.pages
    return _pool(Cache.pool(config, slots=slots, pages=pages, page_size=capacity.page_size, dtype=dtype))


def _everywhere(out: T) -> T:
    """For every process to read."""
    return out if ambient_mesh() is None else jax.lax.with_sharding_constraint(out, P())


@functools.partial(jax.jit, donate_argnames="cache")
def copy(cache: Cache, copies: Int[Array, "copies 4"]) -> Cache:
    def one(i: jax.Array, cache: Cache) -> Cache:
        slot_from, slot_to, page_from, page_to = copies[i][:, None]
        cache = cache.copy_state(slot_from, jnp.where(slot_from < 0, -1, slot_to))
        cache = cache.clear_state(jnp.where(slot_from < 0, slot_to, -1))
        return _pool(cache.copy_pages(page_from, page_to))

    return jax.lax.fori_loop(0, len(copies), one, cache)


@functools.partial(jit, static_argnames=("time", "record_routes"), donate_argnames="cache")
def prefill(
    weights: Weights,
    cache: Cache,
    packed: Int[Array, "rows width"],
    time: int,
    record_routes: bool,
) -> tuple[Cache, UInt8[Array, "rows time layers k"] | None]:
    prompts = Prompts.of(packed, time)
    view = cache.with_rows(prompts.lengths, prompts.slots, prompts.pages)
    out = weights.model.forward(prompts.tokens, view, lengths=prompts.counts, record_routes=record_routes)
    assert out.cache is not None
    return _pool(out.cache), _everywhere(out.routes)


class Out(NamedTuple):
    """What decode steps wrote."""

    all: Any
    """see `pack_decoded`"""
    routes: Any
    top_tokens: Any
    top_logp: Any


def home(out: Out, wants_top: bool) -> Out:
    """On the host, without the likeliest tokens where nobody asked for them."""
    return jax.device_get(out if wants_top else out._replace(top_tokens=None, top_logp=None))


class Work(NamedTuple):
    """What stays as it is while a call decodes: the rows, packed, and how many may end before it does."""

    packed: Any
    patience: Any


class Written(NamedTuple):
    """Where decode steps are."""

    step: Int[Array, ""]
    tokens: Int[Array, " rows"]
    """to be read next"""
    going: Bool[Array, " rows"]
    """who writes another"""
    out: Decoded[jax.Array]

    @classmethod
    def nothing(cls, rows: Rows[jax.Array], config: ModelConfig, steps: int, record_routes: bool, top: int) -> Written:
        shape = (len(rows.tokens), steps)
        routes = (*shape, config.num_layers, config.experts_per_token)
        out = Decoded(
            counts=jnp.zeros_like(rows.run),
            tokens=jnp.zeros(shape, jnp.int32),
            logp=jnp.zeros(shape, jnp.float32),
            nucleus_logp=jnp.zeros(shape, jnp.float32),
            reasons=jnp.zeros_like(rows.run),
            certain=rows.run,
            routes=jnp.zeros(routes, jnp.uint8) if record_routes else None,
            top_tokens=jnp.zeros((*shape, top), jnp.int32) if top else None,
            top_logp=jnp.zeros((*shape, top), jnp.float32) if top else None,
        )
        return cls(jnp.int32(0), rows.tokens, rows.allowances > 0, out)

    @property
    def next(self) -> Next:
        return Next(self.tokens, self.out.counts, self.going)

    @property
    def told(self) -> Out:
        out = self.out
        return _everywhere(Out(pack_decoded(out), out.routes, out.top_tokens, out.top_logp))


class Read(NamedTuple):
    """What the model said to the rows' last tokens."""

    logits: Float[Array, "rows vocab"]
    routes: UInt8[Array, "rows layers k"] | None


class Next(NamedTuple):
    """What the model reads next."""

    tokens: Int[Array, " rows"]
    written: Int[Array, " rows"]
    """before these, in this call"""
    going: Bool[Array, " rows"]
    """who writes another"""


def read(model: MiniMaxM1, cache: Cache, rows: Rows[jax.Array], next: Next, record_routes: bool) -> tuple[Cache, Read]:
    """One half of a decode step: the model reads the rows' last tokens."""
    slots = jnp.where(next.going, rows.slots, -1)
    view = cache.with_rows(rows.lengths + next.written, slots, rows.pages)
    seen = model.forward(next.tokens[:, None], view, record_routes=record_routes)
    assert seen.cache is not None
    logits = head.logits(seen.hidden[:, 0], model.lm_head[...])
    return _pool(seen.cache), Read(logits, None if seen.routes is None else seen.routes[:, 0])


def draw(
    rows: Rows[jax.Array],
    written: Written,
    read: Read,
    allowed: UInt32[Array, "rows words"] | None,
    patience: Int[Array, ""] | None,
    wants_top: Bool[Array, ""] | bool,
    top: int,
    cuts: bool | None = None,
) -> Written:
    """The other half: the next tokens, and who goes on. Without patience, nobody stops for others."""
    fold_in = jax.vmap(jax.random.fold_in)
    keys = fold_in(jax.random.wrap_key_data(rows.keys), rows.samples)
    stops = Stops(rows.end_ids, rows.certain, rows.patience, rows.run)
    step, out, going = written.step, written.out, written.going
    drawn = sample(
        read.logits,
        fold_in(keys, rows.numbers + out.counts),
        temperature=rows.temperature,
        top_p=rows.top_p,
        allowed=allowed,
        top=top,
        wants_top=wants_top,
        cuts=cuts,
    )

    # Where nothing was allowed, the model's own log-probability says nothing of it.
    drawn = drawn._replace(logp=jnp.where(jnp.isnan(drawn.nucleus_logp), jnp.nan, drawn.logp))

    def put(all: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
        return None if all is None or new is None else all.at[:, step].set(new)

    after, reasons = ended(stops._replace(run=out.certain), drawn.tokens, drawn.logp, going)
    out = Decoded(
        counts=out.counts + going,
        tokens=out.tokens.at[:, step].set(drawn.tokens),
        logp=out.logp.at[:, step].set(drawn.logp),
        nucleus_logp=out.nucleus_logp.at[:, step].set(drawn.nucleus_logp),
        reasons=jnp.where(going, reasons, out.reasons),
        certain=after.run,
        routes=put(out.routes, read.routes),
        top_tokens=put(out.top_tokens, drawn.top_tokens),
        top_logp=put(out.top_logp, drawn.top_logp),
    )
    alive = (out.counts < rows.allowances) & (out.reasons == 0)
    if patience is not None:
        alive &= jnp.sum(~alive & (rows.allowances > 0)) < patience
    return Written(step + 1, drawn.tokens, alive, out)


@functools.partial(jit, static_argnames=("capacity", "record_routes", "top"), donate_argnames="cache")
def decode(
    weights: Weights,
    cache: Cache,
    packed: Int[Array, "rows width"],
    last: Last[jax.Array] | None,
    most: Int[Array, ""],
    patience: Int[Array, ""],
    wants_top: Bool[Array, ""],
    capacity: Capacity,
    record_routes: bool,
    top: int,
) -> tuple[Cache, Last[jax.Array] | None, Out]:
    """Up to `most` tokens for each row, until nobody may write any more, or `patience` rows may not. `last`: what the
    call before left for rows that go on from there."""
    model, rows = weights.model, Rows.of(packed)
    if last is not None:
        rows = rows.going_on(last, most)

    def advance(carry: tuple[Cache, Written]) -> tuple[Cache, Written]:
        cache, written = carry
        cache, seen = read(model, cache, rows, written.next, record_routes)
        return cache, draw(rows, written, seen, None, patience, wants_top, top)

    def unfinished(carry: tuple[Cache, Written]) -> jax.Array:
        _, written = carry
        return (written.step < capacity.steps) & jnp.any(written.going)

    nothing = Written.nothing(rows, model.config, capacity.steps, record_routes, top)
    cache, written = jax.lax.while_loop(unfinished, advance, (cache, nothing))
    return cache, None if last is None else _everywhere(Last.of(written.out, len(last.tokens))), written.told


@functools.partial(jit, static_argnames=("capacity", "record_routes", "steps", "cuts"), donate_argnames="cache")
def decode_on(
    weights: Weights,
    cache: Cache,
    packed: Int[Array, "rows width"],
    last: Last[jax.Array],
    mail: UInt32[Array, "2"] | None,
    capacity: Capacity,
    record_routes: bool,
    steps: int,
    cuts: bool,
) -> tuple[Cache, Last[jax.Array], Out]:
    """`decode` with just so many steps, whoever ends in them: where the host need not look whether there is another, it
    can start what comes next meanwhile. Tells no likeliest tokens; `cuts`: see `sample`.

    With mail, the address of a mailbox for so many rows, the host hears of every token while the model reads it (twice
    the token, and one more if the row has ended with it; -1 of a row that has written none), and says what may follow.
    """
    model, rows = weights.model, Rows.of(packed).going_on(last, jnp.int32(steps))
    layout = Layout(len(packed), -(-model.config.vocab_size // 32))

    def advance(_: jax.Array, carry: tuple[Cache, Written]) -> tuple[Cache, Written]:
        cache, written = carry
        cache, seen = read(model, cache, rows, written.next, record_routes)
        if mail is None:
            return cache, draw(rows, written, seen, None, None, False, 0, cuts)
        number = rows.message[0] + written.step
        allowed, wrote = ask(mail, number, rows.asks != 0, seen.logits, layout), written.going
        written = draw(rows, written, seen, allowed, None, False, 0, cuts)
        word = jnp.where(wrote, 2 * written.tokens + (written.out.reasons != 0), -1)
        return cache, written._replace(tokens=tell(mail, number, word, layout) >> 1)

    nothing = Written.nothing(rows, model.config, capacity.steps, record_routes, 0)
    cache, written = jax.lax.fori_loop(0, steps, advance, (cache, nothing))
    return cache, _everywhere(Last.of(written.out, len(last.tokens))), written.told


@functools.partial(jax.jit, static_argnames=("config", "steps", "record_routes", "top"))
def guided_begin(work: Work, config: ModelConfig, steps: int, record_routes: bool, top: int) -> tuple[Work, Written]:
    """What the halves of guided steps begin with."""
    return work, Written.nothing(Rows.of(work.packed), config, steps, record_routes, top)


@functools.partial(jit, static_argnames="record_routes", donate_argnames="cache")
def guided_read(weights: Weights, cache: Cache, work: Work, next: Next, record_routes: bool) -> tuple[Cache, Read]:
    return read(weights.model, cache, Rows.of(work.packed), next, record_routes)


@functools.partial(jit, static_argnames="top", donate_argnames="written")
def guided_draw(
    work: Work, written: Written, seen: Read, allowed: UInt32[Array, "rows words"], top: int
) -> tuple[Written, Int[Array, " rows"]]:
    """Also what the host hears of it: the tokens of the rows that go on, else -1."""
    # A GPU asks the host before each choice, and stands still meanwhile.
    cuts = True if target_platform() == "gpu" else None
    written = draw(Rows.of(work.packed), written, seen, allowed, work.patience, True, top, cuts)
    return written, _everywhere(jnp.where(written.going, written.tokens, -1))


@jax.jit
def guided_end(written: Written) -> Out:
    return written.told
