"""How the ops check their arguments."""

import jax


def check_array(name: str, array: jax.Array, shape: tuple[int, ...], meaning: str, *dtypes: str) -> None:
    """Raises a ValueError unless `array` has this shape, which `meaning` explains; a TypeError for other dtypes."""
    if array.shape != shape:
        raise ValueError(f"{name} must be {meaning} = {list(shape)}: got {list(array.shape)}")
    if array.dtype.name not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(dtypes)}: got {array.dtype}")


def is_known(array: jax.Array) -> bool:
    """Whether the values are there, that is outside jit."""
    return not isinstance(array, jax.core.Tracer)
