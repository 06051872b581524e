"""What every implementation of decoding with a ring must pass: a subclass names it and inherits the tests.

Everything goes through the public op. The truth is the recurrence in float64.
"""

import functools
import importlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import lightning_attention_decode_ring
from tests.pallas_kernels.lightning.suite import Case, assert_close


class RingSuite:
    """The tests of one implementation; see the module's docstring."""

    implementation: ClassVar[str]
    options: ClassVar[dict] = {}
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    tolerances: ClassVar[dict[str, float]] = {"float32": 1e-5, "bfloat16": 3e-3}
    """Relative RMS error of outputs; of states 1e-5 always: they are float32."""
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((1, 1, 64, 8), (5, 3, 64, 16), (7, 2, 128, 32))
    """(sequences, heads, head size, room)"""

    def pytest_generate_tests(self, metafunc):
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", self.shapes, ids=lambda s: "N{}-H{}-d{}-C{}".format(*s))
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes)

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        if self.options:
            module = importlib.import_module(f"pallas_kernels.lightning.ring.{self.implementation}")
            monkeypatch.setattr(module, "decode", functools.partial(module.decode, **self.options))
            monkeypatch.setattr(module, "unsupported", lambda *arrays: None)

    def op(self):
        function = functools.partial(lightning_attention_decode_ring, implementation=self.implementation)
        return jax.jit(function, donate_argnums=(4, 5, 6))

    def test_one_token(self, shape, dtype):
        """Sequences with any number of tokens since their states, some of them full, every third idle; rows to spare.

        No number stands where no token is, and none in the spare rows.
        """
        sequences, heads, size, room = shape
        random = np.random.default_rng(0)

        def normal(*shape):
            return random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)

        q, k, v = (normal(sequences, heads, size) for _ in range(3))
        pool = random.standard_normal((sequences + 2, heads, size, size), np.float32)
        slots = random.permutation(sequences + 2)[:sequences].astype(np.int32)
        slots[1::3] = -1 - slots[1::3]
        counts = random.integers(0, room, sequences).astype(np.int32)
        counts[::4] = room - 1
        keys, values = (np.full((sequences + 2, heads, room, size), np.nan, np.float32) for _ in range(2))
        log_decay = Case(length=1, heads=heads, key_size=size, slopes="layer 40").log_decay
        lam = np.exp(log_decay.astype(np.float64))[:, None, None]

        truth_o, truth_pool = np.zeros(q.shape), pool.astype(np.float64)
        for n, (slot, count) in enumerate(zip(slots, counts)):
            if slot < 0:
                continue
            keys[slot, :, :count], values[slot, :, :count] = (normal(heads, count, size) for _ in range(2))
            state = truth_pool[slot]
            for j in range(count + 1):
                key, value = (k[n], v[n]) if j == count else (keys[slot, :, j], values[slot, :, j])
                state = lam * state + key.astype(np.float64)[:, :, None] * value[:, None, :]
            truth_o[n] = (q[n][:, None, :] @ state)[:, 0]
            if count == room - 1:
                truth_pool[slot] = state

        given = [jnp.asarray(x, dtype) for x in (q, k, v)]
        rings = [jnp.asarray(x, dtype) for x in (keys, values)]
        o, new_pool, new_keys, new_values = self.op()(*given, log_decay, jnp.asarray(pool), *rings, counts, slots)
        assert o.dtype == new_keys.dtype == new_values.dtype == dtype
        assert_close("o", np.asarray(o, np.float32)[:, None], truth_o[:, None], self.tolerances[dtype])
        assert_close("final_state", new_pool, truth_pool, 1e-5)
        assert not np.asarray(o, np.float32)[slots < 0].any()
        written = [slots[n] for n in range(sequences) if slots[n] >= 0 and counts[n] == room - 1]
        untouched = np.setdiff1d(np.arange(sequences + 2), written)
        np.testing.assert_array_equal(np.asarray(new_pool)[untouched], pool[untouched])
        for old, new, token in ((keys, new_keys, k), (values, new_values, v)):
            for n, (slot, count) in enumerate(zip(slots, counts)):
                if slot >= 0 and count < room - 1:  # of a full one nothing is read any more
                    old[slot, :, count] = token[n]
            kept = np.setdiff1d(np.arange(sequences + 2), written)
            np.testing.assert_array_equal(np.asarray(new, np.float32)[kept], old[kept])

    def test_many_tokens_and_some_taken_back(self):
        """Three sequences that fold at different times; after each token another one is tried and taken back."""
        steps, heads, size, room = 11, 2, 64, 8
        random = np.random.default_rng(1)
        q, k, v = (random.standard_normal((steps, 2, 3, heads, size), np.float32) for _ in range(3))
        log_decay = Case(length=1, heads=heads, key_size=size, slopes="layer 40").log_decay
        pool = jnp.zeros((3, heads, size, size))
        dtype = self.dtypes[0]
        keys, values = (jnp.zeros((3, heads, room, size), dtype) for _ in range(2))
        counts, slots = np.array([0, 3, 6], np.int32), np.arange(3, dtype=np.int32)
        # Zeros stand in the rings of the second and third, so all three begin with nothing.
        state, lam = np.zeros((3, heads, size, size)), np.exp(log_decay.astype(np.float64))[:, None, None]
        q, k, v = (np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in (q, k, v))
        outputs, truths, op = [], [], self.op()
        for step in range(steps):
            for kept in range(2):
                token = [jnp.asarray(x[step, kept], dtype) for x in (q, k, v)]
                # What folds cannot be taken back: such a sequence sits out the trial.
                where = np.where((counts == room - 1) & (kept == 0), -1, slots).astype(np.int32)
                o, pool, keys, values = op(*token, log_decay, pool, keys, values, counts, where)
            state = lam * state + k[step, 1][..., :, None] * v[step, 1][..., None, :].astype(np.float64)
            truths.append((q[step, 1][..., None, :] @ state)[..., 0, :])
            outputs.append(np.asarray(o, np.float32))
            counts = (counts + 1) % room
        assert_close("o", np.stack(outputs, 1), np.stack(truths, 1), self.tolerances[dtype])

    def test_decay_near_one(self):
        """As in M1's late layers: what a rounded lam loses, it loses to the same side each of many times."""
        slopes = np.array([1e-3, 4.95e-5, 1e-5, 1e-6], np.float32)
        room = 8
        pool = np.random.default_rng(0).uniform(0.5, 2, (1, len(slopes), 64, 64)).astype(np.float32)
        nothing = jnp.zeros((1, len(slopes), 64), self.dtypes[0])
        ring = [jnp.zeros((1, len(slopes), room, 64), self.dtypes[0]) for _ in range(2)]
        full, slot = np.full(1, room - 1, np.int32), np.zeros(1, np.int32)
        _, new, _, _ = self.op()(nothing, nothing, nothing, -slopes, jnp.asarray(pool), *ring, full, slot)
        lost = 1 - (np.asarray(new, np.float64) / pool).mean((0, 2, 3))
        # The mean over 4,096 numbers, each rounded once to 2^-24 at most.
        np.testing.assert_allclose(lost, -np.expm1(-room * slopes.astype(np.float64)), rtol=0, atol=3e-9)
