"""The Hopper kernels in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py really compiles them."""

from typing import ClassVar

import jax

from tests.pallas_kernels.softmax.suite import Case, Suite

OLD = jax.__version_info__ < (0, 11)


def steps(case: Case) -> int:
    """What the interpreter has to do, forward and backward, in blocks of 64 x 64."""
    tiles, keys = -(-case.length // 128), -(-(case.keys or case.length) // 128)
    return case.batch * case.heads * tiles * keys * 8


class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}
    dtypes: ClassVar = ("bfloat16",)

    def bears(self, case):
        if OLD and (case.length % 128 or (case.keys or 0) % 128):
            return False  # JAX 0.10.2 interprets no copy beyond an array's end
        return steps(case) <= 400

    # The interpreter runs on one device at a time; test_hopper_compiled.py compiles a shard_map.
    test_shard_map = None  # pyright: ignore[reportAssignmentType]
