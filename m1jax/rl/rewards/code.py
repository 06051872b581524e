"""Programs that a model wrote, against tests: what they print for an input, and assertions about what they define."""

import dataclasses
import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from m1jax.errors import UserError
from m1jax.sandbox import Limits, Pool, Reason

_EXAMINER = Path(__file__).with_name("code_examiner.py")
_CANDIDATE = Path(__file__).with_name("code_candidate.py")
_FENCED = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "py", "python", "python3"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of a program."""

    stdin: str
    stdout: str
    """what it must print; see `same_output`"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeTests:
    """What a program must do.

    Raises:
        UserError: there is no test.
    """

    cases: tuple[Case, ...] = ()
    """each a run of its own"""
    setup: str = ""
    """what the assertions need: imports, helpers"""
    asserts: tuple[str, ...] = ()
    """pieces of Python about what the program defines, such as `assert double(2) == 4`"""
    entry: tuple[str, ...] = ()
    """names that the program is to define although Python has them: `sum`, `calendar`"""

    def __post_init__(self) -> None:
        if not self.cases and not self.asserts:
            raise UserError("a code problem without tests; expected cases or asserts")
        for piece in (self.setup, *self.asserts):
            try:
                compile(piece, "test", "exec")
            except (SyntaxError, ValueError) as error:
                raise UserError(f"a test that is no Python ({error}): {piece!a:.80}") from error

    @property
    def total(self) -> int:
        return len(self.cases) + len(self.asserts)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CodeTests":
        fields: dict[str, Any] = json.loads(text)
        cases = tuple(Case(**case) for case in fields["cases"])
        return cls(cases=cases, setup=fields["setup"], asserts=tuple(fields["asserts"]), entry=tuple(fields["entry"]))


@dataclasses.dataclass(frozen=True)
class CodeGrade:
    """How far a program came; the first test that it fails is the last one made."""

    passed: int
    total: int
    reason: Reason
    """how its last run ended"""
    why: str
    """what failed, in one line; empty where nothing did"""

    @property
    def correct(self) -> bool:
        return self.passed == self.total


def extract_program(answer: str) -> str:
    """The last block of an answer that is fenced as Python or as nothing; the whole answer where there is none."""
    blocks = [body for language, body in _FENCED.findall(answer) if language.lower() in _PYTHON]
    return blocks[-1] if blocks else answer


def grade(pool: Pool, program: str, tests: CodeTests, limits: Limits | None = None) -> CodeGrade:
    """Runs a program on its tests, one after the other, until one fails.

    What a program must print never enters the sandbox. Assertions are made in a process of their own, to which the
    program answers with plain values (numbers, texts, lists, ...): it cannot end the test early, nor compare itself
    equal to whatever is expected.

    Args:
        pool: where it runs.
        program: Python.
        tests: what it must do.
        limits: of each run; `Limits()` unless given.

    Raises:
        UserError: this system cannot isolate programs.
    """
    for number, case in enumerate(tests.cases):
        result = pool.run(program, stdin=case.stdin, limits=limits)
        if result.reason == "refused":
            raise UserError(f"sandbox: {result.stderr}")
        if result.reason != "ok":
            return CodeGrade(number, tests.total, result.reason, _last_line(result.stderr) or result.reason)
        if not same_output(case.stdout, result.stdout):
            why = f"printed {result.stdout!a:.80}, expected {case.stdout!a:.80}"
            return CodeGrade(number, tests.total, "ok", why)
    if not tests.asserts:
        return CodeGrade(tests.total, tests.total, "ok", "")
    given = {
        "candidate": _CANDIDATE.read_text(),
        "program": program,
        "setup": tests.setup,
        "asserts": tests.asserts,
        "entry": tests.entry,
    }
    result = pool.run(_EXAMINER.read_text(), stdin=json.dumps(given), limits=limits)
    if result.reason == "refused":
        raise UserError(f"sandbox: {result.stderr}")
    passed = result.stdout.count("\n")
    if passed == len(tests.asserts) and result.reason == "ok":
        return CodeGrade(tests.total, tests.total, "ok", "")
    # Whatever happened, it did not pass: a program may be ended after its last test, too.
    passed = min(passed, len(tests.asserts) - 1)
    return CodeGrade(len(tests.cases) + passed, tests.total, result.reason, _last_line(result.stderr) or result.reason)


def same_output(expected: str, printed: str) -> bool:
    """Whether words agree line by line, where numbers may be written differently (`1.50` and `1.5`).

    White space at the ends of lines, and empty lines at the end, do not count.
    """
    lines = [[line.split() for line in text.rstrip().splitlines()] for text in (expected, printed)]
    return len(lines[0]) == len(lines[1]) and all(
        len(left) == len(right) and all(map(_same_word, left, right)) for left, right in zip(*lines)
    )


def _same_word(expected: str, printed: str) -> bool:
    if expected == printed:
        return True
    try:
        return Decimal(expected) == Decimal(printed)
    except InvalidOperation:
        return False


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return f"{lines[-1]:.200}" if lines else ""
