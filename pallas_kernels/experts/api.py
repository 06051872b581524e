"""The public op: arguments checked, implementation chosen."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels._compat import vary_over, varying_axes
from pallas_kernels.arguments import is_known
from pallas_kernels.experts.exchange import worthwhile
from pallas_kernels.ladder import Ladder

LADDER = Ladder(
    op="expert_mlp",
    package="pallas_kernels.experts",
    implementations=("reference", "ragged", "grouped", "hopper"),
    preferred={"cpu": ("grouped",), "gpu": ("hopper",)},
    portable="ragged",
)


def expert_mlp(
    x: jax.Array,
    w1: jax.Array,
    w3: jax.Array,
    w2: jax.Array,
    routes: jax.Array,
    weights: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    stacks: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    axis_name: str | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Every token through its experts: y = sum_k weights_k * (silu(x w1^T) * (x w3^T)) w2^T, no token dropped.

    Args:
        x: [N, D] tokens, any float dtype; products are accumulated in float32.
        w1: [E, F, D] float, the orientation of the official checkpoint, [out, in]; so are
        w3: [E, F, D] and
        w2: [E, D, F].
        routes: [N, k] integers, the experts of each token. An id outside 0..E-1 costs nothing and adds nothing:
            padding, or an expert that lives on another device.
        weights: [N, k] float, how much of each expert's output the token takes.
        layer: int32 scalar, may be traced: w1, w3 and w2 are then stacks [L,E,F,D] and [L,E,D,F], of which this layer's
            weights are taken, 0 <= layer < L; a scan over layers need not slice them ("hopper" reads them where they
            lie, the others slice). For inference: gradients are refused, unless
        stacks: (w1, w3, w2) of all layers are given beside this layer's own, w1 == stacks[0][layer] and so on. Kernels
            read the former, so that the latter, if they are slices, need never be made; gradients are the latter's.
        axis_name: an axis of the enclosing `shard_map` over whose devices the experts are spread: each has the next E
            of them, routes number them all, and every device gives its own tokens and gets their y. Tokens go to their
            experts alone, where `exchanges_tokens` says so.
        implementation: "auto" takes "grouped" on CPU, "hopper" where it can run, and "ragged" elsewhere. "reference" is
            the oracle of the tests, "ragged" sorts and uses `jax.lax.ragged_dot`, "grouped" loops over the experts in
            use (any platform; made for CPU), "hopper" are Pallas kernels for H100 and H200: bfloat16, D and F
            multiples of 128.

    Returns:
        y [N, D] in x's dtype. Differentiable in x, w1, w3, w2 and weights (not with `layer` alone). Works under jit,
        vmap, shard_map and meshes with Auto axes.

    Raises:
        ValueError: shapes or dtypes that do not fit (the argument is named), or an implementation that is unknown or
            cannot run here, or not with `axis_name`; or a gradient is wanted with `layer`.
    """
    _check(x, w1, w3, w2, routes, weights, layer, stacks)
    if x.shape[0] == 0 or routes.shape[1] == 0:
        return jnp.zeros_like(x)
    name = LADDER.choose(implementation, x, w1, w3, w2)
    if axis_name is not None and name != "hopper":
        raise ValueError(f"expert_mlp: implementation {name!r} exchanges no tokens, so axis_name must be None")
    # Inside shard_map the gradient of an argument that all devices share is a sum over devices: marking it as varying
    # here lets JAX insert that sum.
    layer = None if layer is None else jnp.asarray(layer, jnp.int32)
    axes = varying_axes(x, w1, w3, w2, routes, weights, layer)
    x, w1, w3, w2, weights = (vary_over(a, axes) for a in (x, w1, w3, w2, weights))
    if stacks is not None and name == "hopper":
        lying = tuple(vary_over(jax.lax.stop_gradient(a), axes) for a in stacks)
        return LADDER.module(name).forward(
            x, w1, w3, w2, routes, weights, stacks=lying, layer=layer, axis_name=axis_name
        )
    if layer is not None and stacks is None:
        return _of_layer(name, axis_name, x, w1, w3, w2, routes, weights, layer)
    spread = {} if axis_name is None else {"axis_name": axis_name}
    return LADDER.module(name).forward(x, w1, w3, w2, routes, weights, **spread)


def exchanges_tokens(x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array, devices: int) -> bool:
    """Whether `expert_mlp` can take an `axis_name` of so many devices for these arguments, and better should: otherwise
    all tokens go to all devices, and sums come back.

    On Hopper GPUs of one process, up to eight, for more than 1,024 tokens of a device.
    """
    return LADDER.choose("auto", x, w1, w3, w2) == "hopper" and worthwhile(len(x), devices)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _of_layer(name, axis_name, x, w1, w3, w2, routes, weights, layer):
    module = LADDER.module(name)
    if name == "hopper":
        return module.forward_of_layer(x, w1, w3, w2, routes, weights, layer, axis_name=axis_name)
    return module.forward(x, w1[layer], w3[layer], w2[layer], routes, weights)


@_of_layer.defjvp
def _no_gradient(name, axis_name, primals, tangents):
    raise ValueError("expert_mlp: with `layer` there are no gradients; give the layer's own weights, w1[layer], ...")


def _check(x, w1, w3, w2, routes, weights, layer, stacks) -> None:
    if stacks is not None:
        if layer is None:
            raise ValueError("expert_mlp: with stacks, layer must say which of their layers is meant")
        for name, own, stack in zip(("w1", "w3", "w2"), (w1, w3, w2), stacks, strict=True):
            if stack.shape[1:] != own.shape or stack.dtype != own.dtype:
                raise ValueError(
                    f"expert_mlp: the stack of {name} must be [L, *{own.shape}] {own.dtype}, "
                    f"got {stack.shape} {stack.dtype}"
                )
        w1, w3, w2 = stacks
    if x.ndim != 2:
        raise ValueError(f"expert_mlp: x must be [N, D], got {x.shape}")
    stack = "" if layer is None else "L, "
    if w1.ndim != (3 if layer is None else 4) or w1.shape[-1] != x.shape[1]:
        raise ValueError(f"expert_mlp: w1 must be [{stack}E, F, D] with D = {x.shape[1]}, got {w1.shape}")
    if w3.shape != w1.shape:
        raise ValueError(f"expert_mlp: w3 must have w1's shape {w1.shape}, got {w3.shape}")
    *some, F, D = w1.shape
    if w2.shape != (*some, D, F):
        raise ValueError(f"expert_mlp: w2 must be [{stack}E, D, F] = {(*some, D, F)}, got {w2.shape}")
    if layer is not None and (jnp.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer)):
        raise ValueError(f"expert_mlp: layer must be one integer, got {layer}")
    if layer is not None and is_known(layer) and not 0 <= layer < w1.shape[0]:
        raise ValueError(f"expert_mlp: layer must be in 0..{w1.shape[0] - 1}, got {layer}")
    if routes.ndim != 2 or routes.shape[0] != x.shape[0]:
        raise ValueError(f"expert_mlp: routes must be [N, k] with N = {x.shape[0]}, got {routes.shape}")
    if weights.shape != routes.shape:
        raise ValueError(f"expert_mlp: weights must have routes' shape {routes.shape}, got {weights.shape}")
    for name, a in (("x", x), ("w1", w1), ("w3", w3), ("w2", w2), ("weights", weights)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"expert_mlp: {name} must be floating point, got {a.dtype}")
    if not jnp.issubdtype(routes.dtype, jnp.integer):
        raise ValueError(f"expert_mlp: routes must be integers, got {routes.dtype}")
