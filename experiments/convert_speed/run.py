"""How fast `m1jax convert` is against `cp`, and how much memory it takes. See README.md beside this file.

    python experiments/convert_speed/run.py make /tmp/convert_speed       # writes a synthetic checkpoint of 8.5 GB
    python experiments/convert_speed/run.py measure /tmp/convert_speed    # needs as much again, twice; removes all

The synthetic model has every kind of tensor under its official name: 8 layers, 16 experts, a vocabulary of 100,000.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from m1jax import ModelConfig
from m1jax.weights.names import tensors
from m1jax.weights.safetensors import Plan, Writer

HERE = Path(__file__).parent
CONFIG = ModelConfig(
    vocab_size=100_000,
    hidden_size=2048,
    intermediate_size=4608,
    layer_types=("lightning",) * 7 + ("softmax",),
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    rotary_dim=64,
    num_experts=16,
    experts_per_token=2,
)
# What is converted into what; each source was made by a line above it.
CASES = [
    ("official", "official", "resharded", ["--to", "official", "--shard-gb", "1"]),
    ("official", "orbax", "orbax", ["--to", "orbax"]),
    ("orbax", "official", "official_again", ["--to", "official"]),
    ("official", "official in float16", "half", ["--to", "official", "--dtype", "float16"]),
]


def make(directory: Path) -> None:
    """The source: random finite bfloat16 values, routers in float32."""
    source = directory / "source"
    source.mkdir(parents=True)
    plan = Plan((t.name, t.shape, np.dtype(np.float32 if t.router else ml_dtypes.bfloat16)) for t in tensors(CONFIG))
    block = np.random.default_rng(0).standard_normal(1 << 25, np.float32) * np.float32(0.02)
    blocks = {dtype: block.astype(dtype) for dtype in {entry.dtype for entry in plan.entries.values()}}
    with Writer(source, plan) as writer:
        for number, (name, entry) in enumerate(plan.entries.items()):
            size = int(np.prod(entry.shape))
            values = np.roll(blocks[entry.dtype], 977 * number)
            writer.write(name, np.resize(values, size).reshape(entry.shape))
        writer.finish()
    if (index := plan.index()) is not None:
        (source / "model.safetensors.index.json").write_bytes(index)
    (source / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"torch_dtype": "bfloat16"}))
    print(f"{source}: {plan.total_size / 1e9:.2f} GB in {len(plan.sizes)} files, {len(plan.entries)} tensors")


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def timed(command: list[str]) -> tuple[float, float, int, str]:
    """Seconds without and with `sync` behind it, peak anonymous memory in bytes, and what was printed."""
    os.sync()
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0]

    def watch() -> None:
        # Pages of mapped files belong to the page cache: they are not counted.
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = dict(re.findall(r"(RssAnon|RssShmem):\s+(\d+) kB", status))
            peak[0] = max(peak[0], 1024 * sum(map(int, found.values())))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    text, _ = process.communicate()
    seconds = time.monotonic() - began
    os.sync()
    synced = time.monotonic() - began
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{text}")
    return seconds, synced, peak[0], text


def measure(directory: Path) -> None:
    """Every case in one run, `cp` before and after each; writes results.json."""
    places = {"official": directory / "source", "orbax": directory / "orbax"}
    size = size_of(places["official"])
    subprocess.run(["cat", *map(str, sorted(places["official"].glob("*.safetensors")))], stdout=subprocess.DEVNULL)

    def cp() -> tuple[float, float]:
        copied = directory / "cp"
        seconds, synced, _, _ = timed(["cp", "-r", str(places["official"]), str(copied)])
        shutil.rmtree(copied)
        return seconds, synced

    rows, before = [], cp()
    for source, what, name, options in CASES:
        target = directory / name
        command = [sys.executable, "-m", "m1jax.cli", "convert", str(places[source]), str(target), *options]
        total, synced, peak, text = timed(command)
        copying, verifying = (float(re.search(rf"{w}: .* in ([\d.]+) s", text)[1]) for w in ("copying", "verifying"))  # pyright: ignore[reportOptionalSubscript]
        if name != "orbax":
            shutil.rmtree(target)
        after = cp()
        reference = (before[0] + after[0]) / 2
        rows.append(
            {
                "from": source,
                "to": what,
                "copying_s": copying,
                "verifying_s": verifying,
                "total_s": round(total, 2),
                "total_with_sync_s": round(synced, 2),
                "cp_s": round(reference, 2),
                "cp_with_sync_s": round((before[1] + after[1]) / 2, 2),
                "copying_MB_per_s": round(size / 1e6 / copying),
                "cp_MB_per_s": round(size / 1e6 / reference),
                "share_of_cp": round(reference / copying, 2),
                "peak_anonymous_MiB": round(peak / 2**20),
            }
        )
        print(rows[-1], flush=True)
        before = after
    result = {"bytes": size, "tensors": len(tensors(CONFIG)), "cores": os.cpu_count(), "rows": rows}
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(directory)


if __name__ == "__main__":
    {"make": make, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))
