"""The loop over a model's layers in training: what a layer keeps for its gradient, and the gradient of its weights, is
written once and stays where it was written.

``jax.lax.scan`` computes the same. But what a scan inside a scan keeps is copied from the inner stack into the outer,
the stacks begin as zeros, and all weights of a layer are cut out of their stacks although a kernel could read them
there: together an eighth of an update of `m1-2b` on a GPU, a quarter of one of `m1-1b` (docs/gpu.md).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from m1jax.sharding import empty
from pallas_kernels import target_platform

WRITTEN_OUT = 4
"""periods up to which a GPU's program has a loop for each run of each; beyond, one loop over all layers, in which the
shorter runs' turn is a condition that the GPU waits for the host to read"""

Tree = Any  # a pytree of arrays
Layer = Callable[[int, Tree, Any, Tree, Any], tuple[tuple[Any, Tree], Tree]]
"""(run, the layer's weights, h, constants, its number in the run) -> ((new h, what has a gradient), the rest)"""
Body = Callable[[int, Any, Any, Tree], tuple[Any, Tree]]
"""(run, the layer's number in it, h, the run's stacks) -> new h and stacks"""


def over_layers(
    layer: Layer, periods: int, counts: Sequence[int], weights: Sequence[Tree], h: Tree, constants: Tree
) -> tuple[Any, list[tuple[Tree, Tree]]]:
    """``periods`` times all runs, each run ``counts[run]`` times ``layer``.

    Args:
        layer: one layer of a run; it closes over no arrays.
        periods, counts: run ``r`` has ``periods * counts[r]`` layers.
        weights: of each run, arrays [layers of the run, ...]. Differentiable, as is
        h: what enters the first layer, a pytree.
        constants: any arrays that layers read; they have no gradient.

    Returns:
        The last layer's h, and of each run what its layers returned beside it, [layers of the run, ...].
    """
    loop = _Loop(layer, periods, tuple(counts))
    return _over_layers(loop, list(weights), h, constants)


class _Loop(NamedTuple):
    layer: Layer
    periods: int
    counts: tuple[int, ...]

    def forward(self, body: Body, h: Any, stacks: list[Tree]) -> tuple[Any, list[Tree]]:
        """``h, stacks[run] = body(run, number, h, stacks[run])`` for every layer, from the first to the last."""
        return self._walk(body, h, stacks, range(len(self.counts)), lambda run, i: i)

    def backward(self, body: Body, h: Any, stacks: list[Tree]) -> tuple[Any, list[Tree]]:
        """The same from the last to the first."""
        last = [self.periods * count - 1 for count in self.counts]
        return self._walk(body, h, stacks, range(len(self.counts))[::-1], lambda run, i: last[run] - i)

    def _walk(
        self, body: Body, h: Any, stacks: list[Tree], runs: Sequence[int], number: Callable[[int, Any], Any]
    ) -> tuple[Any, list[Tree]]:
        """The i-th layer that is met of a run has ``number(run, i)``."""
        longest = max(runs, key=lambda run: self.counts[run])
        length, place = self.counts[longest], runs.index(longest)

        def turn(run: int, first: Any, count: Any, h: Any, stacks: list[Tree]) -> tuple[Any, list[Tree]]:
            """``count`` layers of a run from its ``first`` on."""

            def one(i: Any, carry: Any) -> Any:
                return body(run, number(run, i), *carry)

            h, own = _repeat(first, first + count, one, (h, stacks[run]))
            return h, [own if r == run else x for r, x in enumerate(stacks)]

        if self.periods <= (WRITTEN_OUT if target_platform() == "gpu" else 1):
            for period, run in itertools.product(range(self.periods), runs):
                h, stacks = turn(run, period * self.counts[run], self.counts[run], h, stacks)
            return h, stacks

        def layer(i: Any, carry: Any) -> Any:
            # One loop over all layers of the longest run; the others have their turn in it, zero times or once. In
            # loops over periods and their layers a number would depend on both, and XLA:GPU has a kernel write into
            # its place of a stack only where that depends on one loop.
            for at, run in enumerate(runs):
                now = {-1: i % length == 0, 0: 1, 1: (i + 1) % length == 0}[(at > place) - (at < place)]
                first = i if run == longest else i // length * self.counts[run]
                carry = turn(run, first, now * (1 if run == longest else self.counts[run]), *carry)
            return carry

        return _repeat(0, self.periods * length, layer, (h, stacks))

    def stacks(self, shapes: Sequence[Tree]) -> list[Tree]:
        """Room for what every layer of every run writes; ``shapes`` are one layer's."""
        return [
            jax.tree.map(lambda x, n=self.periods * count: _room((n, *x.shape), x.dtype), tree)
            for tree, count in zip(shapes, self.counts, strict=True)
        ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_layers(loop: _Loop, weights: list[Tree], h: Tree, constants: Tree) -> tuple[Any, list[Any]]:
    def one(run: int, number: Any, h: Any, seen: Tree) -> Any:
        (h, aux), rest = loop.layer(run, _at(weights[run], number), h, constants, number)
        return h, _put(seen, number, (aux, rest))

    def shape(run: int) -> Tree:
        (_, aux), rest = jax.eval_shape(
            lambda w, h, constants: loop.layer(run, _at(w, 0), h, constants, 0), weights[run], h, constants
        )
        return aux, rest

    return loop.forward(one, h, loop.stacks([shape(run) for run in range(len(weights))]))


def _forward(loop: _Loop, weights: list[Tree], h: Tree, constants: Tree) -> Any:
    pieces = [_Piece.of(loop.layer, run, w, h, constants) for run, w in enumerate(weights)]

    def one(run: int, number: Any, h: Any, stacks: Tree) -> Any:
        seen, kept = stacks
        h, new, kept = pieces[run].forward(_at(weights[run], number), h, constants, number, kept)
        return h, (_put(seen, number, new), kept)

    h, stacks = loop.forward(one, h, loop.stacks([(p.seen, p.kept) for p in pieces]))
    seen, kept = map(list, zip(*stacks))
    return (h, seen), (weights, constants, kept, _Static(pieces))


def _backward(loop: _Loop, saved: Any, given: Any) -> Any:
    (weights, constants, kept, static), (dh, d_seen) = saved, given

    def one(run: int, number: Any, dh: Any, grads: Tree) -> Any:
        d_aux = _at(d_seen[run][0], number)
        dw, dh = static.value[run].backward(
            _at(weights[run], number), constants, number, _at(kept[run], number), (dh, d_aux)
        )
        return dh, _put(grads, number, dw)

    dh, grads = loop.backward(one, dh, loop.stacks([jax.eval_shape(lambda w: _at(w, 0), w) for w in weights]))
    return grads, dh, None


_over_layers.defvjp(_forward, _backward)


class _Piece(NamedTuple):
    """A layer's forward and backward pass, and what goes from one to the other."""

    program: ClosedJaxpr
    """(weights, h, constants, number), flat -> (h, seen, leaves of the pullback), flat"""
    outputs: Any
    """tree of (h, seen)"""
    pullback: Any
    """tree of the pullback"""
    sources: list[int | None]
    """of each of the pullback's leaves: which argument it is, or None where it must be kept"""
    streams: int
    """how many arrays h is"""
    seen: Tree
    kept: list[jax.ShapeDtypeStruct]

    @staticmethod
    def of(layer: Layer, run: int, weights: Tree, h: Tree, constants: Tree) -> _Piece:
        trees = {}

        def program(weights: Tree, h: Tree, constants: Tree, number: jax.Array) -> Any:
            (h, aux), pullback, rest = jax.vjp(
                lambda w, h: layer(run, w, h, constants, number), weights, h, has_aux=True
            )
            leaves, trees["pullback"] = jax.tree.flatten(pullback)
            outputs, trees["outputs"] = jax.tree.flatten((h, (aux, rest)))
            trees["seen"] = jax.eval_shape(lambda: (aux, rest))
            return *outputs, *leaves

        one = jax.eval_shape(lambda w: _at(w, 0), weights)
        arguments = (one, h, constants, jax.ShapeDtypeStruct((), jnp.int32))
        closed = jax.make_jaxpr(program)(*arguments)
        _, leaves = _split(closed.jaxpr.outvars, trees["outputs"])
        places = {variable: i for i, variable in enumerate(closed.jaxpr.invars)}
        before = len(jax.tree.leaves(one))
        for variable in closed.jaxpr.invars[before : before + len(jax.tree.leaves(h))]:
            del places[variable]  # h is another in each layer
        sources = [None if _is_literal(v) else places.get(v) for v in leaves]
        own = [v for v, source in zip(leaves, sources) if source is None]
        kept = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in own]
        return _Piece(
            closed, trees["outputs"], trees["pullback"], sources, len(jax.tree.leaves(h)), trees["seen"], kept
        )

    def forward(
        self, weights: Tree, h: Tree, constants: Tree, number: Any, stacks: list[jax.Array]
    ) -> tuple[Any, Tree, list[jax.Array]]:
        """New h, what is seen, and the stacks with what this layer keeps."""
        arguments = *jax.tree.leaves((weights, h, constants)), jnp.asarray(number, jnp.int32)
        run = _in_place if target_platform() == "gpu" else _and_then
        _, leaves = _split(self.program.jaxpr.outvars, self.outputs)
        own = [v for v, source in zip(leaves, self.sources) if source is None]
        outputs, stacks = run(self.program, arguments, own, stacks, number)
        h, seen = jax.tree.unflatten(self.outputs, outputs[: self.outputs.num_leaves])
        return h, seen, stacks

    def backward(self, weights: Tree, constants: Tree, number: Any, kept: list[jax.Array], given: Any) -> Any:
        h = [None] * self.streams
        arguments = *jax.tree.leaves(weights), *h, *jax.tree.leaves(constants), jnp.asarray(number, jnp.int32)
        remaining = iter(kept)
        leaves = [next(remaining) if source is None else arguments[source] for source in self.sources]
        return jax.tree.unflatten(self.pullback, leaves)(given)


@jax.tree_util.register_static
class _Static:
    """What is no array, on its way from the forward to the backward pass."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _and_then(
    program: ClosedJaxpr, arguments: Sequence[Any], kept: list[Any], stacks: list[jax.Array], number: Any
) -> tuple[list[Any], list[jax.Array]]:
    """Runs the program, puts what is kept of it (some of its outputs) into the stacks: outputs and stacks."""
    outputs = jaxpr_as_fun(program)(*arguments)
    values = dict(zip(map(id, program.jaxpr.outvars), outputs))
    return outputs, _put(stacks, number, [values[id(v)] for v in kept])


def _in_place(
    program: ClosedJaxpr, arguments: Sequence[Any], kept: list[Any], stacks: list[jax.Array], number: Any
) -> tuple[list[Any], list[jax.Array]]:
    """The same, where a value goes to its place in the stack as soon as it is made, and what follows reads it there.

    So that XLA:GPU has the product or kernel that makes it write there. A value that is also read elsewhere it makes
    twice, or copies.
    """
    jaxpr, stacks = program.jaxpr, list(stacks)
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *arguments]))

    def read(variable: Any) -> Any:
        return variable.val if _is_literal(variable) else values[variable]

    places = {v: i for i, v in enumerate(kept) if not _is_literal(v) and v not in values}
    for equation in jaxpr.eqns:
        names = list(dict.fromkeys(v for v in equation.invars if not _is_literal(v)))
        one = jaxpr.replace(constvars=[], invars=names, outvars=equation.outvars, eqns=[equation])
        made = jaxpr_as_fun(ClosedJaxpr(one, []))(*map(read, names))
        for variable, x in zip(equation.outvars, made, strict=True):
            if (place := places.get(variable)) is not None:
                stacks[place] = _put(stacks[place], number, x)
                x = _at(jax.lax.optimization_barrier(stacks[place]), number)
            values[variable] = x
    for place, variable in enumerate(kept):
        if _is_literal(variable) or places.get(variable) != place:
            stacks[place] = _put(stacks[place], number, read(variable))
    return list(map(read, jaxpr.outvars)), stacks


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")


def _split(flat: Sequence[Any], outputs: Any) -> tuple[list[Any], list[Any]]:
    return list(flat[: outputs.num_leaves]), list(flat[outputs.num_leaves :])


def _repeat(first: Any, end: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    once = isinstance(end, int) and isinstance(first, int) and end - first == 1
    return body(first, carry) if once else jax.lax.fori_loop(first, end, body, carry)


def _at(tree: Tree, number: Any) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), tree)


def _put(stacks: Tree, number: Any, tree: Tree) -> Tree:
    return jax.tree.map(lambda stack, x: jax.lax.dynamic_update_index_in_dim(stack, x, number, 0), stacks, tree)


def _room(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Every element of it will be written: on a GPU it need not be filled before."""
    return empty(shape, dtype) if target_platform() == "gpu" else jnp.zeros(shape, dtype)
