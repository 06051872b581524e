"""`m1jax chat`, as a person at a terminal would see it."""

import io

import pytest

from m1jax import cli
from m1jax.commands.chat import functions
from m1jax.errors import UserError
from tests import tiny

TOOLS = '''
import math
from dataclasses import dataclass


@dataclass
class Point:
    x: int


def area(radius: float) -> float:
    """The area of a circle."""
    return math.pi * radius**2


def _secret():
    pass
'''


def test_functions_of_a_file(tmp_path):
    path = tmp_path / "lent_tools.py"
    path.write_text(TOOLS)
    assert [function.__name__ for function in functions(path)] == ["area"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("x = 1", "defines no function"), ("1 / 0", "cannot be run: ZeroDivisionError"), (None, "does not exist")],
)
def test_files_that_lend_nothing(tmp_path, text, says):
    path = tmp_path / "lent_nothing.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        functions(path)


def test_a_conversation(tmp_path, monkeypatch, capsys):
    directory = tiny.save(tmp_path / "model")
    (tmp_path / "lent_area.py").write_text(TOOLS)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand now?\n"))
    options = ["--tools", str(tmp_path / "lent_area.py"), "--max-new-tokens", "12", "--max-length", "1024"]
    cli.main(
        ["chat", str(directory), *options, "--system", "Be brief.", "--thinking-budget", "40k", "--max-steps", "2"]
    )
    assert len(capsys.readouterr().out.strip()) > 10
    with pytest.raises(SystemExit, match="2"):
        cli.main(["chat", str(directory), "--thinking-budget", "much"])
    assert "thinking_budget = much is none" in capsys.readouterr().err
