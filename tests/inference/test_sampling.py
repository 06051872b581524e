import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.collectives import collectives
from m1jax.inference.sampling import sample
from m1jax.sharding import make_mesh

LOGITS = jnp.log(jnp.array([0.3, 0.5, 0.05, 0.15]))
ROWS = 20_000


draw = jax.jit(sample)


def drawn(logits, seed=0, temperature=1.0, top_p=1.0):
    rows = len(logits)
    keys = jax.random.split(jax.random.key(seed), rows)
    return draw(logits, keys, temperature=jnp.full(rows, temperature), top_p=jnp.full(rows, top_p))


def frequencies(**options):
    found = drawn(jnp.tile(LOGITS, (ROWS, 1)), **options)
    return np.bincount(found.tokens, minlength=4) / ROWS, found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution_and_log_probabilities(temperature):
    expected = np.array([0.3, 0.5, 0.05, 0.15]) ** (1 / temperature)
    expected /= expected.sum()
    frequency, found = frequencies(temperature=temperature)
    np.testing.assert_allclose(frequency, expected, atol=4 * np.sqrt(0.25 / ROWS))
    np.testing.assert_allclose(found.logp, np.log(expected)[found.tokens], rtol=1e-5)
    np.testing.assert_array_equal(found.nucleus_logp, found.logp)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, [1]), (0.79, [0, 1]), (0.81, [0, 1, 3]), (1.0, [0, 1, 2, 3])])
def test_nucleus(top_p, kept):
    expected = np.where(np.isin(np.arange(4), kept), [0.3, 0.5, 0.05, 0.15], 0)
    frequency, found = frequencies(top_p=top_p)
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=4 * np.sqrt(0.25 / ROWS))
    assert set(np.unique(found.tokens)) <= set(kept)
    # Those of the policy, not of the cut distribution: they are what training compares with.
    np.testing.assert_allclose(found.logp, np.asarray(LOGITS)[found.tokens], rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.nucleus_logp), (expected / expected.sum())[found.tokens], rtol=1e-5)


def sorted_nucleus(logits, u, top_p):
    """The definition: sort (equal ones by index), cut, invert in the order of ids, the least probable ones last;
    float64."""
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    order = np.argsort(-probs, axis=-1, kind="stable")
    ranked = np.take_along_axis(probs, order, -1)
    before = np.cumsum(ranked, -1) - ranked
    kept = np.zeros_like(probs)
    np.put_along_axis(kept, order, np.where(before < top_p, ranked, 0), -1)
    least = np.min(kept, -1, where=kept > 0, initial=1, keepdims=True)
    ids = np.argsort(kept == least, axis=-1, kind="stable")
    ranked = np.take_along_axis(kept, ids, -1)
    rank = np.argmax(np.cumsum(ranked, -1) > u[:, None] * ranked.sum(-1, keepdims=True), -1)
    return ids[np.arange(len(rank)), rank], kept.sum(-1)


@hypothesis.given(
    st.integers(0, 1000), st.sampled_from([0.01, 0.3, 0.9, 0.95, 0.999]), st.sampled_from([0.0, 1.0, 8.0])
)
def test_nucleus_as_if_sorted(seed, top_p, spread):
    """Spread 0: all tokens are equally probable, and the first of them are kept."""
    logits = spread * jax.random.normal(jax.random.key(seed), (64, 293))
    found = drawn(logits, seed, top_p=top_p)
    u = np.asarray(jax.vmap(jax.random.uniform)(jax.random.split(jax.random.key(seed), 64)))
    tokens, mass = sorted_nucleus(logits, u, np.float32(top_p))
    ours = np.exp(found.logp - found.nucleus_logp)
    other = ~np.isclose(ours, mass, rtol=1e-4)  # one sum reaches top_p and the other misses it, by a rounding
    np.testing.assert_allclose(np.minimum(ours, mass)[other], top_p, rtol=1e-6)
    assert np.mean(other) <= 1 / 64
    assert np.mean(np.asarray(found.tokens) != tokens) <= 1 / 64  # u may fall on a border to within rounding


@pytest.mark.parametrize(("top_p", "cuts"), [([0.5, 1.0, 0.9], True), ([1.0, 1.0, 1.0], False)])
def test_what_is_known_beforehand_changes_nothing(top_p, cuts):
    logits, keys = 3 * jax.random.normal(jax.random.key(0), (3, 300)), jax.random.split(jax.random.key(1), 3)
    options = {"temperature": jnp.ones(3), "top_p": jnp.array(top_p)}
    known = jax.jit(functools.partial(sample, cuts=cuts))(logits, keys, **options)
    jax.tree.map(np.testing.assert_array_equal, known, draw(logits, keys, **options))


def test_temperature_zero_is_greedy():
    frequency, found = frequencies(temperature=0.0, top_p=0.2)
    assert frequency[1] == 1
    np.testing.assert_allclose(found.logp, np.log(0.5), rtol=1e-5)
    np.testing.assert_array_equal(found.nucleus_logp, found.logp)


@pytest.mark.parametrize("top_p", [1.0, 0.99999])
def test_impossible_tokens_are_never_drawn(top_p):
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0, -jnp.inf]])
    found = drawn(jnp.tile(logits, (ROWS, 1)), 1, top_p=top_p)
    assert set(np.unique(found.tokens).tolist()) == {1, 3}


def test_rows_do_not_depend_on_one_another():
    logits = 3 * jax.random.normal(jax.random.key(0), (8, 300))
    keys = jax.random.split(jax.random.key(1), 8)
    temperature = jnp.array([0.0, 1.0, 0.5, 1.0, 2.0, 1.0, 0.0, 1.0])
    top_p = jnp.array([0.9, 1.0, 0.9, 0.5, 1.0, 0.99, 1.0, 1.0])
    together = draw(logits, keys, temperature=temperature, top_p=top_p)
    for i in range(8):
        same = np.full(8, i)
        alone = draw(logits[same], keys[same], temperature=temperature[same], top_p=top_p[same])
        assert jax.tree.map(lambda x: x[7].item(), alone) == jax.tree.map(lambda x, i=i: x[i].item(), together)


def test_a_vocabulary_cut_over_a_mesh():
    """Each device draws for some rows, of which it has all words: nothing goes along a vocabulary that is cut."""
    rows, mesh = 8, make_mesh("data=2,tensor=2", jax.devices()[:4])
    logits = jax.random.normal(jax.random.key(0), (rows, 64))
    arguments = dict(keys=jax.random.split(jax.random.key(1), rows), temperature=jnp.ones(rows), top_p=jnp.ones(rows))
    want = draw(logits, **arguments)
    with jax.set_mesh(mesh):
        cut = jax.device_put(logits, jax.NamedSharding(mesh, jax.P("data", "tensor")))
        program = jax.jit(sample).lower(cut, **arguments).compile()
        got = program(cut, **arguments)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logp, want.logp, rtol=1e-6)
    assert sum(c.bytes for c in collectives(program)) <= logits.nbytes // 2
