"""What the ops refuse, and how they say so."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PADDING, lightning_attention, lightning_attention_decode

B, T, H, K, V = 2, 8, 3, 4, 5


def arguments(**changes):
    usual = {
        "q": jnp.zeros((B, T, H, K)),
        "k": jnp.zeros((B, T, H, K)),
        "v": jnp.zeros((B, T, H, V)),
        "log_decay": jnp.full(H, -0.5),
    }
    return usual | changes


def decode_arguments(**changes):
    usual = {
        "q": jnp.zeros((B, H, K)),
        "k": jnp.zeros((B, H, K)),
        "v": jnp.zeros((B, H, V)),
        "log_decay": jnp.full(H, -0.5),
        "pool": jnp.zeros((6, H, K, V)),
        "slots": jnp.array([3, -1], jnp.int32),
    }
    return usual | changes


SHAPES_AND_DTYPES = [
    ({"q": jnp.zeros((T, H, K))}, ValueError, "q must be [B,T,H,K]"),
    ({"q": jnp.zeros((B, 0, H, K))}, ValueError, "q must be [B,T,H,K], no axis empty"),
    ({"q": jnp.zeros((B, T, H, K), jnp.int32)}, TypeError, "q must be float32 or bfloat16: got int32"),
    ({"k": jnp.zeros((B, T, 1, K))}, ValueError, "k must be [B,T,H,K], like q = [2, 8, 3, 4]: got [2, 8, 1, 4]"),
    ({"v": jnp.zeros((B, T + 1, H, V))}, ValueError, "v must be [B,T,H,V]"),
    ({"v": jnp.zeros((B, T, H, V), jnp.bfloat16)}, TypeError, "v must be float32: got bfloat16"),
    ({"log_decay": jnp.zeros(H + 1)}, ValueError, "log_decay must be [H] = [3]: got [4]"),
    ({"log_decay": jnp.zeros(H, jnp.bfloat16)}, TypeError, "log_decay must be float32: got bfloat16"),
    ({"initial_state": jnp.zeros((B, H, V, K))}, ValueError, "initial_state must be [B,H,K,V]"),
    ({"initial_state": jnp.zeros((B, H, K, V), jnp.bfloat16)}, TypeError, "initial_state must be float32"),
    ({"segment_ids": jnp.zeros((B, 1), jnp.int32)}, ValueError, "segment_ids must be [B,T]"),
    ({"segment_ids": jnp.zeros((B, T))}, TypeError, "segment_ids must be int32"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SHAPES_AND_DTYPES)
def test_shapes_and_dtypes_are_checked_while_tracing(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda a: lightning_attention(**a), arguments(**changes))


@pytest.mark.parametrize("value", [0.1, np.nan, -np.inf])
def test_log_decay_that_is_no_decay(value):
    with pytest.raises(ValueError, match="log_decay must be finite and <= 0"):
        lightning_attention(**arguments(log_decay=jnp.array([-1, value, -1], jnp.float32)))


def test_segment_ids_that_go_down():
    ids = np.zeros((B, T), np.int32)
    ids[1, :3] = PADDING
    with pytest.raises(ValueError, match="segment_ids must not go down along T"):
        lightning_attention(**arguments(segment_ids=jnp.asarray(ids)))


def test_implementations_that_cannot_run_say_why():
    with pytest.raises(ValueError, match="'auto' or one of"):
        lightning_attention(**arguments(), implementation="triton")
    with pytest.raises(ValueError, match="'tpu' cannot run here: it needs a TPU"):
        lightning_attention(**arguments(), implementation="tpu")
    with pytest.raises(ValueError, match="'tpu' cannot run here: it needs a TPU"):
        lightning_attention_decode(**decode_arguments(), implementation="tpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.zeros((B, 1, H, K))}, ValueError, "q must be [N,H,K]"),
        ({"pool": jnp.zeros((6, H, K))}, ValueError, "pool must be [P,H,K,V]"),
        ({"pool": jnp.zeros((6, H, K, V), jnp.bfloat16)}, TypeError, "pool must be float32"),
        ({"slots": None}, ValueError, "pool must be [N,H,K,V] (no slots are given) = [2"),
        ({"slots": jnp.zeros(B + 1, jnp.int32)}, ValueError, "slots must be [N] = [2]"),
        ({"slots": jnp.zeros(B)}, TypeError, "slots must be int32"),
        ({"slots": jnp.array([4, 4], jnp.int32)}, ValueError, "slots must be distinct rows of the pool"),
        ({"slots": jnp.array([0, 6], jnp.int32)}, ValueError, "slots must be distinct rows of the pool, which has 6"),
    ],
)
def test_decode_checks_its_arguments(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lightning_attention_decode(**decode_arguments(**changes))


def test_decode_without_slots():
    """Sequence n has row n."""
    random = np.random.default_rng(0)
    shapes = {"q": (B, H, K), "k": (B, H, K), "v": (B, H, V), "pool": (B, H, K, V)}
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    found, expected = (
        lightning_attention_decode(**decode_arguments(slots=slots, **{n: jnp.asarray(a) for n, a in arrays.items()}))
        for slots in (None, jnp.arange(B, dtype=jnp.int32))
    )
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


def test_decode_takes_the_pool():
    pool = jnp.ones((6, H, K, V))
    _, advanced = lightning_attention_decode(**decode_arguments(pool=pool))
    assert pool.is_deleted()
    assert advanced.shape == (6, H, K, V)
