"""The command line finds its commands, and says what a user can put right in a line or two."""

import dataclasses
import errno
import sys
import types

import pytest

from m1jax import cli
from m1jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Does a thing."""

    number: int = 1
    """How many."""


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `m1jax ARGUMENTS` with `act` behind the commands `thing` and `thing other`; (status, output, errors)."""

    def run(*arguments, act=lambda config: print(config.number)):
        def main(config: Config) -> None:
            act(config)

        module = types.ModuleType("fake_command")
        module.main = main  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "fake_command", module)
        commands = {"thing": ("fake_command:main", "does it"), "thing other": ("fake_command:main", "does more")}
        monkeypatch.setattr(cli, "COMMANDS", commands)
        try:
            cli.main(arguments)
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def test_runs_the_command_with_its_options(run):
    assert run("thing", "--number", "3") == (0, "3\n", "")
    assert run("thing", "other") == (0, "1\n", "")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_overview(run, arguments):
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "does it" in out
    assert "does more" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("thin",), "no command 'thin'"),
        (("--number", "3"), "no command '--number'"),
        (("thing", "--numbr", "3"), "--number"),
        (("thing", "--number", "three"), "three"),
        (("thing", "else"), "else"),
    ],
)
def test_wrong_arguments(run, arguments, says):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert says in err
    assert "Traceback" not in err


def test_what_the_user_can_put_right(run):
    def act(config):
        raise UserError("data.jsonl, line 3: no 'answer'")

    assert run("thing", act=act) == (2, "", "m1jax: data.jsonl, line 3: no 'answer'\n")


@pytest.mark.parametrize("filename", [None, "runs/demo/metrics.jsonl"])
def test_a_full_disk(run, filename):
    def act(config):
        raise OSError(errno.ENOSPC, "No space left on device", filename)

    status, _, err = run("thing", act=act)
    assert status == 2
    assert err.startswith("m1jax: no space left on the disk")
    assert (filename or "") in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_is_not_permitted(run, number):
    def act(config):
        raise OSError(number, "No", "/data/runs")

    assert run("thing", act=act)[::2] == (
        2,
        "m1jax: not permitted for /data/runs (No): choose another place, or change its permissions\n",
    )


def test_bugs_keep_their_traceback(run):
    def act(config):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run("thing", act=act)


def test_interrupted(run):
    def act(config):
        raise KeyboardInterrupt

    assert run("thing", act=act) == (130, "", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*name.split(), "--help"])
    assert f"usage: m1jax {name}" in capsys.readouterr().out
