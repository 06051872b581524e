"""What the op refuses, and how it says so."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PADDING, softmax_attention

B, T, HQ, HKV, D = 2, 8, 4, 2, 16


def arguments(**changes):
    usual = {"q": jnp.zeros((B, T, HQ, D)), "k": jnp.zeros((B, T, HKV, D)), "v": jnp.zeros((B, T, HKV, D))}
    return usual | changes


def keys(*shape, dtype="float32"):
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


START = {"q_start": jnp.zeros(B, jnp.int32)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.zeros((T, HQ, D))}, ValueError, "q must be [B,T,Hq,D], no axis empty: got [8, 4, 16]"),
        ({"q": jnp.zeros((B, 0, HQ, D))}, ValueError, "q must be [B,T,Hq,D], no axis empty"),
        ({"q": jnp.zeros((B, T, HQ, D), jnp.int32)}, TypeError, "q must be float32, bfloat16 or float16: got int32"),
        (keys(T, HKV, D), ValueError, "k must be [B,S,Hkv,D], no axis empty: got [8, 2, 16]"),
        (keys(B, T, HKV, D + 1), ValueError, "k must be [B,T,Hkv,D] (without q_start"),
        (keys(B, T + 1, HKV, D), ValueError, "= [2, 8, 2, 16]: got [2, 9, 2, 16]"),
        (keys(B + 1, T + 1, HKV, D) | START, ValueError, "k must be [B,S,Hkv,D] = [2, 9, 2, 16]: got [3, 9, 2, 16]"),
        (keys(B, T, HKV, D, dtype="bfloat16"), TypeError, "k must be float32: got bfloat16"),
        (keys(B, T, 3, D), ValueError, "k must have a number of heads that divides q's 4: got 3"),
        ({"v": jnp.zeros((B, T, HKV, D + 1))}, ValueError, "v must be [B,S,Hkv,D], like k"),
        ({"v": jnp.zeros((B, T, HKV, D), jnp.bfloat16)}, TypeError, "v must be float32: got bfloat16"),
        ({"segment_ids": jnp.zeros((B, 1), jnp.int32)}, ValueError, "segment_ids must be [B,T] = [2, 8]: got [2, 1]"),
        ({"segment_ids": jnp.zeros((B, T))}, TypeError, "segment_ids must be int32: got float32"),
        ({"segment_ids": jnp.zeros((B, T), jnp.int32)} | START, ValueError, "segment_ids and q_start cannot be given"),
        ({"q_start": jnp.zeros((B, 1), jnp.int32)}, ValueError, "q_start must be [B] = [2]: got [2, 1]"),
        ({"q_start": jnp.zeros(B)}, TypeError, "q_start must be int32: got float32"),
    ],
)
def test_shapes_and_dtypes_are_checked_while_tracing(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda a: softmax_attention(**a), arguments(**changes))


def test_segment_ids_that_go_down():
    ids = np.zeros((B, T), np.int32)
    ids[1, :3] = PADDING
    with pytest.raises(ValueError, match="segment_ids must not go down along T"):
        softmax_attention(**arguments(segment_ids=jnp.asarray(ids)))


@pytest.mark.parametrize("start", [-1, T])
def test_q_start_outside_the_cache(start):
    with pytest.raises(ValueError, match="q_start must be positions in the cache, 0 to 7"):
        softmax_attention(**arguments(q_start=jnp.array([0, start], jnp.int32)))


def test_unknown_implementation():
    with pytest.raises(ValueError, match="implementation must be 'auto' or one of"):
        softmax_attention(**arguments(), implementation="fast")
