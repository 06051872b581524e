"""Which chip the program that is being traced is meant for."""

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


def device_kind() -> str:
    """What the makers call the chip, such as "NVIDIA H200"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind
