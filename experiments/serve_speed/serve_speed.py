"""What the server costs over the engine: tokens a second with 32 streams, and the time to a first token when idle.

    m1jax init m1-100m runs/m1-100m
    python -m experiments.serve_speed.serve_speed runs/m1-100m

Engine and server run by turns, each in a process of its own, with the same requests; the client is a third process.
Requests alternate between free ones and, with --constrained, ones that must be JSON.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

from experiments.serving import serving

HERE = Path(__file__).parent
PROMPT = 32


def prompts(count: int, seed: int) -> list[list[int]]:
    """Of 32 tokens each, all different from the first token on."""
    return [[(seed * 37 + 11 * n) % 250, *((seed + n * 7 + i) % 250 for i in range(PROMPT - 1))] for n in range(count)]


def engine(model: Path, streams: int, tokens: int, firsts: int, constrained: bool) -> dict[str, list[float]]:
    """The engine alone, in this process; `constrained`: half of the streams write JSON."""
    import jax
    import numpy as np

    import m1jax
    from m1jax.chat import Tokenizer
    from m1jax.inference import Request, Sampling, Wrote
    from m1jax.serve.backend import engines
    from m1jax.serve.grammar import Grammars

    loaded = m1jax.from_pretrained(model)
    form = Grammars(Tokenizer.from_dir(model), loaded.config.vocab_size).json({"type": "string"})
    made = engines(loaded, rows=streams, max_length=1024)()
    sampling = Sampling(max_new_tokens=tokens)

    def request(prompt: list[int], constraint: object = None) -> Request:
        return Request(np.array(prompt, np.int32), jax.random.key(0), sampling, constraint=constraint)  # pyright: ignore

    def run(seed: int, constrain: bool) -> float:
        some = [
            request(prompt, form if constrain and n % 2 else None) for n, prompt in enumerate(prompts(streams, seed))
        ]
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
        return seconds

    run(1000, constrained)
    found = {
        "tokens_per_second": [run(seed, False) for seed in range(3)],
        "first_token": [first(2000 + seed) for seed in range(firsts)],
    }
    if constrained:
        found["tokens_per_second_half_constrained"] = [run(3000 + seed, True) for seed in range(3)]
    return found


async def server(place: str, streams: int, tokens: int, firsts: int) -> dict[str, list[float]]:
    """The same through the server."""
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=place, timeout=600, limits=limits) as client:

        async def one(prompt: list[int]) -> tuple[float, int]:
            body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "return_token_ids": True, "seed": 0}
            start, first, written = time.perf_counter(), 0.0, 0
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - start
                        written += len(json.loads(line[6:])["choices"][0]["token_ids"])
            return first, written

        async def run(seed: int) -> float:
            start = time.perf_counter()
            done = await asyncio.gather(*(one(prompt) for prompt in prompts(streams, seed)))
            return sum(written for _, written in done) / (time.perf_counter() - start)

        await run(1000)
        rates = [await run(seed) for seed in range(3)]
        found = []
        for seed in range(firsts):
            found.append((await one(prompts(1, 2000 + seed)[0]))[0])
            await asyncio.sleep(0.05)
        return {"tokens_per_second": rates, "first_token": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--firsts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--constrained", action="store_true")
    parser.add_argument("--engine", action="store_true", help="measure the engine here and print it")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    given = parser.parse_args()
    if given.engine:
        print(json.dumps(engine(given.model, given.streams, given.tokens, given.firsts, given.constrained)))
        return
    seen: dict[str, dict[str, list[float]]] = {"engine": {}, "server": {}}
    for _ in range(given.rounds):
        done = subprocess.run(
            [sys.executable, "-m", "experiments.serve_speed.serve_speed", *sys.argv[1:], "--engine"],
            check=True,
            capture_output=True,
            text=True,
        )
        with serving(given.model, "--rows", str(given.streams), "--max-length", "1024") as (place, _):
            told = asyncio.run(server(place, given.streams, given.tokens, given.firsts))
        for name, values in (("engine", json.loads(done.stdout.splitlines()[-1])), ("server", told)):
            for key, more in values.items():
                seen[name].setdefault(key, []).extend(more)
    middle = {name: {key: statistics.median(v) for key, v in values.items()} for name, values in seen.items()}
    result = {
        "machine": platform.processor() or platform.machine(),
        "model": given.model.name,
        "streams": given.streams,
        "tokens": given.tokens,
        "median": middle,
        "server_over_engine_tokens_per_second": middle["server"]["tokens_per_second"]
        / middle["engine"]["tokens_per_second"],
        "first_token_milliseconds_more": 1000 * (middle["server"]["first_token"] - middle["engine"]["first_token"]),
        "all": seen,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "all"}, indent=1))


if __name__ == "__main__":
    main()
