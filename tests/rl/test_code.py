"""Code problems: right programs pass, wrong ones do not, and no trick does."""

import re

import pytest

from m1jax.errors import UserError
from m1jax.rl.rewards.code import Case, CodeTests, extract_program, grade, same_output
from m1jax.sandbox import Limits, Pool
from tests.sandbox import test_hostile

PATIENT = Limits(cpu_seconds=60, wall_seconds=90)
DOUBLE = CodeTests(cases=(Case("3\n", "6\n"), Case("-1\n", "-2\n")))
MBPP = CodeTests(asserts=("assert double(2) == 4", "assert double('ab') == 'abab'", "assert double(0.5) == 1.0"))


@pytest.fixture(scope="module")
def pool():
    with Pool(1) as pool:
        yield pool


def test_what_is_printed(pool):
    assert grade(pool, "print(int(input()) * 2)", DOUBLE, PATIENT).correct
    found = grade(pool, "print(abs(int(input())) * 2)", DOUBLE, PATIENT)
    assert (found.correct, found.passed, found.total, found.reason) == (False, 1, 2, "ok")
    assert found.why == "printed '2\\n', expected '-2\\n'"
    found = grade(pool, "print(int(input()) * 2); 1 / 0", DOUBLE, PATIENT)
    assert (found.passed, found.reason, found.why) == (0, "error", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("1 2\n3\n", "1  2 \n3", True),
        ("1.50", "1.5", True),
        ("1e3", "1000", True),
        ("yes", "YES", False),
        ("1 2", "1\n2", False),
        ("", "\n\n", True),
        ("1", "", False),
        ("0.333", "0.3333", False),
        ("nan", "nan", True),
        ("1", "1\n1", False),
    ],
)
def test_same_output(expected, printed, same):
    assert same_output(expected, printed) == same


def test_assertions(pool):
    assert grade(pool, "def double(x): return x * 2", MBPP, PATIENT).correct
    found = grade(pool, "def double(x): return x + x if isinstance(x, int) else x", MBPP, PATIENT)
    assert (found.passed, found.total, found.why) == (1, 3, "AssertionError")
    assert not grade(pool, "def treble(x): return x * 3", MBPP, PATIENT).correct
    assert not grade(pool, "def double(x): return x *", MBPP, PATIENT).correct


@pytest.mark.parametrize(
    ("program", "asserts"),
    [
        (
            "def f(x): return {x: (1, 2.5, None, {3}, b'a', 1j)}",
            "assert f('k') == {'k': (1, 2.5, None, {3}, b'a', 1j)}",
        ),
        ("def f(n): return (i * i for i in range(n))", "assert list(f(3)) == [0, 1, 4]"),
        ("def f(x): x.sort()", "x = [3, 1, 2]\nassert f(x) is None\nassert x == [1, 2, 3]"),
        (
            "class Solution:\n    def twoSum(self, a, t=3): return [0, 1]",
            "assert Solution().twoSum([1, 2], t=3) == [0, 1]",
        ),
        (
            "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)",
            "s = Stack()\ns.push(4)\nassert s.items == [4]",
        ),
        (
            "def f(): raise ValueError('no')",
            "try:\n    f()\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no'",
        ),
        ("import math\ndef f(): return math.inf", "assert math.isinf(f()) and f() > 10 ** 400"),
        ("def f(): return 10 ** 5000", "assert f() == 10 ** 5000"),
        ("import numpy\ndef f(): return numpy.int64(3), numpy.float64(0.5)", "assert f() == (3, 0.5)"),
        (
            "import collections as c\nP = c.namedtuple('P', 'x')\ndef f(): return c.Counter('aab'), P(1)",
            "assert f() == ({'a': 2, 'b': 1}, (1,))",
        ),
        (
            "def has_close(a): return True\nprint('hello')",
            "def check(candidate):\n    assert candidate([1.0]) is True\ncheck(has_close)",
        ),
        ("def apply(g, x): return g(x)\ndef one(x): return x + 1", "assert apply(one, 2) == 3"),
        (
            "if __name__ == '__main__':\n    raise SystemExit(input())\ndef f(): return 'é\\n'",
            "print('x')\nassert f() == 'é\\n'",
        ),
    ],
    ids=range(13),
)
def test_programs_that_pass(pool, program, asserts):
    found = grade(pool, program, CodeTests(asserts=(asserts,)), PATIENT)
    assert found.correct, found


def test_names_that_python_has(pool):
    """Only what the program was to write is the program's."""
    tests = CodeTests(
        setup="import math", asserts=("assert sum(1, 2) == 3", "assert math.floor(2.5) == 2"), entry=("sum",)
    )
    assert grade(pool, "def sum(a, b): return a + b", tests, PATIENT).correct
    assert not grade(pool, "def sum(a, b): return a - b", tests, PATIENT).correct


TRICKS = {
    "exit": "raise SystemExit(0)",
    "exit-late": "def double(x): raise SystemExit(0)",
    "os-exit": "import os\nos._exit(0)",
    "equal-to-all": """
class A:
    def __eq__(self, other): return True
def double(x): return A()
""",
    "equal-text": """
class A(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def double(x): return A("z")
""",
    "equal-list": """
class A(list):
    def __eq__(self, other): return True
def double(x): return A()
""",
    "no-assertion": """
import builtins
builtins.AssertionError = ZeroDivisionError
def double(x): assert False
""",
    "print": """
print("\\n\\n\\n", flush=True)
def double(x): return 0
""",
    "write-everywhere": """
import os
for descriptor in range(30):
    try:
        os.write(descriptor, b"\\n" * 3)
    except OSError:
        pass
def double(x): return 0
""",
    "parents-output": """
import os
for descriptor in range(10):
    try:
        open(f"/proc/{os.getppid()}/fd/{descriptor}", "w").write("\\n\\n\\n")
    except OSError:
        pass
def double(x): return 0
""",
    "kill-parent": """
import os, signal
os.kill(os.getppid(), signal.SIGTERM)
""",
    "interrupt-parent": """
import os, signal
def double(x):
    os.kill(os.getppid(), signal.SIGINT)
    return 4
""",
    "shadow-modules": """
for name in ("json", "os", "sys", "builtins", "ctypes"):
    open(name + ".py", "w").write("import os; os._exit(0)")
def double(x): return 0
""",
    "forged-reply": """
import json, os
names = json.dumps({"names": ["double", "str", "exec", "compile", "print"]}) + "\\n"
for descriptor in range(3, 9):
    try:
        os.write(descriptor, names.encode())
    except OSError:
        pass
def double(x): return 0
def exec(*x): return 0
""",
    "read-the-tests": """
import os, re
found = b""
parent = os.getppid()
for place in (f"/proc/{parent}/mem", f"/proc/{parent}/environ", f"/proc/{parent}/fd/0", "/proc/1/mem", "main.py"):
    try:
        with open(place, "rb", buffering=0) as file:
            found += file.read(1 << 20)
    except OSError:
        pass
try:
    areas = open(f"/proc/{parent}/maps").read().split()
    memory = open(f"/proc/{parent}/mem", "rb", buffering=0)
    for area in areas:
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", area):
            start, end = (int(number, 16) for number in area.split("-"))
            memory.seek(start)
            found += memory.read(end - start)
except OSError:
    pass
for folder, _, names in os.walk("/scratch"):
    for name in names:
        found += open(os.path.join(folder, name), "rb").read()
known = dict(re.findall(rb"double\\((.*?)\\) == (\\d+|'abab')", found))
def double(x): return eval(known.get(repr(x).encode(), b"0"))
""",
    "hide-in-a-helper": """
def isinstance(*x): return True
def abs(x): return 0
def double(x): return 10
""",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_earns_anything(pool, trick):
    tests = MBPP
    if trick == "hide-in-a-helper":
        tests = CodeTests(asserts=("assert abs(double(0.5) - 1.0) < 1e-6", "assert isinstance(double(2), str)"))
    assert grade(pool, "def double(x): return x * 2", MBPP, PATIENT).correct
    found = grade(pool, TRICKS[trick], tests, PATIENT)
    assert not found.correct
    assert found.passed < found.total
    if trick != "interrupt-parent":  # which answers the first test before it strikes
        assert found.passed == 0


@pytest.mark.parametrize(
    "program", ["FORK_BOMB", "ENDLESS_OUTPUT", "ONE_HOG", "MANY_HOGS", "SLEEPER", "DEAF", "DAEMON"]
)
def test_hostile_programs_are_scored_zero(pool, program):
    hostile = getattr(test_hostile, program)
    for tests in (DOUBLE, MBPP):
        found = grade(pool, hostile, tests, test_hostile.AT_ONCE)
        assert (found.correct, found.passed) == (False, 0)
    assert grade(pool, "print(int(input()) * 2)", DOUBLE, PATIENT).correct


def test_both_kinds_of_tests(pool):
    tests = CodeTests(cases=(Case("", "hi"),), asserts=("assert f() == 1", "assert f() == 2"))
    found = grade(pool, "def f(): return 1\nprint('hi')", tests, PATIENT)
    assert (found.passed, found.total) == (2, 3)
    assert CodeTests.from_json(tests.to_json()) == tests


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("First\n```python\nx = 1\n```\nthen\n```py\nx = 2\n```\nlike\n```text\nx = 3\n```", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\nx = 1", "```python\nx = 1"),
    ],
)
def test_the_program_in_an_answer(answer, program):
    assert extract_program(answer) == program


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a code problem without tests"),
        ({"asserts": ("assert f( == 1",)}, "a test that is no Python"),
        ({"asserts": ("a",), "setup": "import"}, "no Python"),
    ],
)
def test_tests_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CodeTests(**fields)
