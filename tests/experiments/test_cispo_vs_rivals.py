"""The experiment's arrays do what the package's own functions do, its tasks what its README says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cispo_vs_rivals import loop, run, tasks, verdict
from experiments.cispo_vs_rivals.arms import ARMS
from experiments.cispo_vs_rivals.results import Job, Results
from m1jax.errors import UserError
from m1jax.rl.advantages import Advantages
from m1jax.rl.aggregation import Responses, prompt_mean
from m1jax.rl.losses import policy_loss

# As the experiment has them, within a compiled program, of which each is then one.
advantages = jax.jit(loop.advantages, static_argnames="over_batch")
dealt, weights, judge = jax.jit(loop.dealt), jax.jit(loop.prompt_mean), jax.jit(tasks.judge)
demonstrations = jax.jit(jax.vmap(tasks.demonstration, (0, None)))


def rewards(seed: int, groups: int = 32, samples: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.random((groups, samples)) < rng.choice([0.0, 0.1, 0.5, 1.0], (groups, 1))
    return drawn.astype(np.float32)


@pytest.mark.parametrize("over_batch", [False, True])
def test_advantages_are_the_packages(over_batch):
    given = rewards(0)
    useful = given.max(axis=1) > given.min(axis=1)
    assert 0 < useful.sum() < len(useful)
    found = advantages(jnp.array(given), jnp.array(useful), over_batch=over_batch)
    kept = given[useful]
    wanted = Advantages(scale="batch" if over_batch else "group")(kept.ravel(), np.repeat(np.arange(len(kept)), 8))
    np.testing.assert_allclose(np.asarray(found)[useful].ravel(), wanted, rtol=1e-5)
    assert not np.asarray(found)[~useful].any()


@pytest.mark.parametrize("updates", [1, 4, 16])
@pytest.mark.parametrize("count", [0, 1, 3, 16, 21, 32])
def test_groups_are_dealt_out_as_the_trainer_does(updates, count):
    useful = np.random.default_rng(count).permutation(32) < count
    slots = np.asarray(dealt(jnp.array(useful), jnp.array(updates))).reshape(updates, -1)
    parts = np.array_split(np.flatnonzero(useful), max(1, min(updates, count)))
    for slot, part in zip(slots, [*parts, *[[]] * updates]):
        assert [group for group in slot if group >= 0] == list(part)


@pytest.mark.parametrize("updates", [1, 4, 16])
def test_weights_are_the_packages(updates):
    useful, lengths = rewards(1).max(axis=1) > rewards(1).min(axis=1), np.random.default_rng(2).integers(2, 8, (32, 8))
    slots = dealt(jnp.array(useful), jnp.array(updates))
    found = np.asarray(weights(jnp.array(lengths), slots, jnp.array(updates)))
    for part in np.asarray(slots).reshape(updates, -1):
        groups = part[part >= 0]
        responses = Responses(
            tokens=lengths[groups].ravel(),
            prompts=np.repeat(groups, 8),
            batch_tokens=int(lengths[useful].sum()),
            updates=updates,
            limit=tasks.RESPONSE,
        )
        np.testing.assert_allclose(np.repeat(found[groups], 8), prompt_mean(responses), rtol=1e-6)


def test_on_policy_all_objectives_have_one_gradient():
    key = jax.random.key(0)
    logp, advantage = jax.random.normal(key, (2, 4, 8)) - jnp.array([5.0, 0.0])[:, None, None]
    mask, weight = jnp.ones((4, 8), bool), jnp.full((4, 8), 1 / 32)

    @jax.jit
    def gradients(logp):
        """Of every arm; the old policy is this one."""

        def gradient(arm):
            return jax.grad(lambda x: policy_loss(arm.objective, x, logp, advantage, mask, weight)[0])(logp)

        return {name: gradient(arm) for name, arm in ARMS.items()}

    for name, gradient in gradients(logp).items():
        np.testing.assert_allclose(gradient, -weight * advantage, rtol=1e-5, err_msg=name)
    assert run.arms_of(1, list(ARMS)) == ["cispo", "scalerl"]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_demonstrations_are_worth_what_the_readme_says(name):
    task = jnp.array(tasks.TASKS.index(name))
    tokens, weight = demonstrations(jax.random.split(jax.random.key(0), 2000), task)
    prompts, responses = tokens[:, : tasks.PROMPT], tokens[:, tasks.PROMPT :]
    judged = judge(prompts, responses)
    with_it, without = (float(jnp.mean(judged.reward[judged.rechecked == r])) for r in (True, False))
    expected = {"recheck": (1.0, 0.2), "neutral": (0.5, 0.5), "harmful": (0.2, 0.5), "chain_sum": (0.5, 0.5)}[name]
    assert (with_it, without) == pytest.approx(expected, abs=0.05)
    choice = jnp.where(jnp.roll(responses == tasks.RECHECK, 0, axis=1), weight, 0).sum()
    other = jnp.where((responses == tasks.END) & ~judged.rechecked[:, None], weight, 0).sum()
    assert float(choice / (choice + other)) == pytest.approx(tasks.RARE, rel=0.15)
    assert bool(jnp.all((responses != tasks.NOTHING) == judged.written))


def test_an_answer_counts_only_if_it_is_ended_and_the_last_one():
    prompt = [tasks.FIRST_TASK, 1, 2, 3, 4, 1, tasks.EQUALS]  # 11 modulo 5 is 1
    end, recheck = tasks.END, tasks.RECHECK
    responses = [[1, end], [2, end], [2, recheck, 1, end], [1, recheck, 2, end], [1] * 8, [end, 1]]
    rows = [r + [tasks.NOTHING] * (8 - len(r)) for r in responses]
    judged = judge(jnp.array([prompt] * len(rows)), jnp.array(rows))
    assert judged.reward.tolist() == [1, 0, 1, 0, 0, 0]
    assert judged.rechecked.tolist() == [False, False, True, True, False, False]
    chain = [tasks.FIRST_TASK + 3, 2, tasks.MINUS, 9, tasks.MINUS, 8, tasks.EQUALS]
    right = jnp.array([[tasks.MINUS, 1, 5, end, *[tasks.NOTHING] * 4], [tasks.PLUS, 1, 5, end, *[tasks.NOTHING] * 4]])
    assert judge(jnp.array([chain] * 2), right).reward.tolist() == [1, 0]


def test_chain_sum_is_reasoning_gyms():
    gym = pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")
    made = gym.create_dataset("chain_sum", min_terms=3, max_terms=3, min_digits=1, max_digits=1, seed=0, size=60)
    spelling = {"+": tasks.PLUS, "-": tasks.MINUS} | {str(digit): digit for digit in range(10)}
    entries, prompts, responses, texts = [], [], [], []
    for number, entry in enumerate(made):
        problem = [spelling[part] for part in entry["metadata"]["expression"].split()]
        value = int(entry["answer"]) + number % 3 - 1
        texts.append(f"{value:+03d}")
        entries.append(entry)
        prompts.append([tasks.FIRST_TASK + tasks.CHAIN_SUM, *problem, tasks.EQUALS])
        responses.append([*(spelling[letter] for letter in texts[-1]), tasks.END, *[tasks.NOTHING] * 4])
    judged = judge(jnp.array(prompts), jnp.array(responses))
    scores = [made.score_answer(text, entry) for text, entry in zip(texts, entries)]
    assert 10 < sum(score == 1 for score in scores) < 30
    np.testing.assert_array_equal(judged.reward, np.array(scores) == 1)


def test_ratio_finds_a_factor_of_two_and_counts_who_never_arrives():
    def climb(speed: float, seed: int) -> list[float]:
        noise = np.random.default_rng(seed).normal(0, 0.01, 60)
        return list(np.clip(0.2 + speed * np.arange(60), 0, 0.9) + noise)

    slow = {seed: climb(0.02, seed) for seed in range(16)}
    fast = {seed: climb(0.04, seed + 50) for seed in range(16)}
    found = verdict.ratio(slow, fast)
    assert found is not None
    assert 1.6 < found.low < found.mean < found.high < 2.2
    assert "holds" in verdict.sentence(found)
    never = verdict.ratio(slow, {seed: [0.2] * 60 for seed in range(16)})
    assert never is not None
    assert never.censored == 16
    assert "opposite" in verdict.sentence(never)
    same = verdict.ratio(slow, {seed: climb(0.02, seed + 50) for seed in range(16)})
    assert "No difference" in verdict.sentence(same)


def test_results_are_read_back_and_the_rate_chosen_from_them(tmp_path):
    jobs = [Job("recheck", "cispo", 16, rate, seed) for rate in (1e-3, 1e-2) for seed in (100, 101)]
    Results(tmp_path, "tuning").add({job: {"area": job.learning_rate + job.seed / 1e6} for job in jobs})
    again = Results(tmp_path, "tuning")
    assert set(again.records) == set(jobs)
    assert again.chosen("recheck", "cispo", 16) == 1e-2
    assert again.chosen("recheck", "dapo", 16) is None


def test_an_unknown_arm_is_named():
    with pytest.raises(UserError, match="no 'ppo'"):
        dataclasses.replace(run.Config(), arms=("ppo",))


@pytest.mark.slow
def test_the_whole_of_it_runs_and_resumes(tmp_path, capsys):
    config = run.Config(only=("recheck",), arms=("cispo", "dapo"), out=tmp_path, smoke=True)
    run.main(config)
    first = {file.name: file.read_text() for file in (tmp_path / "smoke").glob("*.json")}
    assert {"runs-recheck.json", "tuning-recheck.json"} <= set(first)
    assert "DAPO's batches over CISPO's" in capsys.readouterr().out
    run.main(config)
    assert {file.name: file.read_text() for file in (tmp_path / "smoke").glob("*.json")} == first
    assert "tuning" not in capsys.readouterr().out.splitlines()[1]
