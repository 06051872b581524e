"""Two GPUs, one that generates and one that trains, beside steps that do one after the other.

256 responses of 512 tokens to 32 prompts of 512, 16 updates of CISPO, random weights, bfloat16.
Three trainings, each in a process of its own: on one card; on both cards, which generate and then train together
(--mesh fsdp=2); one card generating beside the other that trains (--generator-mesh data=1, staleness 1). Run:

    python -m experiments.rl_split.rl_split --preset m1-1b
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

from experiments.rl_speed.job import CPU, GPU, Job, lines_of, medians
from experiments.rl_speed.rl_speed import MODEL, write_models
from m1jax import ModelConfig

HERE = Path(__file__).parent
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "split": {"generator_mesh": "data=1", "staleness": 1},
    "both": {"mesh": "fsdp=2"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What to run and where to write it."""

    preset: str = "m1-1b"
    prompt_tokens: int = 512
    """More of them make training dearer and generation hardly: what two cards can gain depends on their balance."""
    steps: int = 6
    """Of each; the first one or two are not counted."""
    ways: tuple[str, ...] = tuple(WAYS)
    """one, split, both"""
    cpu: bool = False
    """A rehearsal: two devices of the host, the sizes of `rl_speed` on a CPU."""
    out: Path = HERE / "result.json"


def main(config: Config) -> None:
    """Prints a table and writes the figures, as far as they are there."""
    sizes = CPU if config.cpu else dataclasses.replace(GPU, prompt_tokens=config.prompt_tokens)
    result: dict[str, dict[str, float]] = {}
    log = config.out.with_suffix(".jsonl")
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        write_models(home, MODEL if config.cpu else ModelConfig.preset(config.preset), weights=False)
        for way in config.ways:
            job = Job(
                model=str(home / "ours"), run=str(home / way), steps=config.steps, sizes=sizes, **WAYS[way]
            ).to_json()
            flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"} if config.cpu else {}
            if way == "one" and not config.cpu:
                flags["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            lines = lines_of([sys.executable, "-m", "experiments.rl_speed.ours", job], flags, log)
            # The first step of a split waits for its own batch, the second's was written beside the compilation.
            result[way] = medians(lines, min(sizes.warm + 2 * (way == "split"), len(lines) - 1))
            config.out.write_text(json.dumps(with_ratios(result), indent=1) + "\n")
    print(json.dumps(with_ratios(result), indent=1))


def with_ratios(result: dict[str, dict[str, float]]) -> dict[str, Any]:
    """How much faster than on one card."""
    faster = {way: result["one"]["step"] / found["step"] for way, found in result.items()} if "one" in result else {}
    return {"seconds": result, "faster": faster}


if __name__ == "__main__":
    main(tyro.cli(Config))
