"""Workers that die, callers that die, and what is left of them: nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from m1jax import sandbox
from m1jax.errors import UserError
from m1jax.sandbox import Limits, Result
from tests.sandbox import counted

FOREVER = Limits(wall_seconds=300, cpu_seconds=300)


def in_order(process):
    """A process and those below it, parents first: waiter, zygote, supervisor, and what runs."""
    with open(f"/proc/{process}/task/{process}/children") as file:
        children = [int(child) for child in file.read().split()]
    return [process, *(found for child in children for found in in_order(child))]


def worker_of(pool):
    return pool._workers[0]._process.pid


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("waited for a minute")


@pytest.mark.parametrize("who", [0, 1, 2], ids=["waiter", "zygote", "supervisor"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_is_replaced(who, number):
    before = counted.ours()
    with sandbox.Pool(1) as pool:
        assert pool.run("print(1)").stdout == "1\n"
        first = worker_of(pool)
        wait_for(lambda: len(in_order(first)) == 3)
        os.kill(in_order(first)[who], number)
        if (who, number) != (1, signal.SIGTERM):  # the kernel spares first processes what they have no handler for
            wait_for(lambda: len(counted.ours() - before) <= 1)
        assert pool.run("print(2)").stdout == "2\n"
        assert (worker_of(pool) == first) == ((who, number) == (1, signal.SIGTERM))
    assert counted.ours() == before


@pytest.mark.parametrize("who", [0, 1, 2, 3, 4], ids=["waiter", "zygote", "supervisor", "init", "program"])
def test_killed_while_a_program_runs(who):
    """The program is run once more, and ends as it should; of the first attempt nothing is left."""
    before = counted.ours()
    with sandbox.Pool(1) as pool:
        pool.run("pass")
        results = []
        program = "print(input(), flush=True)\nimport time\ntime.sleep(1.5)"
        thread = threading.Thread(target=lambda: results.append(pool.run(program, stdin="x\n", limits=FOREVER)))
        thread.start()
        wait_for(lambda: len(in_order(worker_of(pool))) == 5)
        os.kill(in_order(worker_of(pool))[who], signal.SIGKILL)
        thread.join()
        if who == 3:  # which only the kernel does, for want of memory
            assert (results[0].status, results[0].reason) == (None, "memory")
        elif who == 4:
            assert (results[0].status, results[0].reason) == (-9, "error")
        else:
            assert results == [Result(0, "x\n", "", "ok")]
        assert pool.run("print(3)").stdout == "3\n"
    assert counted.ours() == before


def test_a_program_that_kills_its_worker_is_not_run_for_ever(monkeypatch):
    with sandbox.Pool(1) as pool:
        attempts = []

        def ask(worker, job):
            attempts.append(worker._process.pid)
            os.kill(worker._process.pid, signal.SIGKILL)
            return real(worker, job)

        from m1jax.sandbox.pool import _Worker

        real = _Worker._ask
        monkeypatch.setattr(_Worker, "_ask", ask)
        result = pool.run("print(1)")
        assert (result.reason, result.status, len(set(attempts))) == ("error", None, 2)
        assert "worker died twice" in result.stderr
        monkeypatch.undo()
        assert pool.run("print(1)").stdout == "1\n"


def test_closing_ends_what_still_runs():
    before = counted.ours()
    pool = sandbox.Pool(2)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(pool.run, "while True: pass", limits=FOREVER)
        wait_for(lambda: len(counted.ours() - before) >= 5)
        pool.close()
        with pytest.raises(UserError, match="closed"):
            running.result()
    assert counted.ours() == before
    with pytest.raises(UserError, match="closed"):
        pool.run("pass")


def test_nothing_outlives_the_process_that_asked():
    script = """
import sys, threading
from m1jax import sandbox
pool = sandbox.Pool(1)
threading.Thread(target=pool.run, args=("while True: pass",),
                 kwargs=dict(limits=sandbox.Limits(wall_seconds=300, cpu_seconds=300)), daemon=True).start()
print(pool._workers[0]._process.pid, flush=True)
threading.Event().wait()
"""
    asking = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(asking.stdout.readline())
    wait_for(lambda: len(in_order(worker)) == 5)
    everybody = in_order(worker)
    asking.kill()
    asking.wait()
    asking.stdout.close()
    wait_for(lambda: not any(alive(process) for process in everybody))


def alive(process):
    """Whether it runs; init may take its time to reap one that does not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_pool_has_workers():
    with pytest.raises(UserError, match="workers = 0 must be at least 1"):
        sandbox.Pool(0)
