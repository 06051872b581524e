"""What a path means: a model's directory, a run, its checkpoints."""

import json

import pytest

from m1jax import weights
from m1jax.chat import Tokenizer
from m1jax.chat.tokenizer import BOS, EOS
from m1jax.errors import UserError
from m1jax.weights.directory import name_end_token, run_of


@pytest.fixture
def run(tmp_path):
    """A run with a checkpoint, as far as its names tell."""
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints" / "sft" / "10").mkdir(parents=True)
    (run / "checkpoints" / "sft" / "10" / "checkpoint.json").write_text("")
    (run / "config.json").write_text('{"command": "train sft"}')
    return run


@pytest.fixture
def export(run):
    (run / "export").mkdir()
    (run / "export" / "config.json").write_text('{"model_type": "minimax_m1"}')
    return run / "export"


WITHIN = [".", "checkpoints", "checkpoints/sft", "checkpoints/sft/10"]


def test_a_model_is_itself(export):
    assert weights.locate(export) == export
    assert weights.locate(str(export)) == export


def test_a_run_is_its_export(run, export):
    assert weights.locate(run) == export


@pytest.mark.parametrize("within", WITHIN[1:])
def test_checkpoints_name_the_export(run, export, within):
    with pytest.raises(UserError, match=rf"{within} holds checkpoints, no model's files; give {export}, or"):
        weights.locate(run / within)


@pytest.mark.parametrize("within", WITHIN)
def test_without_an_export_what_to_do_is_named(run, within):
    with pytest.raises(UserError, match=rf"`m1jax convert {run / within} DIRECTORY` makes a model's files"):
        weights.locate(run / within)


def test_a_checkpoint_outside_of_runs(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "checkpoint.json").write_text("")
    for path in (tmp_path, tmp_path / "0"):
        with pytest.raises(UserError, match=rf"`m1jax convert {path} DIRECTORY`"):
            weights.locate(path)


def test_what_is_neither_comes_back(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert weights.locate(path) == path


def test_the_run_of_a_path(run):
    assert [run_of(run / within) for within in WITHIN] == [None, run, run, run]


def test_the_end_token_is_named_once(tmp_path):
    name_end_token(tmp_path)
    assert not any(tmp_path.iterdir())  # there is no tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")  # of no M1
    name_end_token(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    tokenizer = Tokenizer.tiny()
    tokenizer.save(tmp_path)
    name_end_token(tmp_path)
    file = tmp_path / "generation_config.json"
    assert json.loads(file.read_text()) == {
        "bos_token_id": tokenizer.token_id(BOS),
        "eos_token_id": tokenizer.token_id(EOS),
    }
    file.write_text("{}")  # what is there was meant
    name_end_token(tmp_path)
    assert file.read_text() == "{}"
