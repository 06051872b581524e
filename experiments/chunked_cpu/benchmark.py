"""Times `chunked` on CPU against a naive scan and PyTorch's block loop, and over the length.

    python -m experiments.chunked_cpu.benchmark [--out DIRECTORY]

Prints two Markdown tables and writes result.json and result.png. Needs the extra `torch`; minutes on two cores.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

from pallas_kernels import lightning_attention

LENGTH = 8192
SHAPES = ((8, 64), (8, 128), (64, 64), (64, 128))
LONG = tuple(2**n * 1024 for n in range(4, 9))
SCAN_LENGTH = 512  # The scan's time is its number of steps: what 512 of them take is multiplied.
BLOCK = 256  # MiniMax's, in the authors' code and in Transformers.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    out: Path = Path(__file__).parent
    """Where result.json and result.png go."""


def inputs(length, heads, size):
    """q, k, v, do [1,T,H,D] float32 and the slopes of a first layer [H]."""
    random = np.random.default_rng(0)
    shape = (1, length, heads, size)
    return random.standard_normal((4, *shape), np.float32), 2.0 ** (-8 * np.arange(1, heads + 1) / heads)


def median_seconds(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ours(arrays, slopes, implementation, repeats):
    """Seconds for (forward, forward + backward), and the results of the second."""
    log_decay = jnp.asarray(-slopes, jnp.float32)
    arrays = [jnp.asarray(x) for x in arrays]

    @jax.jit
    def forward(q, k, v):
        return lightning_attention(q, k, v, log_decay, implementation=implementation)[0]

    @jax.jit
    def both(q, k, v, do):
        o, transposed = jax.vjp(forward, q, k, v)
        return o, *transposed(do)

    seconds = (
        median_seconds(lambda: jax.block_until_ready(forward(*arrays[:3])), repeats),
        median_seconds(lambda: jax.block_until_ready(both(*arrays)), repeats),
    )
    return seconds, [np.asarray(x) for x in both(*arrays)]


def block_loop(q, k, v, slopes):
    """Transformers' native MiniMaxLightningAttention without its projections, in float32."""
    slope = torch.tensor(slopes, dtype=torch.float32)[:, None, None]
    position = torch.arange(BLOCK)
    distance = slope * (position[:, None] - position)
    within = torch.where(distance >= 0, -distance, float("-inf")).exp()
    into, onto = torch.exp(-slope * (position[:, None] + 1)), torch.exp(-slope * (BLOCK - 1 - position[:, None]))
    across = torch.exp(-slope * BLOCK)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    state, outputs = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
    for qc, kc, vc in zip(*(x.split(BLOCK, 2) for x in (q, k, v))):
        outputs.append((qc @ kc.mT * within) @ vc + (qc * into) @ state)
        state = state * across + (kc * onto).mT @ vc
    return torch.cat(outputs, 2).transpose(1, 2)


def torchs(arrays, slopes, repeats=2):
    """Seconds for (forward, forward + backward), and the results of the second."""
    q, k, v, do = (torch.tensor(x) for x in arrays)

    def forward():
        with torch.no_grad():
            block_loop(q, k, v, slopes)

    def both():
        leaves = a, b, c = [x.detach().requires_grad_() for x in (q, k, v)]
        o = block_loop(a, b, c, slopes)
        return o.detach(), *torch.autograd.grad(o, leaves, do)

    return (median_seconds(forward, repeats), median_seconds(both, repeats)), [x.numpy() for x in both()]


def torch_as_it_comes(heads, size):
    """Seconds of one run each for (forward, forward + backward), where nobody has asked PyTorch to flush denormals."""
    arrays, slopes = inputs(LENGTH, heads, size)
    return torchs(arrays, slopes, 1)[0]


def compare():
    rows = []
    for heads, size in SHAPES:
        arrays, slopes = inputs(LENGTH, heads, size)
        chunked, results = ours(arrays, slopes, "chunked", 5)
        loop, truths = torchs(arrays, slopes)
        error = max(np.sqrt(np.square(a - b).mean() / np.square(b).mean()) for a, b in zip(results, truths))
        scan, _ = ours(arrays[:, :, :SCAN_LENGTH], slopes, "reference", 2)
        scan = [seconds * LENGTH / SCAN_LENGTH for seconds in scan]
        row = {"heads": heads, "head_size": size, "largest_difference": float(error)}
        for i, what in enumerate(("forward", "forward_backward")):
            row[what] = {"chunked_ms": 1e3 * chunked[i], "torch_ms": 1e3 * loop[i], "scan_ms": 1e3 * scan[i]}
            row[what]["speedup"] = min(loop[i], scan[i]) / chunked[i]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def over_length():
    rows = []
    for length in LONG:
        arrays, slopes = inputs(length, 8, 64)
        seconds, _ = ours(arrays, slopes, "chunked", 3)
        nanoseconds = {"forward_ns": 1e9 * seconds[0] / length, "forward_backward_ns": 1e9 * seconds[1] / length}
        rows.append({"length": length, **nanoseconds})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def tables(result) -> str:
    lines = [
        "| H | d | | chunked | PyTorch's loop | naive scan | faster than the better |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["compare"]:
        for what in ("forward", "forward_backward"):
            r = row[what]
            lines.append(
                f"| {row['heads']} | {row['head_size']} | {what.replace('_', ' + ')} | {r['chunked_ms']:.0f} ms "
                f"| {r['torch_ms']:.0f} ms | {r['scan_ms']:.0f} ms | {r['speedup']:.1f}x |"
            )
    lines += ["", "| T | forward, per token | forward + backward, per token |", "|---|---|---|"]
    for row in result["over_length"]:
        ns = f"| {row['forward_ns'] / 1e3:.2f} us | {row['forward_backward_ns'] / 1e3:.2f} us |"
        lines.append(f"| {row['length']:,} {ns}")
    (heads, size), times = result["torch_with_denormals_ms"].values()
    as_it_comes = " and ".join(f"{milliseconds:.0f} ms" for milliseconds in times)
    lines += ["", f"PyTorch as it comes, denormals and all, at H = {heads}, d = {size}: {as_it_comes}"]
    return "\n".join(lines)


def draw(result, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    labels = [f"H={r['heads']}\nd={r['head_size']}" for r in result["compare"]]
    for i, (name, label) in enumerate((("chunked", "chunked"), ("torch", "PyTorch's loop"), ("scan", "naive scan"))):
        milliseconds = [r["forward_backward"][f"{name}_ms"] for r in result["compare"]]
        left.bar(np.arange(len(labels)) + 0.27 * (i - 1), milliseconds, 0.25, label=label)
    left.set(title=f"forward + backward, T = {LENGTH:,}", ylabel="milliseconds", yscale="log")
    left.set_xticks(np.arange(len(labels)), labels)
    left.legend()
    lengths = [r["length"] for r in result["over_length"]]
    for what, label in (("forward_ns", "forward"), ("forward_backward_ns", "forward + backward")):
        right.plot(lengths, [r[what] / 1e3 for r in result["over_length"]], "o-", label=label)
    right.set(title="time per token, H = 8, d = 64", xlabel="tokens", ylabel="microseconds", xscale="log")
    right.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    right.set_ylim(0)
    right.minorticks_off()
    right.legend()
    figure.savefig(path, dpi=120)


def main(config: Config):
    # Decays of e^-88 to e^-103 are denormal numbers, on which PyTorch is far slower; XLA flushes them to zero.
    # Threads inherit the setting from the one that starts them, so it comes before the first parallel operation.
    torch.set_flush_denormal(True)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        denormals = process.submit(torch_as_it_comes, *SHAPES[0]).result()
    result = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch_with_denormals_ms": {"shape": SHAPES[0], "times": [1e3 * seconds for seconds in denormals]},
        "compare": compare(),
        "over_length": over_length(),
    }
    (config.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, config.out / "result.png")
    print(tables(result))


if __name__ == "__main__":
    main(tyro.cli(Config))
