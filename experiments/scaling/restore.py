"""A checkpoint saved on all cards and restored on half of them; a job of two processes, one killed, started again.

    python -m experiments.scaling.restore --cards 4 --out results

All through `m1jax`'s own commands on a small model: 12 updates of `train pretrain` on all cards in one process; its
checkpoint of update 6, gone on with on half of the cards; the same 12 updates by `m1jax launch --processes 2`, of which
one is killed (SIGKILL) on the way, and the same command once more. Losses must be those of the first run up to
rounding; parameters restored on either mesh the same to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

UPDATES, SAVED = 12, 6
RECIPE = ["--steps", str(UPDATES), "--context", "256", "--batch-tokens", "4096", "--micro-batch-tokens", "4096"]
RECIPE += ["--log-every", "1", "--warmup-steps", "2", "--learning-rate", "1e-3"]


class Job:
    """Commands on a model in a folder."""

    def __init__(self, folder: Path, preset: str, cpu: bool):
        self.folder, self.preset, self.cpu = folder, preset, cpu
        self.model, self.runs = folder / "model", folder / "runs"

    def start(self, name: str, arguments: list[str], cards: int, processes: int = 1) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-u", "-m", "m1jax.cli"]
        environment = dict(os.environ)
        if self.cpu:
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cards}"
        else:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(cards)))
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        if processes > 1:
            line += ["launch", "--processes", str(processes)]
            line += [*(["--devices", str(cards // processes)] if self.cpu else []), "--"]
        with self.folder.joinpath(f"restore {name}.log").open("ab") as log:
            return subprocess.Popen([*line, *arguments], env=environment, stdout=log, stderr=log)

    def train(self, name: str, mesh: str, *more: str, cards: int, processes: int = 1) -> subprocess.Popen[bytes]:
        data = str(Path(__file__).parents[2] / "CHANGELOG.md")
        arguments = ["train", "pretrain", str(self.model), "--data", data, "--runs", str(self.runs), "--name", name]
        return self.start(name, [*arguments, "--mesh", mesh, *RECIPE, *more], cards, processes)

    def losses(self, name: str) -> dict[int, float]:
        """Update -> loss, each update's last line."""
        file = self.runs / name / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {record["step"]: record["nll"] for record in records if "nll" in record}


def finished(process: subprocess.Popen[bytes], what: str) -> None:
    if process.wait():
        raise SystemExit(f"{what} failed with status {process.returncode}; see its log")


def on_half(job: Job, cards: int) -> dict[str, Any]:
    finished(job.train("all", f"fsdp={cards}", "--checkpoint-every", str(SAVED), cards=cards), "all cards")
    branch = ["--from", f"{job.runs}/all:{SAVED}", "--checkpoint-every", str(SAVED)]
    half = job.train("half", f"fsdp={cards // 2}", *branch, cards=cards // 2)
    finished(half, "half of the cards")
    return {"all": job.losses("all"), "half": job.losses("half")}


def killed(job: Job, cards: int) -> dict[str, Any]:
    """Both runs are one: the second process of the first attempt dies when update 4 is recorded."""

    def start() -> subprocess.Popen[bytes]:
        return job.train("killed", f"fsdp={cards}", "--checkpoint-every", "2", cards=cards, processes=2)

    launcher = start()
    while launcher.poll() is None and max(job.losses("killed"), default=0) < 4:
        time.sleep(0.02)
    reached = max(job.losses("killed"), default=0)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    status = launcher.wait()
    began = time.monotonic()
    finished(start(), "the second start")
    return {
        "killed after update": reached,
        "status of the launcher": status,
        "second start s": time.monotonic() - began,
        "killed": job.losses("killed"),
    }


def values(folder: Path, cards: int) -> None:
    """Prints how many parameters of the saved checkpoint differ between the two meshes (a process of its own)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from m1jax import MiniMaxM1
    from m1jax.checkpoint import Checkpoints
    from m1jax.sharding import make_mesh, parameter_shardings
    from m1jax.weights.directory import read_config

    config = read_config(folder / "model")
    shapes = nnx.split(nnx.eval_shape(lambda: MiniMaxM1(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)))[1]
    found = []
    for count in (cards, cards // 2):
        mesh = make_mesh(f"fsdp={count}", jax.devices()[:count])
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, parameter_shardings(shapes, mesh)
        )
        restored = Checkpoints(folder / "runs/all/checkpoints/pretrain", config=config).restore(
            params=target, step=SAVED
        )
        assert restored is not None
        found.append(jax.device_get(jax.tree.leaves(restored.params)))
    differ = sum(int(np.sum(a != b)) for a, b in zip(*found))
    print(json.dumps({"parameters": sum(a.size for a in found[0]), "differ": differ}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--preset", default="m1-demo")
    parser.add_argument("--cpu", action="store_true", help="on as many forced CPU devices")
    parser.add_argument("--values", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    folder = chosen.out.absolute()
    if chosen.values:
        return values(folder, chosen.cards)
    folder.mkdir(parents=True, exist_ok=True)
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))  # the jobs, too
    job = Job(folder, chosen.preset, chosen.cpu)
    finished(job.start("init", ["init", chosen.preset, str(job.model)], 1), "init")
    with ThreadPoolExecutor() as pool:
        parts = [pool.submit(on_half, job, chosen.cards), pool.submit(killed, job, chosen.cards)]
        result: dict[str, Any] = {}
        for part in parts:
            try:
                result |= part.result()
            except (Exception, SystemExit) as error:  # the other part goes on
                print(f"{type(error).__name__}: {error}", flush=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} if chosen.cpu else dict(os.environ)
    if chosen.cpu:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={chosen.cards}"
    command = [sys.executable, "-m", "experiments.scaling.restore", "--values", "--cards", str(chosen.cards), "--out"]
    checked = subprocess.run([*command, str(folder)], env=environment, stdout=subprocess.PIPE, text=True)
    if checked.returncode == 0:
        result["values"] = json.loads(checked.stdout.splitlines()[-1])
    straight = result.get("all", {})
    for name in ("half", "killed"):
        both = [abs(loss - straight[n]) for n, loss in result.get(name, {}).items() if n in straight]
        result[f"{name}: largest difference of loss"] = max(both, default=None)
    folder.joinpath("restore.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
