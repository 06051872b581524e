"""What the server costs over the engine: tokens a second with 32 streams, and the time to a first token when idle.

    m1jax init m1-100m runs/m1-100m
    python -m experiments.serve_speed.serve_speed runs/m1-100m

Engine and server are processes of their own, each on the whole device, and get the same requests by turns; who has not
its turn rests. The client is a third process that does next to nothing (client.py); --cores 0-1 --client-core 2 keeps
it off their cores. Processor time is told apart: the client's, that of the server's event loop, and all of the server.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments.serve_speed.client import prompts
from experiments.serving import serving

HERE = Path(__file__).parent
LENGTH = 1024
TICK = os.sysconf("SC_CLK_TCK")


Seen = dict[str, dict[str, list[float]]]
"""All that was measured of the engine and of the server."""


def engine(model: Path, streams: int) -> None:
    """The engine alone, in this process: does what each line of standard input asks, and tells what came of it."""
    import jax
    import numpy as np

    import m1jax
    from m1jax.chat import Tokenizer
    from m1jax.inference import Request, Sampling, Wrote
    from m1jax.serve.backend import engines

    made = engines(m1jax.from_pretrained(model), rows=streams, max_length=LENGTH)()
    eos = Tokenizer.from_dir(model).eos_id

    def request(prompt: list[int], tokens: int) -> Request:
        sampling = Sampling(temperature=0, max_new_tokens=tokens, end_ids=(eos,))
        return Request(np.array(prompt, np.int32), jax.random.key(0), sampling)

    def run(seed: int, tokens: int) -> float:
        some = [request(prompt, tokens) for prompt in prompts(streams, seed)]
        start = time.perf_counter()
        written = sum(len(completion.tokens) for _, completion in made.run(some))
        return written / (time.perf_counter() - start)

    def first(seed: int, tokens: int) -> float:
        start = time.perf_counter()
        ticket = made.submit(request(prompts(1, seed)[0], tokens))
        while not any(isinstance(event, Wrote) for event in made.step()):
            pass
        seconds = time.perf_counter() - start
        made.cancel(ticket)
        while made.busy:
            made.step()
        time.sleep(0.05)
        return seconds

    for line in sys.stdin:
        asked = json.loads(line)
        tokens = asked["tokens"]
        told = {"tokens_per_second": [run(seed, tokens) for seed in asked["rounds"]]}
        print(json.dumps(told | {"first_token": [first(seed, tokens) for seed in asked["firsts"]]}), flush=True)


def processor_of(process: int, thread: int | None = None) -> float:
    """Seconds that a process, or one thread of it, has computed."""
    place = f"/proc/{process}/stat" if thread is None else f"/proc/{process}/task/{thread}/stat"
    fields = Path(place).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def server(place: str, pid: int, asked: dict[str, Any], client_core: str | None) -> dict[str, list[float]]:
    """The same through the server."""
    begin, loop = processor_of(pid), processor_of(pid, pid)
    client = ["taskset", "-c", client_core] if client_core else []
    many = {**asked, "first_tokens": 8}
    command = [*client, sys.executable, "-m", "experiments.serve_speed.client", place]
    done = subprocess.run([*command, json.dumps({**many, "firsts": []})], check=True, stdout=subprocess.PIPE, text=True)
    spent, in_loop = processor_of(pid) - begin, processor_of(pid, pid) - loop
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    tokens = sum(n for _, n in told["rounds"])
    done = subprocess.run([*command, json.dumps({**many, "rounds": []})], check=True, stdout=subprocess.PIPE, text=True)
    return {
        "tokens_per_second": [n / seconds for seconds, n in told["rounds"]],
        "first_token": json.loads(done.stdout.splitlines()[-1])["firsts"],
        "client_microseconds_per_token": [1e6 * told["processor"] / tokens],
        "loop_microseconds_per_token": [1e6 * in_loop / tokens],
        "process_microseconds_per_token": [1e6 * spent / tokens],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 900], help="of each stream, one measure each")
    parser.add_argument("--rounds", type=int, default=2, help="in each turn")
    parser.add_argument("--firsts", type=int, default=5, help="lone requests in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cores", help="of engine and server, as taskset takes them")
    parser.add_argument("--client-core", help="of the client")
    parser.add_argument("--engine", action="store_true", help="be the engine")
    parser.add_argument("--out", type=Path, help="default: result-MODEL.json beside this file")
    given = parser.parse_args()
    if given.engine:
        engine(given.model, given.streams)
        return
    limited = ["taskset", "-c", given.cores] if given.cores else []
    options = ("--rows", str(given.streams), "--max-length", str(LENGTH))
    command = [*limited, sys.executable, "-m", "experiments.serve_speed.serve_speed", *sys.argv[1:], "--engine"]
    seen: dict[int, Seen] = {tokens: {"engine": {}, "server": {}} for tokens in given.tokens}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alone,
        serving(given.model, *options, before=limited) as (place, process),
    ):
        assert alone.stdin is not None and alone.stdout is not None
        for turn in range(-1, given.turns):
            for tokens in given.tokens:
                rounds = [1000] if turn < 0 else [turn * given.rounds + n for n in range(given.rounds)]
                firsts = [2000 + turn * given.firsts + n for n in range(given.firsts)]
                asked = {"streams": given.streams, "tokens": tokens, "rounds": rounds, "firsts": firsts}
                print(json.dumps(asked), file=alone.stdin, flush=True)
                told = {"engine": json.loads(alone.stdout.readline())}
                told["server"] = server(place, process.pid, asked, given.client_core)
                if turn < 0:  # the first time of everything
                    continue
                for name, values in told.items():
                    for key, more in values.items():
                        seen[tokens][name].setdefault(key, []).extend(more)
            if turn >= 0:
                write(given, seen)
        alone.stdin.close()


def write(given: argparse.Namespace, seen: dict[int, Seen]) -> None:
    """What is known so far."""
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "platforms": os.environ.get("JAX_PLATFORMS"),
        "model": given.model.name,
        "streams": given.streams,
        "cores": given.cores,
        "client_core": given.client_core,
        "by_tokens": {tokens: compared(values) for tokens, values in seen.items()},
    }
    out = given.out or HERE / f"result-{given.model.name}.json"
    out.write_text(json.dumps(result | {"all": seen}, indent=1) + "\n")
    print(json.dumps(result, indent=1), flush=True)


def compared(seen: Seen) -> dict[str, Any]:
    """Of replies of one length: medians, and how the server does beside the engine."""
    middle = {name: {key: statistics.median(v) for key, v in values.items()} for name, values in seen.items()}
    engine, server = middle["engine"], middle["server"]
    return {
        "server_over_engine_tokens_per_second": server["tokens_per_second"] / engine["tokens_per_second"],
        "first_token_milliseconds_more": 1000 * (server["first_token"] - engine["first_token"]),
        "median": middle,
    }


if __name__ == "__main__":
    main()
