"""The loop of supervised training: goes on where it was, longer where the schedule allows, and says what it does."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from m1jax import cli
from m1jax.checkpoint import Checkpoints
from m1jax.errors import UserError
from m1jax.train import guards, packing
from m1jax.train.loop import fit
from m1jax.train.meter import MEASURED
from m1jax.train.optimizer import OptimizerConfig
from m1jax.train.run import Branch, Run
from m1jax.train.sft import SFTRecipe, sft
from tests import tiny

RECIPE = SFTRecipe(
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    steps=3,
    batch=2,
    row_length=8,
    rows=2,
    checkpoint_every=2,
    log_every=1,
)
COMMAND = ["--learning-rate", "1e-2", "--warmup-steps", "1", "--final-fraction", "1"]
COMMAND += ["--batch", "2", "--row-length", "8", "--rows", "2"]
"""the same from the command line: one program with `RECIPE`, however many steps"""
DECAYING = dataclasses.replace(RECIPE, optimizer=dataclasses.replace(RECIPE.optimizer, final_fraction=0.1))


def pair(number):
    return [1, 2], [3 + number % 5, 4, 5]


def train(directory, recipe=RECIPE, branch=None, pair=pair):
    run = Run(directory, {"recipe": recipe}, branch=branch)
    model = sft(run, tiny.model(), pair, recipe)
    run.log.close()
    records = [{name: r[name] for name in r if name not in MEASURED} for r in run.log.records]
    return jax.tree.leaves(nnx.split(model)[1]), records


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return train(tmp_path_factory.mktemp("five") / "run", dataclasses.replace(RECIPE, steps=5))


def test_a_longer_run_goes_on(tmp_path, five, capsys):
    """As if it had been that long from the start, where the learning rates are the same so far."""
    train(tmp_path / "run")
    capsys.readouterr()
    longer = train(tmp_path / "run", dataclasses.replace(RECIPE, steps=5, log_every=2, checkpoint_every=7))
    said = capsys.readouterr().out
    assert f"goes on from update 3 of {tmp_path}/run; planned for 5 updates instead of 3" in said
    assert "with the learning rates of a run of 5 so far" in said
    jax.tree.map(np.testing.assert_array_equal, longer[0], five[0])
    assert [r["step"] for r in longer[1]] == [1, 2, 3, 4, 5]
    assert all(r == want for r, want in zip(longer[1], five[1]))
    with pytest.raises(UserError, match="has made 5 updates; a run of 4 cannot go on"):
        train(tmp_path / "run", dataclasses.replace(RECIPE, steps=4))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_and_says_so(tmp_path, capsys):
    whole = train(tmp_path / "run")
    assert "anew" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = train(tmp_path / "run")
    assert f"begins anew: {tmp_path}/run had no checkpoint of sft yet" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, again[0], whole[0])
    assert again[1] == whole[1]


def test_where_the_rate_has_fallen_only_a_branch_goes_on(tmp_path, capsys):
    train(tmp_path / "run", DECAYING)
    longer = dataclasses.replace(DECAYING, steps=5)
    with pytest.raises(UserError, match=r"at update 3 the learning rate, .* there, would be .*branch off: --from"):
        train(tmp_path / "run", longer)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    _, records = train(tmp_path / "branch", longer, Branch(tmp_path / "run", None))
    said = capsys.readouterr().out
    assert (
        f"branches off from update 3 of {tmp_path}/run; planned for 5 updates instead of 3: the learning rate" in said
    )
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]  # the curve is whole
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    # From an older checkpoint, with another batch; and once begun, it goes on by itself.
    other = dataclasses.replace(RECIPE, batch=4, steps=3)
    train(tmp_path / "other", other, Branch(tmp_path / "run", 2))
    assert "branches off from update 2" in capsys.readouterr().out
    train(tmp_path / "other", other, Branch(tmp_path / "run", 2))
    assert f"goes on from update 3 of {tmp_path}/other" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"it has no checkpoint of sft 1; there are: 2, 3"):
        train(tmp_path / "third", other, Branch(tmp_path / "run", 1))


def test_checkpoints_come_every_so_many_updates(tmp_path, monkeypatch):
    saved = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, **rest: (saved.append(step), save(self, step, **rest)))
    train(tmp_path / "run", dataclasses.replace(RECIPE, steps=5, checkpoint_every=2))
    assert saved == [2, 4, 5]


def test_an_update_that_is_not_finite(tmp_path, capsys, monkeypatch):
    """Stops the run; skipping it is accepted when the run goes on, told as it happens, and recorded as what it is."""
    check = guards.NonFiniteGuard.check

    def second_is_bad(self, step, skipped, batch, figures):
        return check(self, step, float(step == 2), batch, figures)

    monkeypatch.setattr(guards.NonFiniteGuard, "check", second_is_bad)
    every = dataclasses.replace(RECIPE, checkpoint_every=1)
    with pytest.raises(UserError, match="on_nonfinite='skip' would go on without it"):
        train(tmp_path / "run", every)
    capsys.readouterr()
    _, records = train(tmp_path / "run", dataclasses.replace(every, on_nonfinite="skip"))
    said = capsys.readouterr().out
    assert "goes on from update 1" in said
    assert "update 2 is left out" in said
    assert [(r["step"], r.get("skipped"), "nll" in r) for r in records] == [
        (1, None, True),
        (2, 1, False),
        (3, None, True),
    ]
    json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_held_out_loss(tmp_path):
    """Measured in the beginning, now and then, and at the end; it is the mean over all its tokens."""
    examples = [packing.example(*pair(number)) for number in range(5)]
    heldout = packing.micro_batches(packing.pack(examples, 8), 2)
    recipe = dataclasses.replace(RECIPE, steps=3, evaluate_every=2)
    run = Run(tmp_path / "run", {"recipe": recipe})

    class Batches:
        def __next__(self):
            return packing.micro_batches(packing.pack(examples[:2], 8), 2)

        def get_state(self):
            return None

        def close(self):
            pass

    def nll(model):
        """Without packing and padding."""
        found = []
        for example in examples:
            logp, _ = model.log_probs(model.forward(example.tokens[None]).hidden, jnp.asarray(example.targets[None]))
            found += np.asarray(logp)[0][example.mask].tolist()
        return -np.mean(found)

    model = tiny.model()
    before = nll(model)
    trained = fit(run, model, Batches(), recipe, phase="sft", heldout=heldout)
    run.log.close()
    found = {r["step"]: r["heldout_nll"] for r in run.log.records if "heldout_nll" in r}
    assert list(found) == [0, 2, 3]
    assert found[0] == pytest.approx(before, rel=1e-5)
    assert found[3] == pytest.approx(nll(trained), rel=1e-5)
    assert found[3] < found[0]


def test_from_the_command_line(tmp_path, capsys):
    """Several files, held-out ones, a branch; rows that are longer than the model's positions."""
    tiny.save(tmp_path / "model")
    for name in ("a", "b", "held"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"{name}=", "answer": "1"}) + "\n")
    sizes = [*COMMAND, "--steps", "2", "--evaluate-every", "1"]
    data = ["--data", f"{tmp_path}/a.jsonl=2", f"{tmp_path}/b.jsonl", "--eval-data", f"{tmp_path}/held.jsonl"]
    command = ["train", "sft", f"{tmp_path}/model", *data, *sizes, "--runs", f"{tmp_path}/runs"]
    cli.main(command)
    records = [json.loads(line) for line in (tmp_path / "runs/sft/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2]
    assert all(r["heldout_nll"] > 0 for r in records)
    cli.main([*command, "--name", "second", "--from", f"{tmp_path}/runs/sft", "--steps", "3", "--log-every", "2"])
    assert "branches off from update 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*command, "--name", "third", "--row-length", "10240001"])
    assert "max_position_embeddings = 10240000" in capsys.readouterr().err
