"""Meshes, and where every named array lies on them.

A mesh has five axes; one line says how large each is ("fsdp=4,tensor=2"), those not named have size 1:

    data      rows of a batch; parameters are repeated
    fsdp      rows of a batch; parameters are cut, and gathered layer by layer when they are used
    expert    rows of a batch outside the expert layers; inside them each device keeps whole experts
    tensor    heads, the width of experts, the vocabulary (or, where it does not divide it, the tables' columns);
              between the blocks rows of a batch, or time
    sequence  time

``DIMENSIONS`` is the one table of where parameters lie; what has their names (gradients, optimizer moments) follows
them. Activations are held in place by ``constrain``, which does nothing without an ambient mesh (``jax.set_mesh``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from m1jax import parameters
from m1jax.config import ModelConfig
from m1jax.errors import UserError

P = PartitionSpec
AXES = ("data", "fsdp", "expert", "tensor", "sequence")
ROWS = ("data", "fsdp", "expert")  # what the rows of a batch are spread over
CUT = ("fsdp", "expert")  # what a matrix that belongs to no expert is cut over, beside tensor

COLUMNS = ("tensor", *CUT)  # what the hidden dimension of a table of words is cut over if tensor cannot cut its rows

# What the dimensions of parameters (``m1jax.parameters``) are cut over by themselves. What is left of CUT cuts the
# first dimension of a matrix that it divides (`cut_dimension`): an axis cuts an array once, and experts, which are cut
# over expert already, are cut over fsdp alone besides. A vocabulary that tensor does not divide (no array is cut
# unevenly) stays whole, and COLUMNS are cut instead: files know nothing of it.
DIMENSIONS: dict[str | None, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "inner": ("tensor",),
    "experts": ("expert",),
    "hidden": (),
    None: (),
}


# What `constrain` calls the dimensions of activations. Where a size cannot be cut over all axes, it is over the first.
ACTIVATIONS: dict[str | None, tuple[str, ...]] = {
    "batch": ROWS,
    "time": ("sequence",),
    "heads": ("tensor",),
    None: (),
}


def make_mesh(spec: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that ``spec`` describes, for example "fsdp=4,tensor=2"; all five axes, of type Auto.

    An empty spec takes one device. Neighbouring devices differ in the last axes first: tensor and sequence, which
    communicate most, get the fastest links.

    Args:
        spec: ``axis=size`` pairs separated by commas. One size may be -1: whatever devices are left.
        devices: default all devices of all processes.

    Raises:
        UserError: an unknown or repeated axis, a size that is no number, or sizes that do not make up the devices.
    """
    sizes = parse_mesh(spec)
    devices = jax.devices() if devices is None else devices
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        if len(devices) % fixed:
            raise UserError(f"mesh {spec!r}: {fixed} does not divide the {len(devices)} devices, so -1 has no value")
        sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    elif fixed != len(devices) and spec:
        raise UserError(
            f"mesh {spec!r} is for {fixed} device{'s' * (fixed > 1)}, but there are {len(devices)}; "
            f"data=-1 would use the rest"
        )
    count = math.prod(sizes.values())
    # Not `jax.make_mesh`, which refuses axes that are no whole dimensions of a TPU's torus.
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices[:count], allow_split_physical_axes=devices[0].platform == "tpu"
    )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(spec: str) -> dict[str, int]:
    """Axis -> size, all five in order, from "fsdp=4,tensor=2". Raises UserError as ``make_mesh`` does."""
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    seen = set()
    for part in filter(None, spec.replace(" ", "").split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in seen:
            known = "given twice" if axis in seen else f"unknown; there are {', '.join(AXES)}"
            raise UserError(f"mesh {spec!r}: axis {axis!r} is {known}")
        if (not size.isdecimal() and size != "-1") or size == "0":
            raise UserError(f"mesh {spec!r}: the size of {axis} must be a positive number or -1, not {size!r}")
        seen.add(axis)
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"mesh {spec!r}: only one axis may be -1")
    return sizes


def check_shardable(
    config: ModelConfig, mesh: Mesh | dict[str, int], *, batch: int | None = None, time: int | None = None
) -> None:
    """Refuses a model, or a batch of [batch, time] tokens, that cannot be cut over a mesh.

    Raises:
        UserError: names the axis, its size, what it does not divide, and the nearest sizes that would work.
    """
    sizes = mesh if isinstance(mesh, dict) else dict(mesh.shape)
    for axis in AXES[::-1]:
        problem = _problem(config, sizes, axis, batch, time) if sizes[axis] > 1 else None
        if problem is not None:
            limit = 2 * max(config.hidden_size, batch or 1, time or 1)
            works = [n for n in range(1, limit) if _problem(config, sizes | {axis: n}, axis, batch, time) is None]
            below = [n for n in works if n < sizes[axis]][-1:]
            above = [n for n in works if n > sizes[axis]][:1]
            nearest = " or ".join(map(str, below + above))
            hint = (
                f"; the nearest that work: {nearest}" if nearest else "; no size of this axis works beside the others"
            )
            raise UserError(f"mesh: {axis} = {sizes[axis]} cannot shard this model: {problem}{hint}")


def is_shardable(
    config: ModelConfig, sizes: dict[str, int], *, batch: int | None = None, time: int | None = None
) -> bool:
    """Whether ``check_shardable`` would accept them; quick, because it looks for no sizes nearby."""
    return all(_problem(config, sizes, axis, batch, time) is None for axis in AXES if sizes[axis] > 1)


def _problem(config: ModelConfig, sizes: dict[str, int], axis: str, batch: int | None, time: int | None) -> str | None:
    """The first thing that keeps ``axis`` from being cut at its size, the other axes as they are."""
    for axes, name, value in _cuts(config, sizes, batch, time):
        if axis in axes:
            cut = math.prod(sizes[a] for a in axes)
            if value % cut:
                together = "" if cut == sizes[axis] else f" ({' x '.join(a for a in axes if sizes[a] > 1)} = {cut})"
                return f"it does not divide {name} = {value}{together}"
    if axis == "sequence" and sizes["sequence"] > 1:
        mine, group = config.num_heads // sizes["tensor"] // sizes["sequence"], config.num_heads // config.num_kv_heads
        if mine % group and group % mine:
            return f"{mine} query heads a device do not match groups of {group} heads to one key/value head"
    return None


def _cuts(
    config: ModelConfig, sizes: dict[str, int], batch: int | None, time: int | None
) -> Iterator[tuple[tuple[str, ...], str, int]]:
    yield ("tensor",), "num_heads", config.num_heads
    yield ("tensor",), "num_kv_heads", config.num_kv_heads
    yield ("tensor",), "intermediate_size", config.intermediate_size
    yield ("tensor",), "shared_intermediate_size", config.shared_intermediate_size
    yield ("expert",), "num_experts", config.num_experts
    yield CUT if vocabulary_is_cut(config.vocab_size, sizes) else COLUMNS, "hidden_size", config.hidden_size
    yield ("tensor", "sequence"), "num_heads", config.num_heads
    if batch is not None:
        yield ROWS, "the batch", batch
    if time is not None:
        yield ("sequence",), "the time", time


def vocabulary_is_cut(words: int, sizes: Mapping[str, int]) -> bool:
    """Whether tensor cuts the rows of the tables of words; else it cuts their columns."""
    return words % sizes["tensor"] == 0


def parameter_specs(tree: Any, sizes: Mapping[str, int], *, whole: bool = False) -> Any:
    """The PartitionSpec of every leaf, by the end of its path. Parameters, gradients and optimizer states alike.

    Scalars (step counters, random keys) are repeated everywhere. ``whole``: what is cut over ``CUT`` for training is
    repeated instead, as `MiniMaxM1.whole` says.

    Args:
        tree: of arrays, or of anything with shapes.
        sizes: axis -> size of the mesh.

    Raises:
        KeyError: a leaf that is no scalar has a name that ``m1jax.parameters`` does not know.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _spec(path, leaf.shape, sizes, whole), tree)


def parameter_shardings(tree: Any, mesh: Mesh, *, whole: bool = False) -> Any:
    """``parameter_specs`` as shardings on a mesh, for ``jax.jit(..., out_shardings=)``, ``device_put`` or a restore."""
    specs = parameter_specs(tree, mesh.shape, whole=whole)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where [batch, time] arrays of tokens lie."""
    return NamedSharding(mesh, P(ROWS, "sequence"))


def process_rows(rows: int, mesh: Mesh) -> range:
    """Which rows of a batch this process must read: those that lie on its devices.

    Raises:
        UserError: ``rows`` cannot be shared out over the mesh.
    """
    sizes = math.prod(mesh.shape[axis] for axis in ROWS)
    if rows % sizes:
        raise UserError(f"{rows} rows cannot be shared out over {' x '.join(ROWS)} = {sizes}; take a multiple of it")
    shards = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((rows,)).values()
    bounds = [index[0].indices(rows) for index in shards if index is not None]
    return range(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def rows_of_batch(local: dict[str, Any], rows: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [count, rows, time, ...] from the ``process_rows`` that each process has read, [count, its rows,
    time, ...].

    Time must be whole in every process: it is cut over sequence here.
    """
    sharding = NamedSharding(mesh, P(None, ROWS, "sequence"))
    return {
        name: jax.make_array_from_process_local_data(sharding, value, (value.shape[0], rows, *value.shape[2:]))
        for name, value in local.items()
    }


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of ``jax.set_mesh`` or ``jax.sharding.use_abstract_mesh``; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def activation_axes(name: str | None, size: int) -> tuple[str, ...]:
    """The ambient mesh's axes that a dimension of that name and size is cut over: the first ones that divide it."""
    mesh = ambient_mesh()
    axes: tuple[str, ...] = ()
    for axis in ACTIVATIONS[name]:
        if mesh is None or size % math.prod(mesh.shape[a] for a in (*axes, axis)):
            break
        axes += (axis,)
    return axes


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Holds an activation in place: one name of ``ACTIVATIONS`` per dimension. Nothing without an ambient mesh."""
    if ambient_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(*map(activation_axes, names, x.shape)))


def residual_axes(batch: int, time: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What batch and time are cut over between the blocks, where tensor would only repeat the residual stream.

    Tensor cuts the rows if it can: gathered along its first dimension, an array lies as it did. Else it cuts time, if
    it can. Rows of one token stay as they are.
    """
    mesh, rows, steps = ambient_mesh(), activation_axes("batch", batch), activation_axes("time", time)
    if mesh is None or time % math.prod(mesh.shape[axis] for axis in (*steps, "tensor")):
        return rows, steps
    if rows == ROWS and batch % math.prod(mesh.shape[axis] for axis in (*rows, "tensor")) == 0:
        return (*rows, "tensor"), steps
    return rows, (*steps, "tensor")


def constrain_residual(x: jax.Array) -> jax.Array:
    """``constrain`` of a residual stream [batch, time, hidden]."""
    if ambient_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(*residual_axes(*x.shape[:2])))


def empty(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """``jax.lax.empty``: an array whose elements are all written before they are read.

    On a mesh it is cut as what is written into it; the plain one would be whole on every device.
    """
    if ambient_mesh() is None:
        return jax.lax.empty(shape, dtype)

    @custom_partitioning
    def make(_: jax.Array) -> jax.Array:
        return jax.lax.empty(shape, dtype)

    def partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
        cut = result.sharding.shard_shape(shape)
        return mesh, lambda _: jax.lax.empty(cut, dtype), result.sharding, (NamedSharding(mesh, P()),)

    make.def_partition(partition, sharding_rule="-> " + " ".join(f"d{i}" for i in range(len(shape))))
    return make(jax.numpy.zeros((), dtype))


def gather_weights(block: Any, dtype: jax.typing.DTypeLike) -> Any:
    """One layer's parameters (without the axis of periods), gathered over ``CUT`` in the compute dtype.

    To be called inside what is rematerialised, so that only the cut form is kept for the backward pass. Gradients go
    back cut. Experts stay as they are (they are gathered where they are used), and so do float32 routers. Nothing
    without an ambient mesh.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return block

    def gather(path: Any, weight: jax.Array) -> jax.Array:
        parameter, _ = parameters.find(path)
        cut, whole = (_entries(parameter, weight.shape, mesh.shape, whole) for whole in (False, True))
        experts = "experts" in parameter.dimensions
        return weight if experts or whole == cut else _gathered(weight, jax.numpy.dtype(dtype), P(*cut), P(*whole))

    return jax.tree_util.tree_map_with_path(gather, block)


def _gathered(weight: jax.Array, dtype: jax.numpy.dtype, cut: PartitionSpec, whole: PartitionSpec) -> jax.Array:
    @jax.custom_vjp
    def gather(weight: jax.Array) -> jax.Array:
        # The first constraint keeps XLA from gathering in float32 and casting afterwards.
        return _hold(_hold(weight.astype(dtype), cut), whole)

    # Left to itself JAX would ask for the gradient whole before cutting it: an all-reduce instead of a reduce-scatter.
    gather.defvjp(lambda w: (gather(w), None), lambda _, g: (_hold(g, cut).astype(weight.dtype),))
    return gather(weight)


_hold = jax.lax.with_sharding_constraint


def _spec(path: Any, shape: tuple[int, ...], sizes: Mapping[str, int], whole: bool = False) -> PartitionSpec:
    """Of a leaf of this shape; those of layers have the layers of a run in front."""
    if not shape:
        return P()
    parameter, in_layer = parameters.find(path)
    if len(parameter.dimensions) + in_layer != len(shape):
        raise KeyError(
            f"{'.'.join(parameters.path_names(path))} has {len(shape)} dimensions; {parameter.name} has "
            f"{len(parameter.dimensions) + in_layer}"
        )
    return P(*[None] * in_layer, *_entries(parameter, shape[in_layer:], sizes, whole))


def _entries(
    parameter: parameters.Parameter, shape: tuple[int, ...], sizes: Mapping[str, int], whole: bool
) -> list[str | tuple[str, ...] | None]:
    """What each dimension of a parameter of this shape is cut over."""
    if parameter.dimensions[0] == "vocab" and not vocabulary_is_cut(shape[0], sizes):
        return [None, "tensor" if whole else COLUMNS]
    axes = [DIMENSIONS[dimension] for dimension in parameter.dimensions]
    if not whole and "hidden" in parameter.dimensions:
        at = cut_dimension(parameter.dimensions, shape, sizes)
        axes[at] += tuple(axis for axis in CUT if not any(axis in own for own in axes))
    return [own if len(own) > 1 else own[0] if own else None for own in axes]


def cut_dimension(dimensions: Sequence[parameters.Dimension], shape: Sequence[int], sizes: Mapping[str, int]) -> int:
    """The dimension of a matrix that is cut over ``CUT``, but for what cuts it already: the first that can be.

    A matrix that is gathered along its first dimension lies as it is used; gathered along another one, it would first
    have to be turned around.
    """
    axes = [DIMENSIONS[dimension] for dimension in dimensions]
    rest = tuple(axis for axis in CUT if not any(axis in own for own in axes))
    for at, (size, own) in enumerate(zip(shape, axes, strict=True)):
        if size % math.prod(sizes.get(axis, 1) for axis in own + rest) == 0:
            return at
    return list(dimensions).index("hidden")  # `check_shardable` has seen that it can


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
