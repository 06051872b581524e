"""The Hopper kernels in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py compiles them.

Some 100 ms per block of 64 x 64 (`_hopper._Emulated` stands in for the matrix units), several times as long on JAX
0.10.2, which also interprets no copies beyond an array's end.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PADDING, _hopper, softmax_attention
from pallas_kernels.softmax import hopper, hopper_forward
from tests.pallas_kernels.softmax.suite import Case, Suite

OLD = jax.__version_info__ < (0, 11)
needs_newer_interpreter = pytest.mark.skipif(OLD, reason="JAX 0.10.2 interprets no copy beyond an array's end")


def blocks(case: Case) -> int:
    """What the interpreter has to do, forward and backward."""
    return 8 * case.batch * case.heads * -(-case.length // 128) * -(-(case.keys or case.length) // 128)


class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}
    dtypes: ClassVar = ("bfloat16",)

    def bears(self, case):
        return blocks(case) <= (0 if OLD else 100)

    # The interpreter runs on one device at a time; test_hopper_compiled.py compiles a shard_map.
    test_shard_map = None  # pyright: ignore[reportAssignmentType]
    if OLD:
        test_vmap = None  # pyright: ignore[reportAssignmentType]


@pytest.mark.slow
@needs_newer_interpreter
class TestHopperLonger(TestHopper):
    def bears(self, case):
        return 100 < blocks(case) <= 1000


class TestTiles(TestHopper):
    """On every JAX: segments that end in a tile and between tiles, a tile that is half and one that is all padding."""

    test_vmap = None  # pyright: ignore[reportAssignmentType]

    def pytest_generate_tests(self, metafunc):
        case = Case(length=256, heads=2, kv_heads=1, size=64, rows=((50, 78, 60, -68), (100, -156)))
        metafunc.parametrize("case", [case], ids=str)
        metafunc.parametrize("dtype", self.dtypes)


@needs_newer_interpreter
class TestTheRingGoesRound(TestHopper):
    """More blocks of keys than stages, most of them without a mask."""

    test_vmap = None  # pyright: ignore[reportAssignmentType]

    def pytest_generate_tests(self, metafunc):
        case = Case(length=8, heads=1, kv_heads=1, size=64, keys=1000, starts=(990,))
        metafunc.parametrize("case", [case], ids=str)
        metafunc.parametrize("dtype", self.dtypes)


@pytest.mark.parametrize(("packed", "offset"), [(False, 0), (False, 5), (False, 300), (True, 0)])
def test_walks_visit_what_is_seen_and_no_other_blocks(packed, offset):
    """Against the whole mask: every visited block has a pair that counts; of open blocks all pairs do."""
    random = np.random.default_rng(0)
    length, block = 700, 64
    keys = length + offset
    segment_ids = None
    if packed:
        ids = np.repeat(np.arange(40), random.integers(1, 70, 40))[:length]
        ids[-60:] = PADDING
        segment_ids = jnp.asarray(ids[None], jnp.int32)
    bounds = hopper._bounds(length, keys, 1, segment_ids, jnp.array([offset], jnp.int32))
    refs = bounds.first, bounds.last, bounds.offset
    query, key = np.arange(bounds.first.shape[1])[:, None], np.arange(bounds.last.shape[1])
    seen = (np.asarray(bounds.first)[0][:, None] <= key) & (key <= query + offset) & (key < keys)
    behind = (query <= np.asarray(bounds.last)[0]) & (key <= query + offset) & (key < keys)
    np.testing.assert_array_equal(seen, behind)

    def check(walk, strips):
        walk = jax.tree.map(int, walk)
        visited = [int(walk.at(step)) for step in range(walk.open + walk.masked)]
        assert sorted(visited) == [number for number, strip in enumerate(strips) if strip.any()]
        assert all(strips[number].all() for number in visited[: walk.open])

    for tile in range(seen.shape[0] // 128):
        rows = seen[tile * 128 : tile * 128 + 128]
        strips = [rows[:, at : at + block] for at in range(0, seen.shape[1], block)]
        check(hopper_forward.key_walk(refs, 0, tile, keys, block), strips)
    for tile in range(seen.shape[1] // 128):
        columns = seen[:, tile * 128 : tile * 128 + 128]
        strips = [columns[at : at + block] for at in range(0, seen.shape[0], block)]
        check(hopper.hopper_backward.query_walk(refs, 0, tile, block), strips)


@needs_newer_interpreter
def test_races_are_found(monkeypatch):
    """Else the tests above would show little: without the fences, copies race with what other threads write."""
    monkeypatch.setattr(hopper_forward.plgpu, "commit_smem", lambda: None)
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(Exception, match=r"(?i)race"):
        jax.block_until_ready(hopper.attention(q, q, q, None, None, interpret=True))


def test_says_why_not():
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, and this program is for cpu"):
        softmax_attention(q, q, q, implementation="hopper")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": jnp.float32}, "it takes bfloat16: got float32"),
        ({"shape": (1, 8, 2, 96)}, "it takes heads of size 64 or 128: got D = 96"),
    ],
)
def test_says_which_dtypes_and_sizes(monkeypatch, changes, message):
    monkeypatch.setattr(_hopper.target, "target_platform", lambda: "gpu")
    monkeypatch.setattr(_hopper.target, "device_kind", lambda: "NVIDIA H200")
    q = jnp.zeros(**({"shape": (1, 8, 2, 64), "dtype": jnp.bfloat16} | changes))
    with pytest.raises(ValueError, match=message):
        softmax_attention(q, q, q, implementation="hopper")
