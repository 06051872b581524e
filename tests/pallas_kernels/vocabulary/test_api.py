"""What the op refuses, and how it says so."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import vocabulary_statistics

N, V, D = 4, 8, 16


def zeros(*shape, dtype="bfloat16"):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hidden": zeros(N, 1, D)},
            ValueError,
            "hidden must be [N,D] and weight [V,D], no axis empty: got [4, 1, 16]",
        ),
        ({"weight": zeros(0, D)}, ValueError, "no axis empty: got [4, 16] and [0, 16]"),
        ({"weight": zeros(V, 3)}, ValueError, "weight must be [V,D], D = 16 as in hidden: got [8, 3]"),
        ({"targets": zeros(5, dtype="int32")}, ValueError, "targets must be [N] = [4]: got [5]"),
        ({"hidden": zeros(N, D, dtype="float32")}, TypeError, "hidden must be bfloat16: got float32"),
        ({"weight": zeros(V, D, dtype="float16")}, TypeError, "weight must be float32 or bfloat16: got float16"),
        ({"targets": zeros(N, dtype="uint8")}, TypeError, "targets must be int32: got uint8"),
        ({"implementation": "fast"}, ValueError, "implementation must be 'auto' or one of"),
    ],
)
def test_bad_arguments(changes, error, message):
    usual = {"hidden": zeros(N, D), "weight": zeros(V, D, dtype="float32"), "targets": zeros(N, dtype="int32")}
    arguments = usual | changes
    implementation = arguments.pop("implementation", "auto")
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda a: vocabulary_statistics(**a, implementation=implementation), arguments)
