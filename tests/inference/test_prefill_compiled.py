"""Reading a prompt touches the states of its rows, not the pool."""

import jax
import jax.numpy as jnp

from m1jax.model import parallel
from m1jax.model.cache import LightningCache
from tests.pallas_kernels.h200 import compile_for_h200


def test_the_pool_of_states_is_not_copied(tmp_path, monkeypatch):
    layers, slots, heads, size = 3, 64, 4, 64
    monkeypatch.setattr(parallel, "ambient_mesh", lambda: None)  # that of compile_for_h200 only names the chip

    def read(state, q, k, v, at):
        def layer(number, carry):
            q, cache = carry
            return cache.attend(number, q, k, v, jnp.full(heads, -0.1), at, None)

        return jax.lax.fori_loop(0, layers, layer, (q, LightningCache(state)))

    tokens = ((1, 128, heads, size), "bfloat16")
    pool = ((layers, slots, heads, size, size), "float32")
    compiled, _ = compile_for_h200(read, pool, tokens, tokens, tokens, ((1,), "int32"), dump=tmp_path, donate_argnums=0)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * layers * slots * heads * size**2
