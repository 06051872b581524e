"""Does training scale over the GPUs of one host? An update on meshes of one, two, four and more cards.

    python -m experiments.scaling.scaling --cards 4 --out results

Weak scaling: each card has 8 rows of 4,096 tokens (sequence: one of 32,768); under tensor and sequence a mesh has as
many rows as its cards together would have. Strong scaling: 8 rows in all. Cases that train on the same rows, one card
among them, must find the same loss and gradient norm. Beside them a model near 7 B, and one row of 1,048,576 tokens.

All cases are compiled first, at the same time, each in its own process, which ends: its cards' memory is free again.
Then they are started once more, find their programs in JAX's cache, and are timed one after another, or beside each
other on cards of their own. What was found is in the folder at once; a case that fails leaves its last words.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.scaling.cases import REHEARSAL, Case, Sizes, cases

AHEAD = 5  # started and waiting for their cards: each holds half a gigabyte of them
LIMIT = 120  # seconds that a case may have its cards


class Schedule:
    """Processes of cases, the cards they have, and when everything must end."""

    def __init__(self, folder: Path, cards: int, seconds: float, compile_seconds: float, rehearsal: bool):
        self.folder, self.cards, self.rehearsal = folder, cards, rehearsal
        self.began = time.monotonic()
        self.end, self.compiled_by = self.began + seconds, self.began + compile_seconds
        self.locks = [threading.Lock() for _ in range(cards)]
        self.running: set[subprocess.Popen[bytes]] = set()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", flush=True)

    def start(self, case: Case, chosen: list[int], compile_only: bool) -> subprocess.Popen[bytes]:
        self.folder.joinpath(f"{case.name}.case").write_text(json.dumps(dataclasses.asdict(case)))
        arguments = [str(self.folder), case.name, *(["--compile"] if compile_only else [])]
        devices = case.cards // case.processes
        command = [sys.executable, "-m", "experiments.scaling.worker", *arguments]
        if case.processes > 1:
            script = str(Path(__file__).with_name("worker.py"))
            command = [sys.executable, "-m", "m1jax.cli", "launch", "--processes", str(case.processes)]
            command += [*(["--devices", str(devices)] if self.rehearsal else []), "--", script, *arguments]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.folder / "cache")),
            "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",  # the next process finds the program
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {case.flags}".strip(),
        }
        if self.rehearsal:
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        if compile_only:  # so that what was taken to try kernels is given back at once
            environment["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
        with self.folder.joinpath(f"{case.name}.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.running.add(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.running.discard(process)

    def compile(self, every: list[Case], at_once: int) -> None:
        """All cases; returns when they are done, or late."""

        def one(number: int, case: Case) -> None:
            process = self.start(case, self.choose(number, case), compile_only=True)
            while process.poll() is None and time.monotonic() < self.compiled_by:
                time.sleep(0.1)
            late = process.poll() is None
            self.stop(process)
            status = "was too late" if late else "is compiled" if process.returncode == 0 else "FAILED to compile"
            self.say(f"{case.name} {status}{self.last_words(case) if process.returncode else ''}")

        with ThreadPoolExecutor(at_once) as pool:
            for future in [pool.submit(one, number, case) for number, case in enumerate(every)]:
                future.result()

    @contextlib.contextmanager
    def having(self, chosen: list[int]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for card in sorted(chosen):
                stack.enter_context(self.locks[card])
            yield

    def choose(self, number: int, case: Case) -> list[int]:
        """Cards next to each other; first is another one for each case, because there XLA tries kernels."""
        first = number * (case.cards if case.cards < self.cards else 1) % self.cards
        return [(first + i) % self.cards for i in range(case.cards)]

    def measure(self, every: list[Case]) -> None:
        def one(case: Case, chosen: list[int]) -> None:
            if time.monotonic() > self.end - 20:
                return self.say(f"{case.name} left out: no time")
            process = self.start(case, chosen, compile_only=False)
            ready = [self.folder / f"{case.name}.{number}.ready" for number in range(case.processes)]
            while process.poll() is None and not all(f.exists() for f in ready) and time.monotonic() < self.end:
                time.sleep(0.05)
            with self.having(chosen):
                began = time.monotonic()
                self.folder.joinpath(f"{case.name}.go").touch()
                limit = min(self.end, began + LIMIT)
                while process.poll() is None and time.monotonic() < limit:
                    time.sleep(0.05)
                late = process.poll() is None
                self.stop(process)
            found = self.folder / f"{case.name}.json"
            if found.exists():
                return self.say(f"{shown(json.loads(found.read_text()))} ({time.monotonic() - began:.0f} s)")
            why = f"took more than {time.monotonic() - began:.0f} s" if late else "failed"
            self.say(f"{case.name} {why}{self.last_words(case)}")

        with ThreadPoolExecutor(AHEAD) as pool:
            for future in [pool.submit(one, case, self.choose(number, case)) for number, case in enumerate(every)]:
                future.result()

    def last_words(self, case: Case) -> str:
        lines = self.folder.joinpath(f"{case.name}.log").read_text(errors="replace").splitlines()
        told = [line for line in lines if line.strip() and "slow_operation_alarm" not in line]
        return "".join(f"\n          {line[:400]}" for line in told[-6:])


def shown(row: dict[str, Any]) -> str:
    trace = row.get("trace ms", {})
    share = f", collectives {trace['collectives']:.0f} ms, {trace['exposed']:.0f} alone" if trace else ""
    figures = f"{row['ms']:.1f} ms, {row['tokens/s']:,.0f} tokens/s, MFU {row['MFU %']:.1f} %{share}"
    return f"{row['name']}: {figures}, loss {row['loss']:.6f}, gradient {row['gradient norm']:.6f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, required=True, help="of this host, 2, 4 or 8")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--seconds", type=float, default=550, help="when everything ends")
    parser.add_argument("--compile-seconds", type=float, default=210, help="when compiling ends")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="cases that are compiled at a time")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--rehearsal", action="store_true", help="tiny models on a CPU: does everything run?")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    for old in (*chosen.out.glob("*.ready"), *chosen.out.glob("*.go"), *chosen.out.glob("*.log")):
        old.unlink()
    every = cases(chosen.cards, REHEARSAL if chosen.rehearsal else Sizes())
    every = [case for case in every if not chosen.only or case.name in chosen.only]
    schedule = Schedule(chosen.out, chosen.cards, chosen.seconds, chosen.compile_seconds, chosen.rehearsal)

    def leave(*_: Any) -> None:
        for process in list(schedule.running):
            schedule.stop(process)
        os._exit(143)  # threads wait for cases that are gone

    signal.signal(signal.SIGTERM, leave)
    schedule.compile(every, chosen.at_once)
    schedule.measure(every)


if __name__ == "__main__":
    main()
