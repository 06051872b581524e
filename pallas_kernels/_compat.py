"""What differs between the supported versions of JAX, and what depends on where a program will run."""

import jax


def target_platform() -> str:
    """The platform that the program being traced is meant for: "cpu", "gpu" or "tpu".

    The ambient mesh (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`, `jax.shard_map`) decides, so that a program can
    be compiled for a chip that is not here; without one, the default device or backend does.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else None
    if platform is None:
        default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
        platform = default if isinstance(default, str) else getattr(default, "platform", None)
    platform = platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def varying_axes(*arrays: jax.Array | None) -> frozenset[str]:
    """The axes of the enclosing `shard_map` over which any of the arrays differs between devices."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks an array as differing over `axes`: `shard_map` demands it of a carry whose update differs."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array
