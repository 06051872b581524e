"""What the server costs over the engine: tokens a second with 32 streams, and the time to a first token when idle.

    m1jax init m1-100m runs/m1-100m
    python -m experiments.serve_speed.serve_speed runs/m1-100m

Engine and server run by turns, each in a process of its own, with the same requests. The client is a third process
that does next to nothing (client.py); --cores 0-1 --client-core 2 keeps it off their cores. Processor time is told
apart: the client's, that of the server's event loop, and all of the server.
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


def engine(model: Path, streams: int, tokens: int, rounds: int, firsts: int) -> dict[str, list[float]]:
    """The engine alone, in this process."""
    import jax
    import numpy as np

    import m1jax
    from m1jax.chat import Tokenizer
    from m1jax.inference import Request, Sampling, Wrote
    from m1jax.serve.backend import engines

    made = engines(m1jax.from_pretrained(model), rows=streams, max_length=LENGTH)()
    eos = Tokenizer.from_dir(model).eos_id
    sampling = Sampling(max_new_tokens=tokens, end_ids=(eos,))

    def request(prompt: list[int]) -> Request:
        return Request(np.array(prompt, np.int32), jax.random.key(0), sampling)

    def run(seed: int) -> float:
        some = [request(prompt) for prompt in prompts(streams, seed)]
        start = time.perf_counter()
        written = sum(len(completion.tokens) for _, completion in made.run(some))
        return written / (time.perf_counter() - start)

    def first(seed: int) -> float:
        start = time.perf_counter()
        ticket = made.submit(request(prompts(1, seed)[0]))
        while not any(isinstance(event, Wrote) for event in made.step()):
            pass
        seconds = time.perf_counter() - start
        made.cancel(ticket)
        while made.busy:
            made.step()
        time.sleep(0.05)
        return seconds

    run(1000)
    return {
        "tokens_per_second": [run(seed) for seed in range(rounds)],
        "first_token": [first(2000 + seed) for seed in range(firsts)],
    }


def processor_of(process: int, thread: int | None = None) -> float:
    """Seconds that a process, or one thread of it, has computed."""
    place = f"/proc/{process}/stat" if thread is None else f"/proc/{process}/task/{thread}/stat"
    fields = Path(place).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def server(given: argparse.Namespace, limited: list[str]) -> dict[str, list[float]]:
    """The same through the server."""
    options = ("--rows", str(given.streams), "--max-length", str(LENGTH))
    asked = {"streams": given.streams, "tokens": given.tokens, "rounds": given.rounds}
    asked |= {"firsts": given.firsts, "first_tokens": 8}
    with serving(given.model, *options, before=limited) as (place, process):
        begin, loop = processor_of(process.pid), processor_of(process.pid, process.pid)
        client = ["taskset", "-c", given.client_core] if given.client_core else []
        done = subprocess.run(
            [*client, sys.executable, "-m", "experiments.serve_speed.client", place, json.dumps(asked)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        spent, in_loop = processor_of(process.pid) - begin, processor_of(process.pid, process.pid) - loop
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    tokens = sum(n for _, n in told["rounds"])
    share = tokens / (tokens * (1 + 1 / given.rounds))  # the first round is not timed
    return {
        "tokens_per_second": [n / seconds for seconds, n in told["rounds"]],
        "first_token": told["firsts"],
        "client_microseconds_per_token": [1e6 * told["processor"] / tokens],
        "loop_microseconds_per_token": [1e6 * share * in_loop / tokens],
        "process_microseconds_per_token": [1e6 * share * spent / tokens],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3, help="in each process")
    parser.add_argument("--firsts", type=int, default=20, help="lone requests in each process")
    parser.add_argument("--turns", type=int, default=2, help="processes of each kind")
    parser.add_argument("--cores", help="of engine and server, as taskset takes them")
    parser.add_argument("--client-core", help="of the client")
    parser.add_argument("--engine", action="store_true", help="measure the engine here and print it")
    parser.add_argument("--out", type=Path, help="default: result-MODEL.json beside this file")
    given = parser.parse_args()
    if given.engine:
        print(json.dumps(engine(given.model, given.streams, given.tokens, given.rounds, given.firsts)))
        return
    limited = ["taskset", "-c", given.cores] if given.cores else []
    seen: dict[str, dict[str, list[float]]] = {"engine": {}, "server": {}}
    for _ in range(given.turns):
        done = subprocess.run(
            [*limited, sys.executable, "-m", "experiments.serve_speed.serve_speed", *sys.argv[1:], "--engine"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, values in (("engine", json.loads(done.stdout.splitlines()[-1])), ("server", server(given, limited))):
            for key, more in values.items():
                seen[name].setdefault(key, []).extend(more)
        write(given, seen)


def write(given: argparse.Namespace, seen: dict[str, dict[str, list[float]]]) -> None:
    """What is known so far."""
    middle = {name: {key: statistics.median(v) for key, v in values.items()} for name, values in seen.items()}
    result = {
        "machine": platform.processor() or platform.machine(),
        "platforms": os.environ.get("JAX_PLATFORMS"),
        "model": given.model.name,
        "streams": given.streams,
        "tokens": given.tokens,
        "cores": given.cores,
        "client_core": given.client_core,
        "median": middle,
        "server_over_engine_tokens_per_second": middle["server"]["tokens_per_second"]
        / middle["engine"]["tokens_per_second"],
        "first_token_milliseconds_more": 1000 * (middle["server"]["first_token"] - middle["engine"]["first_token"]),
        "all": seen,
    }
    out = given.out or HERE / f"result-{given.model.name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "all"}, indent=1), flush=True)


if __name__ == "__main__":
    main()
