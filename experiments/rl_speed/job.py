"""What one process of `rl_speed` or `rl_split` does, and how its figures come back."""

import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a step: so many responses to so many prompts, all of full length, dealt out to so many updates."""

    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    updates: int
    rows: int
    """of a micro-batch, ours"""
    warm: int
    """steps at first that are not counted"""

    @property
    def row_length(self) -> int:
        """Two responses."""
        return 2 * (self.prompt_tokens + self.new_tokens)


CPU = Sizes(prompts=8, samples=8, prompt_tokens=10, new_tokens=32, updates=1, rows=8, warm=3)
GPU = Sizes(prompts=32, samples=8, prompt_tokens=64, new_tokens=512, updates=16, rows=8, warm=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training.

    Both sides take a directory with a tokenizer and a config.json; where no weights are beside it, they are random.
    """

    model: str
    run: str
    steps: int
    sizes: Sizes
    mesh: str = ""
    generator_mesh: str = ""
    staleness: int = 0
    share_prompts: bool = False
    keep_memory: bool = True
    """see `m1jax.train.allocator`"""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        values = json.loads(text)
        return cls(**values | {"sizes": Sizes(**values["sizes"])})


Lines = list[dict[str, float]]


def lines_of(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Lines:
    """Runs a program and returns what it says of its steps, a line of JSON each; they also go to `log` as they come.

    Raises:
        SystemExit: it failed.
    """
    found: Lines = []
    with tempfile.TemporaryFile("w+") as errors, log.open("a") as kept:
        environment = {**os.environ, **environment}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as program:
            assert program.stdout is not None
            for line in filter(lambda line: line.startswith('{"'), program.stdout):
                found.append(json.loads(line))
                kept.write(line)
                kept.flush()
                print(command[-2], line, end="", flush=True)
        if program.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-4000:]}")
    return found


def medians(lines: Lines, warm: int) -> dict[str, float]:
    """Of the steps behind the first `warm`, and how many they are."""
    counted = [line for line in lines if line["number"] > warm]
    names = [name for name in counted[0] if name != "number"]
    return {"steps": len(counted)} | {name: statistics.median(line[name] for line in counted) for name in names}
