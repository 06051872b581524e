"""A step of reinforcement learning beside TRL's: same weights, same sizes, same threads.

On a CPU: 64 responses of 32 tokens to 8 prompts, one update of CISPO on them, a model of 2.7 M parameters. On a GPU
(--gpu): 256 responses of 512 tokens to 32 prompts, 16 updates, `m1-1b` with random weights in bfloat16. TRL's
`GRPOTrainer` (loss_type "cispo") trains Transformers' native `minimax`. Run:

    python -m experiments.rl_speed.rl_speed --trl .venv-trl/bin/python

where that interpreter has TRL; without it, only ours is timed. Both train in turn, each in a process of its own.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import tyro
from flax import nnx

from experiments.rl_speed.job import CPU, GPU, Job, Lines, lines_of, medians
from m1jax import MiniMaxM1, ModelConfig, save_pretrained
from m1jax.chat import Tokenizer
from m1jax.config import Layout

HERE = Path(__file__).parent
MODEL = ModelConfig(
    vocab_size=263,
    hidden_size=128,
    intermediate_size=160,
    layer_types=("lightning",) * 7 + ("softmax",),
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    rotary_dim=16,
    num_experts=4,
    experts_per_token=2,
    initializer_range=0.05,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    trl: Path | None = None
    """An interpreter with TRL."""
    trl_path: str = ""
    """PYTHONPATH of that interpreter."""
    gpu: bool = False
    """The sizes for a GPU."""
    preset: str = "m1-1b"
    """The model on a GPU."""
    steps: int = 12
    """Training steps of each run; the first few are not counted."""
    repeat: int = 2
    """Runs of each, in turn."""
    rows: int | None = None
    """Of our micro-batches; None: what is best there."""
    share_prompts: bool = False
    """Ours computes the prompt of a group once in training."""
    devices: int = 1
    """As which a CPU is seen by ours: each of two cores does half of the rows."""
    keep_memory: bool = True
    """Ours keeps the memory that it frees."""
    threads: int = 2
    """PyTorch's threads on a CPU; XLA takes one per core it may use."""
    out: Path = HERE / "result.json"


def main(config: Config) -> None:
    """Prints a table and writes the figures."""
    sizes = GPU if config.gpu else CPU
    sizes = sizes if config.rows is None else dataclasses.replace(sizes, rows=config.rows)
    found: dict[str, Lines] = {"ours": [], "trl": []}
    log = config.out.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        write_models(home, ModelConfig.preset(config.preset) if config.gpu else MODEL, weights=not config.gpu)
        for turn in range(config.repeat):
            for side in found if config.trl is not None else ("ours",):
                run = home / f"{side}{turn}"
                job = Job(
                    model=str(home / side),
                    run=str(run),
                    steps=config.steps,
                    sizes=sizes,
                    mesh=f"data={config.devices}" if config.devices > 1 else "",
                    share_prompts=config.share_prompts,
                    keep_memory=config.keep_memory,
                ).to_json()
                around = {}
                if side == "ours":
                    if config.devices > 1:
                        flags = f"--xla_force_host_platform_device_count={config.devices}"
                        around["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
                    command = [sys.executable, "-m", "experiments.rl_speed.ours", job]
                else:
                    command = [str(config.trl), str(HERE / "theirs.py"), job]
                    around = {"PYTHONPATH": config.trl_path, "HF_HUB_OFFLINE": "1"}
                    if not config.gpu:
                        around["OMP_NUM_THREADS"] = str(config.threads)
                found[side] += lines_of(command, around, log)
                result = result_of(found, sizes.warm)
                config.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def result_of(found: dict[str, Lines], warm: int) -> dict[str, object]:
    """Medians of each side, and how much faster ours is."""
    seconds = {side: medians(lines, warm) for side, lines in found.items() if lines}
    if len(seconds) < 2:
        return {"seconds": seconds}
    names = ("step", "generation", "processor")
    return {"seconds": seconds, "faster": {name: seconds["trl"][name] / seconds["ours"][name] for name in names}}


def write_models(home: Path, model: ModelConfig, *, weights: bool) -> None:
    """Directories `ours` and `trl`: the same model for both, with or without its weights."""
    model = dataclasses.replace(model, rotary_dim=model.head_dim)  # all channels: Transformers knows no other
    built = MiniMaxM1(model, rngs=nnx.Rngs(0)) if weights else None
    layouts: dict[str, Layout] = {"ours": "official", "trl": "transformers"}
    for name, layout in layouts.items():
        if built is not None:
            save_pretrained(built, home / name, layout=layout)
        else:
            (home / name).mkdir()
            (home / name / "config.json").write_text(json.dumps(model.to_hf(layout)))
        Tokenizer.tiny().save(home / name)


if __name__ == "__main__":
    main(tyro.cli(Config))
