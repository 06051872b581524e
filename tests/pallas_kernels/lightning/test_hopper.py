"""The Hopper kernels in Pallas' interpreter on CPU, with race detection; test_hopper_compiled.py really compiles them.

The interpreter emulates the copy engine, the barriers and the order of accesses; `_hopper._Emulated` stands in for
the matrix units. Some 100 ms per block and chunk; four times as long on JAX 0.10.2, which also interprets no copies
beyond an array's end and no arrays that are updated in place.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _hopper, lightning_attention, lightning_attention_decode
from pallas_kernels.lightning import hopper, hopper_parts, hopper_scan, hopper_sums, reference
from tests.pallas_kernels.lightning.suite import NAMES, Case, DecodeSuite, Suite, assert_close, problem

OLD = jax.__version_info__ < (0, 11)
needs_newer_interpreter = pytest.mark.skipif(OLD, reason="JAX 0.10.2 interprets no copy beyond an array's end")


def blocks_and_chunks(case: Case) -> int:
    """What the interpreter has to do, forward and backward."""
    blocks = 6 if case.key_size == 128 else 4
    return case.batch * case.heads * -(-case.length // 64) * blocks


class TestHopper(Suite):
    implementation = "hopper"
    options: ClassVar = {"interpret": True}
    dtypes = ("bfloat16",)
    small: ClassVar = {"length": 64, "heads": 2, "key_size": 64}

    def bears(self, case):
        return self.takes(case) and blocks_and_chunks(case) <= (0 if OLD else 24)

    def check(self, case, dtype, results):
        if case.length == 1:
            # q k, one number per head, is rounded to bfloat16 once: up to 2^-8, which no sum over tokens evens out.
            tolerance = (2**-16 + self.tolerances[dtype] ** 2) ** 0.5
            for name, result, truth in zip(NAMES, results, problem(case)[1], strict=True):
                if case.initial or name != "d_initial_state":
                    assert_close(name, result, truth, tolerance)
        else:
            super().check(case, dtype, results)

    def takes(self, case):
        if OLD and case.length % 64:
            return False
        return case.value_size in (None, case.key_size) and blocks_and_chunks(case) <= 1000

    # The interpreter runs on one device at a time; test_hopper_compiled.py compiles a shard_map.
    test_shard_map = None  # pyright: ignore[reportAssignmentType]
    if OLD:  # too slow there for every run
        test_vmap = test_log_decay_has_no_gradient = None  # pyright: ignore[reportAssignmentType]


@pytest.mark.slow
class TestHopperLonger(TestHopper):
    def bears(self, case):
        return self.takes(case) and not super().bears(case)


def check(monkeypatch, case):
    for name in ("forward", "backward"):
        monkeypatch.setattr(hopper, name, functools.partial(getattr(hopper, name), interpret=True))
    monkeypatch.setattr(hopper, "unsupported", lambda q, k, v: None)
    suite = TestHopper()
    suite.check(case, "bfloat16", suite.run(case, "bfloat16"))


def test_two_chunks(monkeypatch):
    """On every JAX: the state goes from one chunk to the next, with a segment's end, and padding, in either."""
    case = Case(length=128, heads=1, key_size=64, slopes="layer 40", rows=((30, 70, -28),), initial=True)
    check(monkeypatch, case)


@pytest.mark.skipif(OLD, reason="JAX 0.10.2 interprets no kernel that updates an array in place")
class TestHopperDecode(DecodeSuite):
    implementation = "hopper"
    module = "hopper"
    options: ClassVar = {"interpret": True}
    shapes = ((1, 1, 64), (3, 2, 128), (5, 3, 64))


@needs_newer_interpreter
def test_the_ring_goes_round(monkeypatch):
    """More chunks than stages."""
    check(monkeypatch, Case(length=328, heads=1, key_size=128, slopes="layer 78", initial=True))


def reference_sums(k, v, log_decay, segment_ids, reverse):
    """[B,H,K,V]: the state that a row leaves behind, or the gradient of the one before it."""
    if reverse:
        nothing = jnp.zeros((k.shape[0], k.shape[2], k.shape[3], v.shape[3]))
        return reference.backward(k, k, v, log_decay, None, segment_ids, v, nothing)[3]
    return reference.forward(k, k, v, log_decay, None, segment_ids)[1]


def parts_case(rows, initial=True):
    return Case(length=512, heads=2, key_size=64, slopes="layer 78", rows=rows, initial=initial)


@pytest.mark.parametrize(
    "case",
    [
        parts_case(None),
        parts_case(None, initial=False),
        parts_case(((512,), (500, -12), (64, 64, 128, 256), (-512,))),
        parts_case(((63, 2, 127, 100, 1, 1, 1, 89, -128), (1, 511), (300, 200, -12), (130, -382))),
    ],
    ids=["plain", "no-initial-state", "even", "uneven"],
)
def test_parts_walked_side_by_side(monkeypatch, case):
    """The states between a row's parts, exactly: float32, with the recurrence in the kernels' place."""

    def scan(arrays, roles, log_decay, initial, segment_ids, *, length, reverse, splits=1, interpret=False):
        results, finals = [], []
        for role, state in zip(roles, initial, strict=True):
            q, k, v = (arrays[i] for i in (role.q, role.k, role.v))
            state = None if state is None else state.mT
            if reverse:  # dv of the op on (k, q)
                _, _, x, final = reference.backward(k, q, v, log_decay, None, segment_ids, v, state)
            else:
                x, final = reference.forward(q, k, v, log_decay, state, segment_ids)
            results.append(x)
            finals += [final.mT] * role.final
        return results, finals

    def state_sums(k, v, log_decay, segment_ids, *, parts, reverse, forget_below, interpret):
        sums = reference_sums(k, v, log_decay, segment_ids, reverse).mT
        if parts is None:
            return sums
        sums = sums.reshape(-1, parts, *sums.shape[1:])
        return (sums[:, 1:] if reverse else sums[:, :-1]).reshape(-1, *sums.shape[2:])

    monkeypatch.setattr(hopper_parts, "SHORTEST", 64)
    monkeypatch.setattr(hopper, "scan", scan)
    monkeypatch.setattr(hopper_parts, "state_sums", state_sums)
    (q, k, v, initial_state, do, d_final_state), truths = problem(case)
    arrays = q, k, v, case.log_decay, initial_state if case.initial else None, case.segment_ids
    arrays = [x if x is None else jnp.asarray(x) for x in arrays]
    assert hopper._parts(arrays[0], case.length, arrays[3], arrays[5]).count == 8
    results = *hopper.forward(*arrays), *hopper.backward(*arrays, jnp.asarray(do), jnp.asarray(d_final_state))
    for name, result, truth in zip(NAMES, results, truths, strict=True):
        assert_close(name, result, truth, 1e-5)
    q, k, v, log_decay, _, segment_ids = arrays
    nothing = jnp.zeros_like(d_final_state)
    alone = (
        reference.forward(q, k, v, log_decay, None, segment_ids)[1],
        reference.backward(q, k, v, log_decay, nothing, segment_ids, jnp.asarray(do), nothing)[3],
    )
    for tokens, reverse, truth in zip(((k, v), (q, jnp.asarray(do))), (False, True), alone):
        left = hopper.left_behind(*tokens, log_decay, segment_ids, reverse=reverse)
        assert_close("state", left, np.asarray(truth, np.float64), 1e-5)


@pytest.mark.parametrize(
    ("length", "heads", "parts"),
    [
        *((32768, 64, 1), (32768, 34, 1), (32768, 32, 2), (32768, 16, 4), (32768, 8, 8), (32768, 1, 32)),
        *((1024, 1, 1), (2048, 1, 2), (4096, 1, 4), (8191, 8, 1), (8192 - 64, 8, 1), (8192, 8, 8)),
    ],
)
def test_how_many_parts(length, heads, parts):
    """As many as find a multiprocessor for each of their blocks, all alike and not too short."""
    q = jax.ShapeDtypeStruct((1, -(-length // 8) * 8, heads, 128), jnp.bfloat16)
    assert hopper._parts(q, length, jnp.zeros(heads), None).count == parts


@needs_newer_interpreter
def test_parts_in_the_kernels(monkeypatch):
    monkeypatch.setattr(hopper_parts, "SHORTEST", 64)
    rows = ((100, 120, -36),)
    check(monkeypatch, Case(length=256, heads=1, key_size=64, slopes="layer 40", rows=rows, initial=True))


@needs_newer_interpreter
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_between_parts(reverse, packed):
    """Heads that remember everything, 88 tokens and one: what no longer counts is not read, and nothing is missing."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(3, 192, 3, 64)), jnp.bfloat16) for _ in range(2))
    log_decay = jnp.array([-1e-4, -1.0, -60.0])
    rows = ((192,), (100, 40, -52), (64, 128))
    ids = Case(length=192, heads=3, key_size=64, rows=rows).segment_ids if packed else None
    options = dict(parts=3, reverse=reverse, interpret=True)
    truth = reference_sums(k, v, log_decay, ids, reverse).mT[slice(1, None) if reverse else slice(-1)]
    sums = hopper_sums.state_sums(k, v, log_decay, ids, forget_below=0.0, **options)
    assert_close("sums", sums, truth, 3e-3)
    # What has a smaller weight than this may go; at 1e-4 a token the first head loses nothing.
    some = hopper_sums.state_sums(k, v, log_decay, ids, forget_below=1e-9, **options)
    assert_close("sums", some, truth, 3e-3)


def test_what_heads_remember():
    tokens = hopper_sums.remembered(jnp.array([0.0, -1e-4, -1.0]), 0.0)
    assert tokens[0] == jnp.inf
    np.testing.assert_allclose(tokens[1:], [873365.4, 87.33654], rtol=1e-5)
    np.testing.assert_allclose(hopper_sums.remembered(jnp.array([-1.0]), 1e-6), [13.8155], rtol=1e-5)


@needs_newer_interpreter
def test_races_are_found(monkeypatch):
    """Else the tests above would show little: without the fences, products race with what other threads write."""
    monkeypatch.setattr(hopper_scan.plgpu, "commit_smem", lambda: None)
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    with pytest.raises(Exception, match=r"(?i)race"):
        jax.block_until_ready(hopper.forward(q, q, q, jnp.zeros(1), None, None, interpret=True))


def test_says_why_not():
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="needs an NVIDIA Hopper GPU, and this program is for cpu"):
        lightning_attention(q, q, q, jnp.zeros(2), implementation="hopper")


@pytest.fixture
def on_an_h200(monkeypatch):
    monkeypatch.setattr(_hopper.target, "target_platform", lambda: "gpu")
    monkeypatch.setattr(_hopper.target, "device_kind", lambda: "NVIDIA H200")


@pytest.mark.usefixtures("on_an_h200")
def test_says_which_dtypes_and_sizes():
    q = jnp.zeros((1, 8, 2, 64))
    with pytest.raises(ValueError, match=r"takes bfloat16.*TF32"):
        lightning_attention(q, q, q, jnp.zeros(2), implementation="hopper")
    q, v = jnp.zeros((1, 8, 2, 64), jnp.bfloat16), jnp.zeros((1, 8, 2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"size 64 or 128.*got K = 64, V = 128"):
        lightning_attention(q, q, v, jnp.zeros(2), implementation="hopper")
    q, pool = jnp.zeros((3, 2, 32)), jnp.zeros((3, 2, 32, 32))
    with pytest.raises(ValueError, match=r"size 64 or 128.*got K = 32, V = 32"):
        lightning_attention_decode(q, q, q, jnp.zeros(2), pool, jnp.arange(3), implementation="hopper")


def test_says_which_chips(monkeypatch):
    monkeypatch.setattr(_hopper.target, "target_platform", lambda: "gpu")
    monkeypatch.setattr(_hopper.target, "device_kind", lambda: "NVIDIA B200")
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="NVIDIA B200"):
        lightning_attention(q, q, q, jnp.zeros(2), implementation="hopper")
