"""Recipes as files of options."""

import dataclasses
import re

import pytest

from m1jax import cli
from m1jax.errors import UserError
from m1jax.rl import recipe_file
from m1jax.rl.recipe import RLRecipe

MODEL = ["MODEL", "--task", "sums+board"]


def recipe(*arguments):
    return cli.parse(["train", "rl", *MODEL, *arguments])[1].recipe


def test_a_file_and_options(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "iterations = 7\n[generation]\nprompts = 5\nchat = false\nmax_new_tokens = 40\n[window]\nwindows = [20, 40]\n"
        '[optimizer]\nlearning_rate = 2e-5\n[loss]\nconvention = "dapo"\n'
    )
    found = recipe("--recipe", str(path))
    assert found == dataclasses.replace(
        RLRecipe(),
        iterations=7,
        generation=dataclasses.replace(RLRecipe().generation, prompts=5, chat=False, max_new_tokens=40),
        window=dataclasses.replace(RLRecipe().window, windows=(20, 40)),
        optimizer=dataclasses.replace(RLRecipe().optimizer, learning_rate=2e-5),
        loss=dataclasses.replace(RLRecipe().loss, convention="dapo"),
    )
    over = recipe(f"--recipe={path}", "--prompts", "6", "--chat", "--learning_rate=1e-3", "--windows", "10", "40")
    assert (over.generation.prompts, over.generation.chat, over.generation.max_new_tokens) == (6, True, 40)
    assert (over.optimizer.learning_rate, over.window.windows) == (1e-3, (10, 40))
    assert recipe() == RLRecipe()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("iteration = 1", "iteration is no option here"),
        ("[generations]\nprompts = 1", "generations is no table here"),
        ("[generation]\nprompt = 1", r"generation\.prompt is no option here"),
        ("generation = 1", "generation is no option here"),
        ("prompts", "Expected '=' after a key"),
    ],
)
def test_what_is_refused(tmp_path, text, says):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        recipe_file.expanded(["--recipe", str(path)])


def test_no_text(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes("iterations = 7 # é".encode("latin-1"))
    with pytest.raises(UserError, match=r"mine\.toml: it is not text in UTF-8 \(byte 17\)"):
        recipe_file.read(str(path))
    path.write_text("iterations = 7 # é", encoding="utf-8")
    assert recipe_file.read(str(path)) == {"iterations": 7}


def test_two_recipes():
    with pytest.raises(UserError, match="--recipe is given 2 times"):
        recipe_file.expanded(["--recipe", "scalerl", "--recipe=m1-report"])


def test_no_such_recipe():
    with pytest.raises(UserError, match="recipes that come along: m1-report, scalerl"):
        recipe_file.read("nowhere.toml")
    with pytest.raises(UserError, match="give a file"):
        recipe_file.expanded(["MODEL", "--recipe"])


@pytest.mark.parametrize("name", recipe_file.known())
def test_those_that_come_along(name):
    """They are recipes, and every line says where it is from."""
    found = recipe("--recipe", name)
    assert found.loss.chosen
    lines = recipe_file._shipped().joinpath(f"{name}.toml").read_text().splitlines()
    assert [line for line in lines if "=" in line and not re.search(r"= .+ # .{4,}", line) and line[0] != "#"] == []


def test_the_report():
    found = recipe("--recipe", "m1-report")
    assert found.update.updates == 16
    assert found.optimizer.eps == 1e-15
    assert found.window.windows == (40960, 49152, 57344, 65536, 73728, 81920)
    assert (found.generation.repetition_tokens, found.generation.repetition_probability) == (3000, 0.99)
    assert found.late_loss.chosen.objective.keywords["max_weight"] == 2.0
    assert found.late_optimizer.clip_norm == 0.5


def test_help_lists_what_is_basic(capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            cli.parse(["train", "rl", option])
        shown[option] = capsys.readouterr().out
    for name in ("--prompts", "--convention", "--learning-rate", "--dry-run"):
        assert name in shown["--help"]
    for name in ("--kl-coefficient", "--late-from", "--beta1"):
        assert name in shown["--help-all"]
        assert name not in shown["--help"]
    assert "peak learning rate" in shown["--help"]
