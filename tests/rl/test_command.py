"""`m1jax train rl` from the command line: one's own problems in several files, one's own reward, chat format."""

import dataclasses
import json

import pytest

from m1jax import cli
from m1jax.chat import Tokenizer
from m1jax.errors import UNTRAINED
from tests import tiny

SIZES = ["--iterations", "1", "--prompts", "4", "--samples", "4", "--updates", "2", "--rounds", "1", "--rows", "2"]
SIZES += ["--max-new-tokens", "8", "--evaluate-rounds", "1"]
PLAIN = [*SIZES, "--no-chat", "--max-prompt-tokens", "8", "--row-length", "16"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    home = tmp_path_factory.mktemp("files")
    tiny.save(home / "model")
    for name in ("easy", "hard"):
        lines = [json.dumps({"prompt": f"{name[0]}{n}=", "answer": str(n)}) + "\n" for n in range(10)]
        (home / f"{name}.jsonl").write_text("".join(lines))
    (home / "mine.py").write_text(
        "def reward(response, answer):\n"
        "    total = sum(map(ord, response))\n"
        "    if total % 5 == 0: raise ValueError('fives are not judged')\n"
        "    return total % 101 / 100\n"
    )
    return home


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["train", "rl", *map(str, arguments)])
    assert leaving.value.code == 2
    return capsys.readouterr().err


def test_problems_and_reward_of_ones_own(files, tmp_path, caplog):
    data = ["--data", f"{files}/easy.jsonl=3", f"{files}/hard.jsonl", "--reward", f"{files}/mine.py:reward"]
    command = ["train", "rl", f"{files}/model", *data, *PLAIN, "--runs", str(tmp_path), "--name", "mine"]
    cli.main(command)
    run = tmp_path / "mine"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1]
    assert records[1]["updates"] == 2
    assert 0 < records[1]["reward"] < 1
    assert {name for name in records[1] if name.startswith("accuracy")} == {
        "accuracy",
        "accuracy_easy",
        "accuracy_hard",
    }
    assert "mine.py, line 3: ValueError: fives are not judged" in caplog.text
    assert {p.name for p in run.iterdir()} >= {"export", "curves.png", "samples_before.md", "samples_after.md"}
    report = (run / "report.html").read_text()
    assert report.count("<svg") > 15
    assert "samples" in report.lower()
    for name in (
        "reward_std",
        "format",
        "zero_variance",
        "finish_stop",
        "length_p99",
        "staleness",
        "pearson",
        "effective",
    ):
        assert name in records[1], name
    for name in ("log_ratio_p99", "clipped_mass_up", "kl_k3", "entropy", "grad_norm", "effective"):
        assert len(records[1][f"{name}_by_update"]) == 2
    settings = json.loads((run / "config.json").read_text())
    assert settings["data"] == [[f"{files}/easy.jsonl", 3.0], [f"{files}/hard.jsonl", 1.0]]
    assert settings["recipe"]["generation"]["prompts"] == 4


def test_problems_by_pass_rate(files, tmp_path):
    """Those that the reward calls right at times are trained on; a run that goes on has the same."""
    reward = tmp_path / "even.py"
    reward.write_text("def reward(response): return float(sum(map(ord, response)) % 2)\n")
    command = ["train", "rl", f"{files}/model", "--data", f"{files}/easy.jsonl", "--reward", f"{reward}:reward", *PLAIN]
    command += ["--pass-rate-problems", "9", "--runs", str(tmp_path)]
    cli.main(command)
    record = tmp_path / "rl/pass_rates.jsonl"
    said, *lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert said["measured_for"]["reward"][0] == f"{reward}:reward"
    assert said["measured_for"]["generation"]["max_new_tokens"] == 8
    assert len(lines) == 9
    assert {line["attempts"] for line in lines} == {4, 8}  # twelve were asked, three of them a second time
    assert all(line["kept"] == (0 < line["correct"] < 0.9 * line["attempts"]) for line in lines)
    before = record.stat().st_mtime_ns
    cli.main([*command, "--iterations", "2"])
    assert record.stat().st_mtime_ns == before


def test_prompts_are_measured_as_they_are_asked(files, tmp_path, capsys):
    """The chat format takes tokens too; a problem that does not fit is named by its line, before anything begins."""
    sizes = [*SIZES, "--max-prompt-tokens", "40", "--row-length", "64", "--runs", tmp_path]
    said = refused(capsys, files / "model", "--data", files / "easy.jsonl", *sizes)
    assert "easy.jsonl, line 1: a prompt of" in said
    assert "max_prompt_tokens is 40" in said
    assert not list(tmp_path.iterdir())


def test_nothing_learnt_has_a_status_of_its_own(files, tmp_path, capsys):
    """With the chat format, and rules, which so small a model never satisfies."""
    sizes = [*SIZES, "--max-prompt-tokens", "64", "--row-length", "72", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit) as leaving:
        cli.main(["train", "rl", f"{files}/model", "--data", f"{files}/easy.jsonl", *sizes])
    assert leaving.value.code == UNTRAINED
    assert "not one update was made" in capsys.readouterr().out
    assert not (tmp_path / "rl/export").exists()
    report = (tmp_path / "rl/report.html").read_text()  # why that is so
    assert "groups of equal rewards" in report
    with pytest.raises(SystemExit):
        cli.main(["eval", f"{tmp_path}/rl", "--task", "sums"])
    assert "rl is a run that has not exported its model yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--name", ""], "a run needs a name"),
        (["--name", "../x"], "a run needs a name"),
        (["--reward", "none.py:f"], "there is no file none.py"),
        (["--reward", "rules=x"], "'x' is no weight"),
        (["--environment", "none.py:f"], "there is no file none.py"),
        (["--from", "nowhere"], "nowhere holds no checkpoints"),
        (["--max-weight", "0.28"], "did you mean 1.28?"),
        (["--format-reward", "1"], "format_reward = 1.0"),
        (["--pass-rate-problems", "-1"], "pass_rate_problems = -1 must be zero or more"),
    ],
)
def test_what_is_refused_at_once(files, tmp_path, capsys, options, says):
    assert says in refused(capsys, files / "model", "--task", "sums", *PLAIN, "--runs", tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_makes_nothing(files, tmp_path, capsys):
    cli.main(["train", "rl", f"{files}/model", "--task", "sums", *PLAIN, "--runs", str(tmp_path), "--dry-run"])
    said = capsys.readouterr().out
    assert "1 generation batches of 4 problems x 4 responses, at most 2 updates each (2 problems an update)" in said
    assert "tokens: at most 128 written and 256 trained on a batch" in said
    for what in ("loss: objective cispo", "memory of all devices together", "time: at most"):
        assert what in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_run_would(tmp_path, capsys):
    """m1-report's rows are for models of 80K tokens."""
    config = dataclasses.replace(tiny.CONFIG, max_position_embeddings=4096)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf("official")))
    Tokenizer.tiny().save(tmp_path)
    with pytest.raises(SystemExit) as ending:
        cli.main(["train", "rl", str(tmp_path), "--task", "sums", "--recipe", "m1-report", "--dry-run"])
    assert ending.value.code == 2
    assert "rows of 83968 tokens are longer than the model's max_position_embeddings = 4096" in capsys.readouterr().err


def test_eval(files, tmp_path, capsys):
    """Every problem of a file once, right form and answers judged; the same figures as JSON."""
    options = ["--samples", "2", "--max-new-tokens", "8", "--max-prompt-tokens", "8", "--no-chat"]
    options += ["--output", str(tmp_path / "marks.json")]
    data = ["--data", f"{files}/easy.jsonl", f"{files}/hard.jsonl"]
    cli.main(["eval", f"{files}/model", *data, *options])
    said = capsys.readouterr().out
    assert said.startswith("all: 20 problems, 2 attempts at each")
    assert "easy: 10 problems" in said
    assert "pass@1" in said
    assert "pass@2" in said
    found = json.loads((tmp_path / "marks.json").read_text())
    assert sorted(found) == ["all", "easy", "hard"]
    assert found["all"]["problems"] == 20
    assert found["all"]["passed"]["1"] == pytest.approx(found["all"]["average"])
    assert (tmp_path / "marks.md").exists()


def test_eval_of_a_family_that_nobody_can_judge(files, tmp_path, capsys):
    """It is told as such; the other family has its marks."""
    reward = tmp_path / "mine.py"
    reward.write_text("def reward(prompt): return 1.0 if prompt[0] == 'e' else 1 / 0\n")
    command = ["eval", f"{files}/model", "--data", f"{files}/easy.jsonl", f"{files}/hard.jsonl", "--no-chat"]
    command += ["--samples", "2", "--max-new-tokens", "8", "--reward", f"{reward}:reward"]
    output = tmp_path / "new/folder/marks.json"
    cli.main([*command, "--output", str(output)])
    said = capsys.readouterr().out
    assert "easy: 10 problems" in said
    assert "hard: nothing measured: no response to its 10 problems could be judged" in said
    found = json.loads(output.read_text())
    assert found["hard"] is None
    assert found["easy"]["average"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "either --data FILE.jsonl or --task"),
        (["--task", "sums", "--top-p", "2"], "top_p = 2.0"),
        (["--task", "sums", "--output", "."], "--output . is a directory"),
        (["--task", "sums", "--output", "marks.md"], ".md is for the samples"),
        (["--task", "sums", "--output", __file__ + "/marks.json"], "test_command.py"),
        (["--task", "sums", "--no-chat", "--max-new-tokens", "99999999"], "12 tokens and max_new_tokens = 99999999"),
    ],
)
def test_eval_refuses(files, capsys, monkeypatch, options, says):
    """Before anything is measured."""
    monkeypatch.setattr("m1jax.rl.evaluate.evaluate", None)
    with pytest.raises(SystemExit):
        cli.main(["eval", f"{files}/model", *options])
    assert says in capsys.readouterr().err
