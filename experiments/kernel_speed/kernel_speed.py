"""How fast are the Hopper kernels? Checks them on the GPU, then times them beside flash-linear-attention and XLA.

    python -m experiments.kernel_speed.kernel_speed --out DIRECTORY
    python -m experiments.kernel_speed.kernel_speed --out DIRECTORY --toy      tiny shapes, in the interpreter: anywhere

Each part runs in a process of its own (two frameworks cannot share a card's memory) and writes its rows after every
measurement, so that what fails or runs out of time loses only itself. README.md tells the method.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

HEADS, SIZE = 64, 128
LENGTHS = tuple(1 << n for n in range(12, 21))
BATCHES = ((2, 32768), (4, 4096), (4, 32768), (16, 4096))
SEQUENCES = (1, 4, 16, 64, 256)
FLA_UP_TO = 1 << 18
CHUNKED_UP_TO = 1 << 16
PARTS = {"ceilings": 60, "check": 150, "ours": 240, "decode": 60, "few_heads": 180, "chunked": 90, "fla": 300}
"""Seconds that each part may take."""


class Rows:
    """What has been measured, written to a file as it comes."""

    def __init__(self, path: Path, part: str):
        self.path, self.part, self.rows = path, part, []

    def add(self, **row):
        self.rows.append({"part": self.part, **row})
        self.path.write_text(json.dumps(self.rows, indent=1))
        print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    @contextlib.contextmanager
    def attempt(self, **row):
        """Records the failure of its body instead of letting it end the part."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=-3)
            self.add(**row, failed=f"{type(error).__name__}: {error}"[:300])


def slopes(heads):
    """Of M1's layer 0: from a head that forgets within 22 tokens to one that remembers 5,120."""
    import numpy as np

    return (2.0 ** (-8 * (np.arange(heads) + 1) / heads)).astype(np.float32)


def milliseconds(call, wait, calls=None):
    """Of one call on the device: median over five batches of calls, each enqueued at once and waited for once.

    calls: in a batch; None for as many as take 40 ms. With 1 the results of two calls never stand in memory together.
    """
    wait(call())
    start = time.perf_counter()
    wait(call())
    calls = calls or max(3, min(200, int(0.04 / (time.perf_counter() - start))))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        wait(call())
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times), (max(times) - min(times)) / statistics.median(times)


def ceilings(rows, toy):
    """The card's rates for what a kernel cannot do without: moving bytes, multiplying."""
    import torch

    def wait(_):
        torch.cuda.synchronize()

    rows.add(what="device", name=torch.cuda.get_device_name(), torch=torch.__version__)
    for gigabytes in (0.25, 2):
        x = torch.randn(int(gigabytes * 2**28), device="cuda")
        y = torch.empty_like(x)
        ms, spread = milliseconds(functools.partial(y.copy_, x), wait)
        rows.add(what="copy", gigabytes=gigabytes, ms=ms, spread=spread, tb_per_s=8 * x.numel() / ms * 1e-9)
    ms, spread = milliseconds(functools.partial(x.mul_, 0.999), wait)
    rows.add(what="multiply in place", ms=ms, spread=spread, tb_per_s=8 * x.numel() / ms * 1e-9)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms, spread = milliseconds(lambda: a @ b, wait)
    rows.add(what="matmul", ms=ms, spread=spread, tflop_per_s=2 * 8192**3 / ms * 1e-9)


def jax_inputs(batch, length, heads=HEADS, size=SIZE):
    """q, k, v, do [B,T,H,D] bfloat16 and log_decay."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 4)
    make = jax.jit(lambda key: jax.random.normal(key, (batch, length, heads, size), jnp.bfloat16))
    return *(make(key) for key in keys), -jnp.asarray(slopes(heads))


def check(rows, toy):
    """Relative RMS against the float32 recurrence; at the greatest lengths against it on the last 8,192 tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.lightning import hopper, reference
    from pallas_kernels.lightning import xla as portable

    names = ("o", "final_state", "dq", "dk", "dv", "d_initial_state")
    options = {"interpret": True} if toy else {}

    def wide(x):
        return x.astype(jnp.float32)

    def error(x, truth):
        return float(jnp.linalg.norm(wide(x) - wide(truth)) / jnp.linalg.norm(wide(truth)))

    cases = [(1, 4096, 64, 128), (1, 1000, 6, 64), (4, 1001, 64, 128), (2, 2047, 40, 128)]
    cases += [(1, 8192, 8, 128), (1, 4096, 32, 128), (2, 4096, 3, 64)]  # In parts.
    for batch, length, heads, size in [(1, 72, 1, 64)] if toy else cases:
        for packed in (False, True):
            about = {"what": "error", "batch": batch, "length": length, "heads": heads, "size": size, "packed": packed}
            with rows.attempt(**about):
                q, k, v, do, log_decay = jax_inputs(batch, length, heads, size)
                states = jax.random.normal(jax.random.key(9), (2, batch, heads, size, size)) * 4
                ids = None
                if packed:
                    ids = np.random.default_rng(0).integers(0, 6, (batch, length), np.int32)
                    ids = np.sort(ids, axis=1)
                    ids[:, length - 37 :] = np.iinfo(np.int32).max
                    ids = jnp.asarray(ids)

                def both(module, q, k, v, do, states, ids=ids, log_decay=log_decay, options=options):
                    arguments = (q, k, v, log_decay, states[0], ids)
                    return *module.forward(*arguments, **options), *module.backward(
                        *arguments, do, states[1], **options
                    )

                ours = jax.jit(functools.partial(both, hopper))(q, k, v, do, states)
                truth = functools.partial(both, reference, options={})
                truths = jax.jit(truth)(wide(q), wide(k), wide(v), wide(do), states)
                rows.add(**about, **{name: error(*pair) for name, *pair in zip(names, ours, truths)})
                del q, k, v, do, states, ours, truths

    if toy:
        return
    length, tail = 1 << 20, 8192
    with rows.attempt(what="error of the last tokens", length=length):
        q, k, v, do, log_decay = jax_inputs(1, length)
        o, state = jax.jit(hopper.forward)(q, k, v, log_decay, None, None)
        last = [wide(x[:, -tail:]) for x in (q, k, v)]
        truth_o, truth_state = jax.jit(reference.forward)(*last, log_decay, None, None)
        errors = {"o": error(o[:, -1024:], truth_o[:, -1024:]), "final_state": error(state, truth_state)}
        rows.add(what="error of the last tokens", length=length, heads=HEADS, size=SIZE, **errors)
        del o, state, truth_o
    with rows.attempt(what="error of the last and first tokens", length=length):
        zero = jnp.zeros((1, HEADS, SIZE, SIZE))
        dq, dk, dv, _ = jax.jit(hopper.backward)(q, k, v, log_decay, None, None, do, zero)
        ends = [[wide(x[:, part]) for x in (q, k, v, do)] for part in (slice(-tail, None), slice(tail))]
        (last, first), run = ends, jax.jit(reference.backward)
        truth_dq = run(*last[:3], log_decay, None, None, last[3], zero)[0]
        _, truth_dk, truth_dv, _ = run(*first[:3], log_decay, None, None, first[3], zero)
        errors = {
            "dq": error(dq[:, -1024:], truth_dq[:, -1024:]),
            "dk": error(dk[:, :1024], truth_dk[:, :1024]),
            "dv": error(dv[:, :1024], truth_dv[:, :1024]),
        }
        rows.add(what="error of the last and first tokens", length=length, heads=HEADS, size=SIZE, **errors)
        del q, k, v, do, dq, dk, dv

    with rows.attempt(what="error of decode"):
        tokens = jax.random.normal(jax.random.key(1), (3, 64, HEADS, SIZE), jnp.bfloat16)
        pool = jax.random.normal(jax.random.key(2), (70, HEADS, SIZE, SIZE))
        slots = jnp.asarray(np.random.default_rng(1).permutation(70)[:64], jnp.int32).at[3].set(-1)
        truth = jax.jit(portable.decode)(*tokens, log_decay, pool, slots)
        ours = jax.jit(hopper.decode, donate_argnums=4)(*tokens, log_decay, pool, slots)
        rows.add(what="error of decode", o=error(ours[0], truth[0]), pool=error(ours[1], truth[1]))


def time_jax(rows, toy, implementation, shapes):
    """Forward, backward, and both in one program."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels import lightning_attention
    from pallas_kernels.lightning import hopper

    if toy:
        hopper.unsupported = lambda q, k, v: None
        for name in ("forward", "backward"):
            setattr(hopper, name, functools.partial(getattr(hopper, name), interpret=True))
    rows.add(what="software", jax=jax.__version__, device=jax.devices()[0].device_kind)
    for batch, length in shapes:
        heads, size = (1, 64) if toy else (HEADS, SIZE)
        about = {"implementation": implementation, "batch": batch, "length": length, "heads": heads, "size": size}
        q, k, v, do, log_decay = jax_inputs(batch, length, heads, size)
        d_state = jnp.zeros((batch, heads, size, size))

        def op(q, k, v, log_decay=log_decay, segment_ids=None):
            return lightning_attention(q, k, v, log_decay, segment_ids=segment_ids, implementation=implementation)

        def backward(q, k, v, do, d_state, op=op):
            return jax.vjp(op, q, k, v)[1]((do, d_state))

        @jax.jit
        def both(q, k, v, do, d_state, op=op):
            outputs, transpose = jax.vjp(op, q, k, v)
            return outputs, transpose((do, d_state))

        calls = {
            "forward": functools.partial(jax.jit(op), q, k, v),
            "backward": functools.partial(jax.jit(backward), q, k, v, do, d_state),
            "forward + backward": functools.partial(both, q, k, v, do, d_state),
        }
        alone = toy or batch * length >= 1 << 19
        if batch * length >= 1 << 20:
            del calls["forward + backward"]  # Eight arrays of 17 GB.
        if implementation == "hopper" and (batch, length) == (1, 32768):
            ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 20, (1, length), np.int32)))
            packed = functools.partial(op, segment_ids=ids)
            calls["packed forward"] = functools.partial(jax.jit(packed), q, k, v)
            calls["packed backward"] = functools.partial(
                jax.jit(functools.partial(backward, op=packed)), q, k, v, do, d_state
            )
        for what, call in calls.items():
            with rows.attempt(what=what, **about):
                ms, spread = milliseconds(call, jax.block_until_ready, calls=1 if alone else None)
                rows.add(what=what, **about, ms=ms, spread=spread)
        if (batch, length) == (1, 32768) and not toy:
            for what, call in calls.items():
                with rows.attempt(what=f"profiler: {what}", **about):
                    rows.add(what=f"profiler: {what}", **about, ms=profiled(call))
        del q, k, v, do, d_state, calls
        jax.clear_caches()


def profiled(call, calls=10):
    """Milliseconds of one call by the profiler's clock: the kernels' own durations, without what lies between them."""
    import tempfile

    import jax

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        (file,) = Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
        streams = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
        return sum(event.duration_ns for line in streams for event in line.events) / calls * 1e-6


def ours(rows, toy):
    time_jax(rows, toy, "hopper", [(1, 72)] if toy else [(1, length) for length in LENGTHS] + list(BATCHES))


def few_heads(rows, toy):
    """Rows of few heads, cut into parts and not; and what heads that forget quickly save then."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.lightning import hopper, hopper_parts

    shortest = hopper_parts.SHORTEST
    spread_out = [(1, 32768), (8, 8192), (8, 32768), (8, 131072), (16, 32768), (32, 8192), (32, 32768)]
    cases = [(heads, length, "all", cut, 0.0) for heads, length in spread_out for cut in (True, False)]
    # Of 64 heads those of the first and the last of eight devices.
    cases += [(8, 32768, which, True, forget) for which in ("fastest", "slowest") for forget in (0.0, 1e-6)]
    for heads, length, which, cut, forget_below in () if toy else cases:
        q, k, v, do, log_decay = jax_inputs(1, length, heads)
        if which != "all":
            log_decay = -jnp.asarray(slopes(HEADS)[:heads] if which == "fastest" else slopes(HEADS)[-heads:])
        d_state = jnp.zeros((1, heads, SIZE, SIZE))
        hopper_parts.SHORTEST = shortest if cut else 1 << 30
        jax.clear_caches()
        about = {"implementation": "hopper", "batch": 1, "length": length, "heads": heads, "size": SIZE, "cut": cut}
        about |= {"decays": which, "forget_below": forget_below}
        options = {"forget_below": forget_below}

        def forward(q, k, v, log_decay=log_decay, options=options):
            return hopper.forward(q, k, v, log_decay, None, None, **options)

        def backward(q, k, v, do, d_state, log_decay=log_decay, options=options):
            return hopper.backward(q, k, v, log_decay, None, None, do, d_state, **options)

        calls = {
            "forward": functools.partial(jax.jit(forward), q, k, v),
            "backward": functools.partial(jax.jit(backward), q, k, v, do, d_state),
        }
        for what, call in calls.items():
            with rows.attempt(what=what, **about):
                ms, spread = milliseconds(call, jax.block_until_ready)
                rows.add(what=what, **about, ms=ms, spread=spread)


def chunked(rows, toy):
    time_jax(rows, toy, "chunked", [(1, 72)] if toy else [(1, length) for length in LENGTHS if length <= CHUNKED_UP_TO])


def decode(rows, toy):
    """One step of many sequences; the states rotate through a pool that no cache holds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from pallas_kernels.lightning import hopper
    from pallas_kernels.lightning import xla as portable

    heads, size, places = (1, 64, 4) if toy else (HEADS, SIZE, 512)
    log_decay = -jnp.asarray(slopes(heads))
    modules = {
        "hopper": functools.partial(hopper.decode, interpret=True) if toy else hopper.decode,
        "xla": portable.decode,
    }
    for name, function in modules.items():
        pool = jax.random.normal(jax.random.key(2), (places, heads, size, size))
        step = jax.jit(function, donate_argnums=4)
        for sequences in (1, 2) if toy else SEQUENCES:
            about = {"what": "decode", "implementation": name, "sequences": sequences, "heads": heads, "size": size}
            with rows.attempt(**about):
                tokens = jax.random.normal(jax.random.key(1), (3, sequences, heads, size), jnp.bfloat16)
                q, k, v = tokens
                order = np.random.default_rng(1).permutation(places)
                turns = [
                    jnp.asarray(x, jnp.int32) for x in order[: places // sequences * sequences].reshape(-1, sequences)
                ]
                count, turn = 0, len(turns)

                def call(step=step, turns=turns, turn=turn, q=q, k=k, v=v):
                    nonlocal pool, count
                    count += 1
                    o, pool = step(q, k, v, log_decay, pool, turns[count % turn])
                    return o

                ms, spread = milliseconds(call, jax.block_until_ready, calls=1 if toy else 100)
                moved = 2 * sequences * heads * size * size * 4
                rows.add(**about, ms=ms, spread=spread, tb_per_s=moved / ms * 1e-9)


def fla(rows, toy):
    """flash-linear-attention's simple_gla: the same mathematics with g_gamma = -slope and scale = 1."""
    import fla as package
    import torch
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    rows.add(what="software", fla=package.__version__, torch=torch.__version__)
    gamma = -torch.from_numpy(slopes(HEADS)).cuda()

    def wait(_):
        torch.cuda.synchronize()

    def timed(what, call, **about):
        ms, spread = milliseconds(call, wait)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        wait(None)
        by_events = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
        rows.add(what=what, implementation="fla", **about, ms=ms, spread=spread, event_ms=by_events)

    shapes = [(1, 32768), *((1, n) for n in LENGTHS if n <= FLA_UP_TO and n != 32768), *BATCHES]
    for batch, length in shapes:
        about = {"batch": batch, "length": length, "heads": HEADS, "size": SIZE}
        with rows.attempt(what="fla", **about):
            shape = (batch, length, HEADS, SIZE)
            q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            needing = [x.requires_grad_() for x in (q, k, v)]

            def forward(q=q, k=k, v=v):
                with torch.no_grad():
                    return chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0, output_final_state=True)

            def both(q=q, k=k, v=v, do=do, needing=needing):
                o, _ = chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0)
                return o, torch.autograd.grad(o, needing, do)

            timed("forward", forward, **about)
            timed("forward + backward", both, **about)
            del q, k, v, do, needing, forward, both
        torch.cuda.empty_cache()
    for sequences in SEQUENCES:
        about = {"sequences": sequences, "heads": HEADS, "size": SIZE}
        with rows.attempt(what="decode", implementation="fla", **about):
            q, k, v = (torch.randn(sequences, 1, HEADS, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            turns = max(2, 512 // sequences // 2)
            states = [torch.randn(sequences, HEADS, SIZE, SIZE, device="cuda") for _ in range(turns)]
            count = 0

            def step(q=q, k=k, v=v, states=states, turns=turns):
                nonlocal count
                count += 1
                state = states[count % turns]
                with torch.no_grad():
                    return fused_recurrent_simple_gla(
                        q, k, v, g_gamma=gamma, scale=1.0, initial_state=state, output_final_state=True
                    )

            timed("decode", step, **about)


def table(rows):
    """Markdown: B=1 over lengths, other batches, decode."""

    def find(**wanted):
        rest = [row for row in rows if "ms" in row and row["part"] != "few_heads"]
        found = [row["ms"] for row in rest if all(row.get(k) == v for k, v in wanted.items())]
        return found[0] if found else None

    def show(x, digits=3):
        return "-" if x is None else f"{x:.{digits}f}"

    def ratio(a, b):
        return "-" if a is None or b is None else f"{a / b:.1f}x"

    lines = ["| B | T | forward ms | ns per token | backward ms | both ms | fla forward | fla both | forward vs fla |"]
    lines[0] += " both vs fla | XLA chunked forward | both |"
    lines.append("|" + "---|" * 12)
    for batch, length in [(1, length) for length in LENGTHS] + list(BATCHES):
        one = functools.partial(find, batch=batch, length=length)
        forward, backward, both = (
            one(implementation="hopper", what=what) for what in ("forward", "backward", "forward + backward")
        )
        if both is None and forward is not None and backward is not None:
            both = forward + backward
        fla_forward, fla_both = (one(implementation="fla", what=what) for what in ("forward", "forward + backward"))
        xla = (one(implementation="chunked", what=what) for what in ("forward", "forward + backward"))
        per_token = None if forward is None else forward / (batch * length) * 1e6
        cells = [batch, length, show(forward), show(per_token, 2), show(backward), show(both), show(fla_forward)]
        cells += [show(fla_both), ratio(fla_forward, forward), ratio(fla_both, both), *map(show, xla)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| sequences | decode ms | TB/s | fla ms | XLA ms |", "|---|---|---|---|---|"]
    for sequences in SEQUENCES:
        ours, other, xla = (
            find(what="decode", sequences=sequences, implementation=name) for name in ("hopper", "fla", "xla")
        )
        moved = None if ours is None else 2 * sequences * HEADS * SIZE * SIZE * 4 / ours * 1e-9
        lines.append(f"| {sequences} | {show(ours)} | {show(moved, 2)} | {show(other)} | {show(xla)} |")
    lines += [
        "",
        "| heads | decays | forget_below | T | forward ms, one walk per head | in parts | backward ms | in parts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    few = [row for row in rows if row["part"] == "few_heads" and "ms" in row]
    kinds = {}
    for row in few:
        kind = tuple(row[key] for key in ("heads", "decays", "forget_below", "length"))
        kinds.setdefault(kind, {})[row["what"], row["cut"]] = row["ms"]
    for kind, times in kinds.items():
        cells = [times.get((what, cut)) for what in ("forward", "backward") for cut in (False, True)]
        lines.append("| " + " | ".join(map(str, (*kind, *map(show, cells)))) + " |")
    lines += ["", *(f"{row['what']}: " + rate(row) for row in rows if row["part"] == "ceilings" and "ms" in row)]
    return "\n".join(lines)


def rate(row):
    return f"{row['tb_per_s']:.2f} TB/s" if "tb_per_s" in row else f"{row['tflop_per_s']:.0f} TFLOP/s"


def picture(rows, path):
    """Nanoseconds per token over length, B = 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    styles = {
        "hopper": ("our kernels", "o-"),
        "fla": ("flash-linear-attention", "s-"),
        "chunked": ("XLA chunked", "^-"),
    }
    copy = max((row["tb_per_s"] for row in rows if row.get("what") == "copy"), default=None)
    for axis, what, arrays in zip(axes, ("forward", "forward + backward"), (4, 14)):
        for name, (label, style) in styles.items():
            points = {}
            for row in rows:
                if (
                    row["part"] in ("ours", name)
                    and row.get("batch") == 1
                    and row.get("implementation") == name
                    and "ms" in row
                ):
                    points.setdefault(row["length"], {})[row["what"]] = row["ms"]
            times = {n: t.get(what, sum(t.get(x, float("nan")) for x in what.split(" + "))) for n, t in points.items()}
            if times:
                lengths = sorted(times)
                axis.plot(lengths, [times[n] / n * 1e6 for n in lengths], style, label=label)
        if copy:
            floor = arrays * HEADS * SIZE * 2 / copy * 1e-3
            axis.axhline(floor, color="gray", linestyle=":", label=f"{arrays} arrays at the copy's {copy:.2f} TB/s")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=what)
        axis.set_xscale("log", base=2)
        axis.legend()
    axes[0].set_ylabel("ns per token (64 heads of 128)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for results.json, table.md and speed.png")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to run")
    parser.add_argument("--toy", action="store_true", help="tiny shapes in the interpreter, on any machine: ours only")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        globals()[arguments.part](Rows(arguments.out / f"{arguments.part}.json", arguments.part), arguments.toy)
        return
    os.environ.setdefault(
        "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.96"
    )  # A million tokens forward and backward take 120 GB.
    parts = [part for part in arguments.parts.split(",") if not arguments.toy or part not in ("ceilings", "fla")]
    for part in parts:
        command = [
            sys.executable,
            "-m",
            "experiments.kernel_speed.kernel_speed",
            "--out",
            arguments.out,
            "--part",
            part,
        ]
        print(f"== {part}", flush=True)
        start = time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command + ["--toy"] * arguments.toy, timeout=PARTS[part], check=False)
        print(f"== {part}: {time.perf_counter() - start:.0f} s", flush=True)
    files = [arguments.out / f"{part}.json" for part in PARTS]
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text())]
    (arguments.out / "results.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for file in files:
        file.unlink(missing_ok=True)
    (arguments.out / "table.md").write_text(table(rows) + "\n")
    print(table(rows))
    picture(rows, arguments.out / "speed.png")


if __name__ == "__main__":
    main()
