"""What the op refuses, and how it says so."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import softmax_attention_decode

B, HQ, HKV, D, P, S, N = 2, 4, 2, 16, 5, 8, 3


def arguments(**changes):
    usual = {
        "q": jnp.zeros((B, HQ, D)),
        "keys": jnp.zeros((P, S, HKV, D)),
        "values": jnp.zeros((P, S, HKV, D)),
        "pages": jnp.zeros((B, N), jnp.int32),
        "lengths": jnp.zeros(B, jnp.int32),
    }
    return usual | changes


def pools(*shape, dtype="float32"):
    return {"keys": jnp.zeros(shape, dtype), "values": jnp.zeros(shape, dtype)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.zeros((B, 1, HQ, D))}, ValueError, "q must be [B,Hq,D], no axis empty: got [2, 1, 4, 16]"),
        ({"q": jnp.zeros((B, HQ, D), jnp.float16)}, TypeError, "q must be float32 or bfloat16: got float16"),
        (pools(P, S, D), ValueError, "keys must be [P,S,Hkv,D], no axis empty: got [5, 8, 16]"),
        (pools(P, S, HKV, D + 1), ValueError, "keys must be [P,S,Hkv,D], D like q's = [5, 8, 2, 16]: got"),
        (pools(P, S, HKV, D, dtype="bfloat16"), TypeError, "keys must be float32: got bfloat16"),
        (pools(P, S, 3, D), ValueError, "keys must have a number of heads that divides q's 4: got 3"),
        ({"values": jnp.zeros((P, S + 1, HKV, D))}, ValueError, "values must be [P,S,Hkv,D], like keys"),
        ({"pages": jnp.zeros(B, jnp.int32)}, ValueError, "pages must be [B,n], no axis empty: got [2]"),
        ({"pages": jnp.zeros((B + 1, N), jnp.int32)}, ValueError, "pages must be [B,n] = [2, 3]: got [3, 3]"),
        ({"pages": jnp.zeros((B, N))}, TypeError, "pages must be int32: got float32"),
        ({"lengths": jnp.zeros((B, 1), jnp.int32)}, ValueError, "lengths must be [B] = [2]: got [2, 1]"),
        ({"lengths": jnp.zeros(B)}, TypeError, "lengths must be int32: got float32"),
    ],
)
def test_shapes_and_dtypes_are_checked_while_tracing(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda a: softmax_attention_decode(**a), arguments(**changes))


@pytest.mark.parametrize("length", [-1, N * S + 1])
def test_lengths_out_of_range(length):
    with pytest.raises(ValueError, match="lengths must be 0 to 24, what 3 pages hold"):
        softmax_attention_decode(**arguments(lengths=jnp.array([0, length], jnp.int32)))


@pytest.mark.parametrize("page", [-1, P])
def test_pages_out_of_range(page):
    pages = jnp.array([[0, 1, page], [2, page, page]], jnp.int32)
    softmax_attention_decode(**arguments(pages=pages, lengths=jnp.array([2 * S, S], jnp.int32)))
    with pytest.raises(ValueError, match="pages must be those of a pool that has 5"):
        softmax_attention_decode(**arguments(pages=pages, lengths=jnp.array([2 * S, S + 1], jnp.int32)))


def test_unknown_implementation():
    with pytest.raises(ValueError, match="softmax_attention_decode: implementation must be 'auto' or one of"):
        softmax_attention_decode(**arguments(), implementation="fast")
