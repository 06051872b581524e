"""Trees of arrays and their names on disk: parameters one tensor per layer, states leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m1jax.checkpoint.manifest import Info
from m1jax.config import ModelConfig
from m1jax.errors import UserError, shortened
from m1jax.weights.names import Tensor, by_path, tree_path


def leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of every leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named(state: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves of a state by name, typed random keys as their data, and the implementations of those keys."""
    named, keys = {}, {}
    for name, leaf in leaves(state):
        if _is_key(leaf):
            keys[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        named[name] = _global(leaf)
    return named, keys


def _global(leaf: Any) -> Any:
    """An array that Orbax can save: one process' own array becomes numpy, of which process 0 saves its copy."""
    if isinstance(leaf, jax.Array) and not (jax.process_count() > 1 and leaf.is_fully_addressable):
        return leaf
    return np.array(leaf)


def stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding in which a target's leaf is read."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        # The data has one more axis at the end; a sharding of the key applies to it as it is.
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=_sharding(leaf))
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))


def _sharding(leaf: Any) -> Any:
    """Where a target's leaf wants to be, or None where it is left to jax (numpy, uncommitted, no sharding)."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None and jax.process_count() > 1 and sharding.is_fully_addressable:
        return None
    return sharding


def orbax_target(leaf: jax.ShapeDtypeStruct) -> Any:
    """What asks Orbax for a leaf: with its sharding, or as numpy where it has none."""
    return leaf if leaf.sharding is not None else np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def unnamed(state: Any, read: dict[str, Any], info: Info) -> Any:
    """The inverse of `named`, in the structure of a target."""
    structure = jax.tree.structure(state)
    out = []
    for name, leaf in leaves(state):
        value = read[name]
        if _is_key(leaf):
            impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else info.keys.get(name)
            if info.keys.get(name) != impl:
                raise UserError(f"{info.path}: the random key {name} is {info.keys.get(name)} there, {impl} here")
            value = jax.random.wrap_key_data(jnp.asarray(value), impl=impl)
        elif isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
            value = value if isinstance(value, jax.Array) else jnp.asarray(value)
        elif not isinstance(leaf, np.ndarray):
            value = type(leaf)(value.item())
        out.append(value)
    return jax.tree.unflatten(structure, out)


def _checked_paths(params: Any, config: ModelConfig) -> list[tuple[Sequence[Tensor], Any]]:
    """(the tensors on disk, in order, that fill it; leaf) of every leaf."""
    places = by_path(config, merged_experts=True)
    given = [(tree_path(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
    if differ := set(places) ^ {path for path, _ in given}:
        names = sorted("/".join(map(str, path)) for path in differ)
        raise UserError(f"these are not the parameters of the config: {shortened(names)}")
    out = []
    for path, leaf in given:
        here = places[path]
        shape = ((len(here),) if here[0].index else ()) + here[0].shape  # layers stand along the first axis
        if tuple(leaf.shape) != shape:
            raise UserError(
                f"parameter {'/'.join(map(str, path))} is {list(leaf.shape)}, the config says {list(shape)}"
            )
        out.append((here, leaf))
    return out


def unstacked(params: Any, config: ModelConfig) -> dict[str, Any]:
    """Parameters as one array per layer, under their official names."""
    out = {}
    for here, leaf in _checked_paths(params, config):
        if not here[0].index:
            out[here[0].name] = _global(leaf)
            continue
        slices = _slicer(_layer_sharding(leaf))(leaf) if isinstance(leaf, jax.Array) else tuple(leaf)
        out |= {tensor.name: _global(x) for tensor, x in zip(here, slices)}
    return out


def _layer_sharding(leaf: Any) -> Any:
    """The sharding of one layer's slice of a leaf stacked over layers; None where the leaf has none of its own."""
    sharding = _sharding(leaf)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if sharding is not None and len(sharding.device_set) > 1:
        raise ValueError(f"parameters must have NamedShardings, not {sharding}")
    return sharding


@functools.lru_cache(maxsize=64)
def _slicer(sharding: Any) -> Any:
    return jax.jit(lambda x: tuple(x[i] for i in range(x.shape[0])), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _stacker(sharding: Any) -> Any:
    return jax.jit(lambda xs: jnp.stack(xs), out_shardings=sharding)


def per_layer_targets(params: Any, config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding in which each array of `unstacked` is read."""
    out = {}
    for here, leaf in _checked_paths(params, config):
        sharding = _layer_sharding(leaf) if here[0].index else _sharding(leaf)
        out |= {t.name: jax.ShapeDtypeStruct(t.shape, leaf.dtype, sharding=sharding) for t in here}
    return out


def stacked(params: Any, read: dict[str, Any], config: ModelConfig) -> Any:
    """The inverse of `unstacked`, in the structure of a target."""
    out = []
    for here, leaf in _checked_paths(params, config):
        values = [read.pop(tensor.name) for tensor in here]
        if not here[0].index:
            value = values[0]
        elif isinstance(values[0], jax.Array):
            value = _stacker(_sharding(leaf))(values)
        else:
            value = np.stack(values)
        out.append(value if isinstance(leaf, np.ndarray) else jnp.asarray(value))
    return jax.tree.unflatten(jax.tree.structure(params), out)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a/b", value) of nested dicts."""
    for name, value in tree.items():
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f"arrays: {name!r} is no name (a string without '/')")
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value
