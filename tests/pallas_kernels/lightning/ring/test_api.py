"""What the op refuses, and how it says so."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import lightning_attention_decode_ring

N, H, K, V, P, C = 2, 3, 4, 5, 6, 7


def arguments(**changes):
    usual = {
        "q": jnp.zeros((N, H, K)),
        "k": jnp.zeros((N, H, K)),
        "v": jnp.zeros((N, H, V)),
        "log_decay": jnp.full(H, -0.5),
        "pool": jnp.zeros((P, H, K, V)),
        "keys": jnp.zeros((P, H, C, K)),
        "values": jnp.zeros((P, H, C, V)),
        "counts": jnp.array([0, C - 1], jnp.int32),
        "slots": jnp.array([3, -1], jnp.int32),
    }
    return usual | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.zeros((N, 1, H, K))}, ValueError, "q must be [N,H,K]"),
        ({"log_decay": jnp.full(H, 0.5)}, ValueError, "log_decay must be finite and <= 0"),
        ({"pool": jnp.zeros((P, H, V, K))}, ValueError, "pool must be [P,H,K,V] = [6, 3, 4, 5]: got [6, 3, 5, 4]"),
        ({"keys": jnp.zeros((P, C, H, K))}, ValueError, "keys must be [P,H,C,K]"),
        ({"keys": jnp.zeros((P, H, C, K), jnp.bfloat16)}, TypeError, "keys must be float32: got bfloat16"),
        ({"values": jnp.zeros((P, H, C + 1, V))}, ValueError, "values must be [P,H,C,V] = [6, 3, 7, 5]"),
        ({"counts": jnp.zeros(N)}, TypeError, "counts must be int32"),
        ({"counts": jnp.array([0, C], jnp.int32)}, ValueError, "counts must be 0 to 6, one less than keys hold"),
        ({"slots": jnp.zeros(N + 1, jnp.int32)}, ValueError, "slots must be [N] = [2]"),
        ({"slots": jnp.array([4, 4], jnp.int32)}, ValueError, "slots must be distinct rows of the pool, which has 6"),
    ],
)
def test_arguments_are_checked(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lightning_attention_decode_ring(**arguments(**changes))


def test_unknown_implementation():
    with pytest.raises(ValueError, match="lightning_attention_decode_ring: implementation must be 'auto' or one of"):
        lightning_attention_decode_ring(**arguments(), implementation="fast")


def test_takes_the_pools():
    given = arguments()
    _, *pools = lightning_attention_decode_ring(**given)
    for name, new in zip(("pool", "keys", "values"), pools, strict=True):
        assert given[name].is_deleted()
        assert new.shape == given[name].shape


def test_a_scan_over_layers_copies_nothing():
    """States and tokens of all layers are three pools, which a loop carries."""
    layers, heads, size, room = 4, 2, 64, 8

    def step(q, log_decay, pool, keys, values, counts, slots):
        def layer(carry, index):
            q, *pools = carry
            return lightning_attention_decode_ring(q, q, q, log_decay, *pools, counts, slots + index * N), None

        return jax.lax.scan(layer, (q, pool, keys, values), jnp.arange(layers, dtype=jnp.int32))[0]

    pool, ring = jnp.zeros((layers * N, heads, size, size)), jnp.zeros((layers * N, heads, room, size))
    counts = jnp.zeros(N, jnp.int32)
    jitted = jax.jit(step, donate_argnums=(2, 3, 4))
    text = jitted.lower(jnp.zeros((N, heads, size)), jnp.zeros(heads), pool, ring, ring, counts, counts).compile()
    assert not re.findall(r"= f32\[8,2,64,64\]\S* copy\(", text.as_text())
