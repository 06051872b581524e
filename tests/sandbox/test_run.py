"""What a program gets, what it gives back, and what callers may ask for."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m1jax import sandbox
from m1jax.errors import UserError
from m1jax.sandbox import Limits, Result

PATIENT = Limits(cpu_seconds=60, wall_seconds=90)


def test_one_program():
    assert sandbox.run("print(input()[::-1])", stdin="abc\n") == Result(0, "cba\n", "", "ok")
    sandbox.require()


@pytest.mark.parametrize(
    ("program", "status", "stdout", "last"),
    [
        ("print(1, end='')", 0, "1", ""),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero"),
        ("def f(:", 1, "", "SyntaxError: invalid syntax"),
        ("x = '\0'", 1, "", "SyntaxError: source code string cannot contain null bytes"),
        ("raise SystemExit(3)", 3, "", ""),
        ("exit('no')", 1, "", "no"),
        ("import os; os.kill(os.getpid(), 15)", -15, "", ""),
        ("import os; os._exit(4)", 4, "", ""),
        ("import atexit; atexit.register(print, 'end'); print('begin')", 0, "begin\nend\n", ""),
        ("import threading; threading.Thread(target=print, args=('thread',)).start()", 0, "thread\n", ""),
        ("from multiprocessing import Pool\nprint(sum(Pool(2).map(abs, [-1, -2])))", 0, "3\n", ""),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\x00 \\xc3\\xa9')", 0, "\ufffd\0 é", ""),
        ("print('\U0001f642 é')", 0, "\U0001f642 é\n", ""),
        (
            "import sys; print(sys.stdin.read() == '', sys.argv, __name__, __file__)",
            0,
            "True ['main.py'] __main__ /scratch/main.py\n",
            "",
        ),
        (
            "import dataclasses as d, pickle\n@d.dataclass\nclass A:\n x: int\nprint(pickle.loads(pickle.dumps(A(3))))",
            0,
            "A(x=3)\n",
            "",
        ),
        ("import numpy; print(numpy.__version__)", 0, f"{np.__version__}\n", ""),
        ("import init", 1, "", "ModuleNotFoundError: No module named 'init'"),
        ("import m1jax", 1, "", "ModuleNotFoundError: No module named 'm1jax'"),
    ],
    ids=range(18),
)
@pytest.mark.parametrize("form", ["source", "command"])
def test_python_is_python(pool, program, status, stdout, last, form):
    """A program given as source does what the interpreter would do with it as a file."""
    if form == "command":
        quoted = (
            f"open('main.py', 'w').write({program!r})\nimport os, sys\nos.execv(sys.executable, ['python', 'main.py'])"
        )
        result = pool.run(["python3", "-c", quoted], limits=PATIENT)
    else:
        result = pool.run(program, limits=PATIENT)
    lines = result.stderr.splitlines()
    assert (result.status, result.stdout) == (status, stdout), result
    assert (lines[-1] if lines else "").replace("source code cannot", "source code string cannot") == last
    assert not any("zygote" in line for line in lines)
    assert result.reason == ("ok" if status == 0 else "error")


def test_the_same_program_has_the_same_result(pool):
    program = "print({'a', 'b', 'c', 'd'}, hash('x'))"
    assert len({pool.run(program).stdout for _ in range(3)} | {pool.run(["python", "-c", program]).stdout}) == 1


def test_random_numbers_are_not_the_same_each_time(pool):
    assert len({pool.run("import random; print(random.random())").stdout for _ in range(3)}) == 3


def test_other_programs(pool):
    result = pool.run(
        ["sh", "-c", "cat > a; wc -c < a; pwd; echo $0 $1; echo oh >&2; exit 5", "x", "y z"], stdin="four"
    )
    assert result == Result(5, "4\n/scratch\nx y z\n", "oh\n", "error")
    assert pool.run(["no-such-program"]) == Result(127, "", "no-such-program: No such file or directory", "error")
    assert pool.run([sys.executable, "-c", "print(1)"]).stdout == "1\n"
    # `yes` is ended by the broken pipe, which Python ignores and others must not.
    assert pool.run(["sh", "-c", "yes | head -n 1"]) == Result(0, "y\n", "", "ok")


def test_much_input_and_output(pool):
    text = "0123456789" * 200_000
    limits = Limits(wall_seconds=90, output=len(text))
    assert pool.run("import sys; sys.stdout.write(sys.stdin.read())", stdin=text, limits=limits).stdout == text
    assert pool.run("pass", stdin=text, limits=limits) == Result(0, "", "", "ok")
    assert (
        pool.run("import sys; sys.stdout.write(sys.stdin.read() + '.')", stdin=text, limits=limits).reason == "output"
    )
    big = "x = 1  # " + text
    assert pool.run(big + "\nprint(x)", limits=limits).stdout == "1\n"
    small = Limits(wall_seconds=90, files=1 << 20)
    assert pool.run(big, limits=small) == Result(127, "", "main.py: File too large", "error")


def test_memory_limit_as_python_sees_it(pool):
    limits = Limits(wall_seconds=90, memory=200 << 20)
    program = "try:\n    x = bytearray(300 << 20)\nexcept MemoryError:\n    print('caught')\ny = bytearray(50 << 20)"
    assert pool.run(program, limits=limits) == Result(0, "caught\n", "", "ok")


def test_memory_that_processes_share_counts_once(pool):
    program = """
import os, time
held = bytearray(b"x") * (100 << 20)
children = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        time.sleep(0.3)
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
print("shared")
"""
    assert pool.run(program, limits=Limits(wall_seconds=90, memory=200 << 20)) == Result(0, "shared\n", "", "ok")


@pytest.mark.parametrize("name", ["cpu_seconds", "wall_seconds", "memory", "processes", "files", "output"])
def test_limits_are_above_zero(name):
    with pytest.raises(UserError, match=f"{name} = 0 must be more than zero"):
        Limits(**{name: 0})


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "command is empty"), ([""], "command is empty"), (["a\0b"], "NUL character")],
)
def test_commands_that_cannot_be(command, message):
    with pytest.raises(UserError, match=message):
        sandbox.run(command)


def test_many_in_parallel():
    with sandbox.Pool(3) as pool, ThreadPoolExecutor(6) as threads:
        results = list(threads.map(lambda number: pool.run("print(input())", stdin=f"{number}\n"), range(30)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(30)]
