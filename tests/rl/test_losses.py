"""Losses against a float64 oracle, verl and TRL, gradients by hand, and what they must not depend on."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.errors import UserError
from m1jax.rl import losses
from m1jax.rl.advantages import Advantages
from m1jax.rl.aggregation import Responses
from m1jax.rl.conventions import CONVENTIONS, cispo
from m1jax.rl.losses import policy_loss
from m1jax.rl.recipe import LossRecipe
from m1jax.train.statistics import merge, on_host, values

# For tests with shapes of their own: one program for each instead of one for each operation.
compiled_loss = jax.jit(policy_loss, static_argnums=0)
compiled_gradient = jax.jit(jax.value_and_grad(policy_loss, argnums=1, has_aux=True), static_argnums=0)
B, T = 6, 9
PROMPTS = np.array([0, 0, 1, 1, 1, 2])


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logp = -rng.exponential(1.0, (B, T))
    old_logp = logp + rng.normal(0, 1.5, (B, T))
    lengths = np.array([9, 3, 5, 1, 9, 4])
    mask = np.arange(T) < lengths[:, None]
    return logp, old_logp, rng.normal(size=B), mask


def responses(mask, prompts):
    tokens = mask.sum(axis=1)
    return Responses(tokens=tokens, prompts=prompts, batch_tokens=int(tokens.sum()), updates=1, limit=mask.shape[1])


def arrays(batch, prompts=PROMPTS, convention="paper"):
    """(logp, old_logp, advantage, mask, weight) as the loss takes them."""
    logp, old_logp, advantage, mask = batch
    weight = mask * CONVENTIONS[convention].aggregation(responses(mask, prompts))[:, None]
    rest = (old_logp, np.broadcast_to(advantage[:, None], mask.shape), mask, weight)
    return tuple(jnp.asarray(x) for x in (logp, *rest))


def cispo_loss(*arrays, **bounds):
    return policy_loss(partial(losses.cispo, **bounds), *arrays)


def oracle(logp, old_logp, advantage, mask, prompts, max_weight, min_weight=0.0):
    """Equation 4 read literally, prompt by prompt; returns the loss and its gradient in logp."""
    loss, grad = 0.0, np.zeros_like(logp)
    groups = np.unique(prompts)
    for group in groups:
        rows = np.flatnonzero(prompts == group)
        normaliser = mask[rows].sum() * len(groups)
        for i in rows:
            for t in np.flatnonzero(mask[i]):
                weight = np.clip(np.exp(logp[i, t] - old_logp[i, t]), min_weight, max_weight)
                loss -= weight * advantage[i] * logp[i, t] / normaliser
                grad[i, t] = -weight * advantage[i] / normaliser
    return loss, grad


@pytest.mark.parametrize("bounds", [(0.0, 3.0), (0.0, 1.2), (0.5, 1.5)])
def test_value_and_gradient(batch, bounds):
    logp, *rest = arrays(batch)

    def loss(logp):
        return cispo_loss(logp, *rest, max_weight=bounds[1], min_weight=bounds[0])

    (value, stats), grad = jax.value_and_grad(loss, has_aux=True)(logp)
    expected, expected_grad = oracle(*batch, prompts=PROMPTS, max_weight=bounds[1], min_weight=bounds[0])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Equal to the oracle's means: no gradient through the weight, and none missing at a clipped token.
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-9)
    mask, weights = batch[3], np.asarray(rest[3])
    assert (np.asarray(grad)[mask] != 0).all()
    ratio = np.exp(batch[0] - batch[1])
    stats = values(on_host(stats))
    np.testing.assert_allclose(
        stats["clipped"], (weights * ((ratio > bounds[1]) | (ratio < bounds[0]))).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(stats["ratio_max"], ratio[mask].max(), rtol=1e-5)
    np.testing.assert_allclose(stats["gap_max"], np.abs(np.log(ratio[mask])).max(), rtol=1e-5)
    np.testing.assert_allclose(stats["kl_k3"], (weights * (ratio - 1 - np.log(ratio))).sum(), rtol=1e-4)


def test_one_prompt_is_a_token_mean(batch):
    prompts = np.zeros(B, int)
    loss, _ = cispo_loss(*arrays(batch, prompts), max_weight=2.0)
    np.testing.assert_allclose(loss, oracle(*batch, prompts=prompts, max_weight=2.0)[0], rtol=1e-5)


def test_on_policy_gradient_is_reinforce(batch):
    logp, _, advantage, mask, weight = arrays(batch, np.zeros(B, int))
    grad = jax.grad(lambda x: cispo_loss(x, logp, advantage, mask, weight, max_weight=5.0)[0])(logp)
    np.testing.assert_allclose(grad, -advantage * mask / mask.sum(), rtol=1e-6)


def test_garbage_outside_the_mask_has_no_influence(batch):
    logp, old_logp, advantage, mask, weight = arrays(batch)

    def run(outside):
        def spoilt(x):
            return jnp.where(mask, x, outside)

        rest = (spoilt(old_logp), spoilt(advantage), mask, spoilt(weight))
        return jax.value_and_grad(lambda x: cispo_loss(x, *rest, max_weight=2.0), has_aux=True)(spoilt(logp))

    jax.tree.map(np.testing.assert_array_equal, run(0.0), run(jnp.nan))


def test_parts_add_up(batch):
    """Loss and statistics of a batch are those of its pieces, merged; in float32, weights from the whole."""
    taken = [np.asarray(x) for x in arrays(batch)]
    loss = partial(compiled_loss, partial(losses.cispo, max_weight=2.0))
    whole, stats = loss(*taken)
    parts = [loss(*(x[rows] for x in taken)) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole, rtol=1e-6)
    merged, want = values(on_host(merge(p[1] for p in parts))), values(on_host(stats))
    assert merged.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, err_msg=name)


def test_a_small_gap_is_measured():
    """At ratios near one, r - 1 - log r is smaller than the rounding of r."""
    gap = np.float32(1e-4)
    one = jnp.ones((1, 1))
    _, stats = compiled_loss(partial(losses.cispo, max_weight=2.0), one * gap, one * 0, one, one > 0, one)
    stats = values(on_host(stats))
    assert stats["kl_k3"] == pytest.approx(np.expm1(1e-4) - 1e-4, rel=1e-2)
    assert stats["gap_max"] == pytest.approx(1e-4, rel=1e-6)


GOLDEN = Path(__file__).parents[1] / "golden" / "rl_losses.npz"
PPO = partial(losses.ppo, low=0.2, high=0.2)
LIBRARIES = {
    "verl_cispo": (CONVENTIONS["verl"].objective, "verl"),
    "verl_vanilla": (partial(losses.ppo, low=0.2, high=0.28, dual=3.0), "dapo"),
    "verl_gspo": (partial(losses.gspo, low=0.1, high=0.15), "gspo"),
    "verl_dppo_tv": (CONVENTIONS["dppo-tv"].objective, "dppo-tv"),
    "verl_dppo_kl": (CONVENTIONS["dppo-kl"].objective, "dppo-kl"),
    "trl_cispo": (CONVENTIONS["trl"].objective, "trl"),
    "trl_grpo": (CONVENTIONS["grpo"].objective, "grpo"),
    "trl_dapo": (PPO, "dapo"),
    "trl_dr_grpo": (CONVENTIONS["dr-grpo"].objective, "dr-grpo"),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_as_verl_and_trl_have_it(name):
    """On arrays where every bound is met; golden/make_rl_losses.py ran their functions."""
    golden = np.load(GOLDEN)
    objective, convention = LIBRARIES[name]
    logp, *rest = arrays([golden[n] for n in ("logp", "old_logp", "advantage", "mask")], golden["prompts"], convention)
    (loss, stats), grad = jax.value_and_grad(lambda x: policy_loss(objective, x, *rest), has_aux=True)(logp)
    np.testing.assert_allclose(loss, golden[f"{name}_loss"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(grad, golden[f"{name}_grad"], rtol=1e-6, atol=1e-7)
    assert on_host(stats)["clipped"].value() > 0


def test_advantages_as_verl_and_trl_have_them():
    golden = np.load(GOLDEN)
    rewards, prompts = golden["rewards"], golden["prompts"]
    np.testing.assert_allclose(CONVENTIONS["verl"].advantages(rewards, prompts), golden["verl_advantages"], rtol=1e-6)
    groups = rewards.reshape(2, 3).astype(np.float64)
    trl = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(CONVENTIONS["trl"].advantages(rewards, prompts), trl.ravel(), rtol=1e-6)


@pytest.mark.parametrize("name", ["paper", "scalerl"])
def test_as_the_papers_have_it(name):
    """Those who publish no code: from rewards to the gradient, by their equations in float64, on the same arrays."""
    golden = np.load(GOLDEN)
    prompts, mask = golden["prompts"], golden["mask"]
    rewards, logp, old_logp = (golden[n].astype(np.float64) for n in ("rewards", "logp", "old_logp"))
    rewards[:3] += 1  # so that means differ between groups
    groups = [prompts == group for group in np.unique(prompts)]
    centred = rewards - sum(mine * rewards[mine].mean() for mine in groups)
    advantage = centred / (sum(mine * rewards[mine].std() for mine in groups) if name == "paper" else centred.std())
    want, want_grad = oracle(logp, old_logp, advantage, mask, prompts, 5.0)
    convention = CONVENTIONS[name]
    found = convention.advantages(rewards.astype(np.float32), prompts)
    taken = arrays([golden["logp"], golden["old_logp"], found, mask], prompts, name)
    loss, grad = jax.value_and_grad(lambda x: policy_loss(convention.objective, x, *taken[1:])[0])(taken[0])
    np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-6, atol=1e-7)


# One token each: ratio, advantage -> what the objective's gradient in log pi is; old probability 1/4 throughout.
BY_HAND = {
    "cispo up": (partial(losses.cispo, max_weight=2.0), 3.0, 1.5, 2.0 * 1.5),
    "cispo inside": (partial(losses.cispo, max_weight=2.0), 0.1, -1.5, 0.1 * -1.5),
    "cispo with a floor": (partial(losses.cispo, max_weight=2.0, min_weight=0.5), 0.1, -1.5, 0.5 * -1.5),
    "masked up, wanted": (partial(losses.masked_cispo, max_weight=2.0, min_weight=0.5), 3.0, 1.5, 0.0),
    "masked up, unwanted": (partial(losses.masked_cispo, max_weight=2.0, min_weight=0.5), 3.0, -1.5, 2.0 * -1.5),
    "masked down, unwanted": (partial(losses.masked_cispo, max_weight=2.0, min_weight=0.5), 0.1, -1.5, 0.0),
    "masked down, wanted": (partial(losses.masked_cispo, max_weight=2.0, min_weight=0.5), 0.1, 1.5, 0.5 * 1.5),
    "dispo right, up": (partial(losses.dispo, right=(0.5, 2.0), wrong=(0.1, 3.0)), 4.0, 1.5, 2.0 * 1.5),
    "dispo right, down": (partial(losses.dispo, right=(0.5, 2.0), wrong=(0.1, 3.0)), 0.01, 1.5, 0.5 * 1.5),
    "dispo wrong, up": (partial(losses.dispo, right=(0.5, 2.0), wrong=(0.1, 3.0)), 3.5, -1.5, 3.0 * -1.5),
    "dispo wrong, down": (partial(losses.dispo, right=(0.5, 2.0), wrong=(0.1, 3.0)), 0.01, -1.5, 0.1 * -1.5),
    "reinforce": (losses.reinforce, 3.0, 1.5, 1.5),
    "ppo up, wanted": (PPO, 1.5, 1.5, 0.0),
    "ppo up, unwanted": (PPO, 1.5, -1.5, 1.5 * -1.5),
    "ppo down, unwanted": (PPO, 0.5, -1.5, 0.0),
    "ppo down, wanted": (PPO, 0.5, 1.5, 0.5 * 1.5),
    "ppo inside": (PPO, 1.1, 1.5, 1.1 * 1.5),
    "ppo, dual": (partial(PPO, dual=2.0), 3.0, -1.5, 0.0),
    "gspo": (partial(losses.gspo, low=0.2, high=0.2), 1.1, 1.5, 1.1 * 1.5),
    "gspo, cut": (partial(losses.gspo, low=0.2, high=0.2), 1.5, 1.5, 0.0),
    # From 1/4 to 3/4 is a distance of 1/2, from 1/4 to 1/40 one of 9/40, whatever the ratio.
    "dppo up, wanted": (partial(losses.dppo, divergence="tv", low=0.2, high=0.2), 3.0, 1.5, 0.0),
    "dppo up, unwanted": (partial(losses.dppo, divergence="tv", low=0.2, high=0.2), 3.0, -1.5, 3.0 * -1.5),
    "dppo up a little": (partial(losses.dppo, divergence="tv", low=0.2, high=0.2), 1.7, 1.5, 1.7 * 1.5),
    "dppo down, unwanted": (partial(losses.dppo, divergence="tv", low=0.2, high=0.2), 0.1, -1.5, 0.0),
    "dppo down a little": (partial(losses.dppo, divergence="tv", low=0.25, high=0.2), 0.1, -1.5, 0.1 * -1.5),
    # KL of (1/4, 3/4) against (3/4, 1/4): 1/2 log 3 = 0.549.
    "dppo by KL": (partial(losses.dppo, divergence="kl", low=0.5, high=0.5), 3.0, 1.5, 0.0),
    "dppo by KL, inside": (partial(losses.dppo, divergence="kl", low=0.6, high=0.6), 3.0, 1.5, 3.0 * 1.5),
    "dppo, capped": (partial(losses.dppo, divergence="tv", low=1.0, high=1.0, max_weight=2.0), 3.0, 1.5, 2.0 * 1.5),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_gradients_by_hand(case):
    objective, ratio, advantage, want = BY_HAND[case]
    old = jnp.log(jnp.full((1, 1), 0.25))
    rest = (old, jnp.full((1, 1), advantage), jnp.ones((1, 1), bool), jnp.full((1, 1), 0.5))
    (_, stats), grad = jax.value_and_grad(lambda x: policy_loss(objective, x, *rest), has_aux=True)(old + np.log(ratio))
    np.testing.assert_allclose(grad[0, 0], -0.5 * want, rtol=1e-5, atol=1e-7)
    free = objective is losses.reinforce or want in (ratio * advantage,)
    assert on_host(stats)["clipped"].value() == (not free)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_at_the_first_update_all_losses_are_reinforce(batch, name):
    """At a ratio of one no bound has a say: the gradient is the advantage times the normaliser."""
    logp, _, advantage, mask, weight = arrays(batch)
    objective = CONVENTIONS[name].objective
    (_, stats), grad = jax.value_and_grad(
        lambda x: policy_loss(objective, x, logp, advantage, mask, weight), has_aux=True
    )(logp)
    np.testing.assert_allclose(grad, -advantage * weight, rtol=1e-6)
    assert on_host(stats)["clipped"].value() == 0


@pytest.mark.parametrize("name", CONVENTIONS)
def test_what_float32_cannot_hold(batch, name):
    """Ratios of e^80 and e^-80, and log-probabilities of minus infinity: loss and gradient stay finite."""
    logp, old_logp, advantage, mask, weight = (np.array(x) for x in arrays(batch))
    logp[0, :4], old_logp[0, :4] = [-80, -1e-3, -np.inf, -1], [-1e-3, -80, -1, -np.inf]
    objective = CONVENTIONS[name].objective
    rest = tuple(jnp.asarray(x) for x in (old_logp, advantage, mask, weight))
    (loss, stats), grad = jax.value_and_grad(lambda x: policy_loss(objective, x, *rest), has_aux=True)(
        jnp.asarray(logp)
    )
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    assert grad[0, 2] == 0  # a token that the policy cannot write
    assert all(np.isfinite(value) for value in values(on_host(stats)).values())
    # What is no number at all is not hidden: the guard will see it.
    spoilt = jnp.asarray(logp).at[1, 0].set(jnp.nan)
    assert np.isnan(policy_loss(objective, spoilt, *rest)[0])


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("old", [-60.0, -np.inf])
def test_dppo_cuts_what_the_old_policy_could_not_write(divergence, old):
    """From nothing to 0.9 is far, by either measure."""
    objective = partial(losses.dppo, divergence=divergence, low=0.2, high=0.2)
    rest = (jnp.full((1, 1), old), jnp.ones((1, 1)), jnp.ones((1, 1), bool), jnp.ones((1, 1)))
    assert jax.grad(lambda x: policy_loss(objective, x, *rest)[0])(jnp.log(jnp.full((1, 1), 0.9)))[0, 0] == 0


def test_sequences_that_share_a_row(batch):
    """GSPO's ratios are of sequences, not of rows; and what stands between them has no say."""
    taken = [np.asarray(x) for x in arrays(batch)]
    objective = partial(losses.gspo, low=0.1, high=0.15)

    def in_one_row(x, between):
        return np.concatenate([x[1], np.full(2, between, x.dtype), x[2]])[None]

    apart = compiled_gradient(objective, *(x[1:3] for x in taken))
    segments = jnp.array([[0] * (T + 1) + [1] * (T + 1)])
    row = [in_one_row(x, between) for x, between in zip(taken, (-9.0, 9.0, 9.0, False, 9.0))]
    shared = compiled_gradient(objective, *row, segment_ids=segments)
    np.testing.assert_allclose(shared[0][0], apart[0][0], rtol=1e-6)
    np.testing.assert_allclose(shared[1][0, :T], apart[1][0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(shared[1][0, -T:], apart[1][1], rtol=1e-6, atol=1e-9)


def test_a_correction_multiplies_the_terms_alone(batch):
    logp, *rest = arrays(batch)
    factor = jnp.linspace(0, 2, B * T).reshape(B, T)
    objective = CONVENTIONS["paper"].objective
    plain = jax.grad(lambda x: policy_loss(objective, x, *rest)[0])(logp)
    (_, stats), grad = jax.value_and_grad(lambda x: policy_loss(objective, x, *rest, correction=factor), has_aux=True)(
        logp
    )
    np.testing.assert_allclose(grad, plain * factor, rtol=1e-6)
    assert on_host(stats) == on_host(policy_loss(objective, logp, *rest)[1])


def test_recipes_choose_and_bound():
    assert LossRecipe().chosen == CONVENTIONS["paper"]
    assert str(LossRecipe(max_weight=2).chosen).startswith(
        "objective cispo(max_weight=2, min_weight=0), normaliser prompt_mean, advantages"
    )
    assert str(CONVENTIONS["verl"]).startswith(
        "objective cispo(max_weight=1.28, min_weight=0.8), normaliser token_mean"
    )
    with pytest.raises(UserError, match=r"max_weight bound the importance weights of CISPO; grpo has none"):
        LossRecipe(convention="grpo", max_weight=5.0)
    for wrong, says in ((dict(max_weight=0.28), r"did you mean 1\.28"), (dict(min_weight=1.5), "min_weight = 1.5")):
        with pytest.raises(UserError, match=says):
            cispo(**wrong)


def test_conventions_are_what_they_say():
    assert CONVENTIONS["scalerl"].advantages == Advantages(scale="batch")
    assert CONVENTIONS["dr-grpo"].advantages.scale is None


def test_divergence_from_a_reference():
    """d - 1 - log d with d = pi_ref / pi; its gradient in log pi is 1 - d."""
    gap = np.array([[0.0, 0.5, -1.0, 80.0, 0.0]])
    logp = jnp.asarray([[-1.0, -2.0, -1.5, -80.0, -jnp.inf]])
    reference = jnp.where(jnp.isfinite(logp), logp + gap, -1.0)
    mask, weight = jnp.array([[True, True, True, False, True]]), jnp.full((1, 5), 0.25)
    value, grad = jax.value_and_grad(losses.kl_penalty)(logp, reference, mask, weight)
    d = np.exp(gap[0, :3])
    np.testing.assert_allclose(value, 0.25 * (d - 1 - np.log(d)).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad[0], [*(0.25 * (1 - d)), 0, 0], rtol=1e-5, atol=1e-9)
    far = losses.kl_penalty(jnp.full((1, 1), -80.0), jnp.zeros((1, 1)), jnp.ones((1, 1), bool), jnp.ones((1, 1)))
    assert np.isfinite(far)


def test_diagnostics_by_sign(batch):
    logp, old_logp, advantage, mask, weight = arrays(batch)
    _, stats = cispo_loss(logp, old_logp, advantage, mask, weight, max_weight=2.0)
    found, m = values(on_host(stats)), np.asarray(mask)
    ratio, w, a = (np.asarray(x)[m] for x in (jnp.exp(logp - old_logp), weight, advantage))
    cut = ratio > 2.0
    for name, signed in (("up", a > 0), ("down", a < 0)):
        assert found[f"clipped_{name}"] == pytest.approx(np.average(cut[signed], weights=w[signed]), rel=1e-5)
        mass = (w * ratio * np.abs(a))[signed]
        assert found[f"clipped_mass_{name}"] == pytest.approx(np.average(cut[signed], weights=mass), rel=1e-5)
    assert found["effective"] == pytest.approx(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()), rel=1e-4)
    histogram = on_host(stats)["log_ratio"]
    inside = np.clip(np.log(ratio), -2, 2)
    for share in (0.01, 0.5, 0.99):
        want = np.quantile(inside, share, method="inverted_cdf")
        assert histogram.quantile(share) == pytest.approx(want, abs=6e-3)
