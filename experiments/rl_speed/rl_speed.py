"""A step of reinforcement learning on CPU beside TRL's: same weights, same sizes, same threads.

64 responses of 32 tokens to 8 prompts, one update of CISPO on them, a model of 2.7 M parameters. TRL's `GRPOTrainer`
(loss_type "cispo") trains Transformers' native `minimax` from the same files. Run:

    python -m experiments.rl_speed.rl_speed --trl .venv-trl/bin/python

where that interpreter has TRL; without it, only ours is timed. Both train in turn, each in a process of its own.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro
from flax import nnx

from m1jax import MiniMaxM1, ModelConfig, save_pretrained
from m1jax.chat import Tokenizer

HERE = Path(__file__).parent
MODEL = ModelConfig(
    vocab_size=263,
    hidden_size=128,
    intermediate_size=160,
    layer_types=("lightning",) * 7 + ("softmax",),
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=16,  # all channels: Transformers knows no other
    num_experts=4,
    experts_per_token=2,
    initializer_range=0.05,
)
PROMPTS, SAMPLES, LENGTH = 8, 8, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    trl: Path | None = None
    """An interpreter with TRL."""
    steps: int = 12
    """Training steps of each run; the first four are not counted."""
    repeat: int = 2
    """Runs of each, in turn."""
    threads: int = 2
    """PyTorch's threads; XLA takes one per core it may use."""
    out: Path = HERE / "result.json"


def main(config: Config) -> None:
    """Prints a table and writes the figures."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        model = MiniMaxM1(MODEL, rngs=nnx.Rngs(0))
        save_pretrained(model, home / "ours")
        Tokenizer.tiny().save(home / "ours")
        if config.trl is not None:
            save_pretrained(model, home / "theirs", layout="transformers")
            Tokenizer.tiny().save(home / "theirs")
        for turn in range(config.repeat):
            arguments = ["-m", "experiments.rl_speed.ours", str(home / "ours"), str(home / f"run{turn}")]
            found["ours"] += timed([sys.executable, *arguments, str(config.steps)], {})
            if config.trl is not None:
                threads = {"OMP_NUM_THREADS": str(config.threads)}
                arguments = [str(HERE / "theirs.py"), str(home / "theirs"), str(config.steps)]
                found["trl"] += timed([str(config.trl), *arguments], threads)
    medians = {
        side: {name: statistics.median(step[name] for step in steps) for name in ("step", "generation", "processor")}
        for side, steps in found.items()
        if steps
    }
    result: dict[str, Any] = {"seconds": medians, "steps": {side: len(steps) for side, steps in found.items()}}
    if "trl" in medians:
        result["faster"] = {name: medians["trl"][name] / medians["ours"][name] for name in medians["ours"]}
    config.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def timed(command: list[str], environment: dict[str, str]) -> list[dict[str, float]]:
    """Seconds of each counted step, as the program prints them, a line of JSON each: `step`, its `generation`, and the
    `processor` time of all threads."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return [line for line in lines if line["number"] >= 4]


class Clock:
    """Adds up the seconds of some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


if __name__ == "__main__":
    main(tyro.cli(Config))
