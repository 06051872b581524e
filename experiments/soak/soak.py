"""SIGKILLs at random moments of a small training (SFT, then CISPO): restarts go on, the end is the same to the bit.

    python experiments/soak/soak.py [KILLS] [SEED]        # make soak

A moment is drawn evenly from the time that the undisturbed training takes: importing, compiling, restoring, training,
saving and exporting are all hit. A training that ends before its next kill is compared and another one begun.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from m1jax.train.meter import MEASURED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def worker(directory: Path) -> None:
    """The training of tests/rl/tiny_run.py, longer and with more checkpoints."""
    sys.path.insert(0, str(ROOT / "tests" / "rl"))
    import tiny_run  # pyright: ignore[reportMissingImports]

    from m1jax import save_pretrained

    tiny_run.SFT = dataclasses.replace(tiny_run.SFT, steps=20, checkpoint_every=4)
    tiny_run.RL = dataclasses.replace(tiny_run.RL, iterations=5)
    save_pretrained(tiny_run.train(directory), directory / "export")


def start(directory: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, __file__, "worker", str(directory)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def result(directory: Path) -> tuple[dict[str, bytes], list[dict]]:
    """The exported weights, and the metrics without those that measure time."""
    weights = {file.name: file.read_bytes() for file in (directory / "export").glob("*.safetensors")}
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


def reached(directory: Path) -> str:
    """How far a killed training was, as its files tell."""
    if (directory / "export").exists():
        return "exported"
    newest = {}
    for phase in ("sft", "rl"):
        places = directory.glob(f"checkpoints/{phase}/*")
        newest[phase] = max((int(p.name) for p in places if p.name.isdecimal()), default=None)
    saving = any(directory.glob("checkpoints/*/*.partial"))
    phase = "rl" if newest["rl"] is not None else "sft" if newest["sft"] is not None else "before the first checkpoint"
    return phase + (", while saving" if saving else "")


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"a start failed with status {process.returncode}:\n{errors}")


def main(kills: int, seed: int) -> None:
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for warm in ("warm", "undisturbed"):  # the first one fills the compilation cache
            began = time.monotonic()
            finish(start(home / warm, home / "cache"))
        duration = time.monotonic() - began
        expected = result(home / "undisturbed")
        assert expected[0]
        assert result(home / "warm") == expected
        print(f"undisturbed: {duration:.1f} s", flush=True)
        done, rounds, where = 0, 0, Counter()
        while done < kills or (home / f"round-{rounds}").exists():
            directory = home / f"round-{rounds}"
            process = start(directory, home / "cache")
            if done < kills:
                try:
                    process.wait(generator.uniform(0, duration))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    directory.mkdir(exist_ok=True)  # a kill while Python starts counts like any other
                    done += 1
                    where[reached(directory)] += 1
                    print(f"kill {done}: {reached(directory)}", flush=True)
                    continue
            finish(process)
            if result(directory) != expected:
                sys.exit(f"round {rounds} ended differently")
            rounds += 1
            print(f"round {rounds}: the same to the bit after {done} kills in all", flush=True)
        text = {"kills": done, "trainings": rounds, "seconds_undisturbed": round(duration, 1), "killed": dict(where)}
        (HERE / "result.json").write_text(json.dumps(text, indent=1) + "\n")
        print(json.dumps(text))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]))
    else:
        main(*map(int, (sys.argv[1:] + ["30", "0"][len(sys.argv) - 1 :])[:2]))
