"""Many clients for minutes, some of which leave in the middle: nothing may be left behind, and nothing may hang.

    make soak-serve
    python -m experiments.soak_serve.soak_serve runs/serve/m1-tiny --seconds 300

32 clients at once ask for streams, whole replies, JSON and calls, send what is wrong, or leave in the middle of a
stream. Memory, files and rows of the server are read all the time. It fails where a status is 5xx, where a reply does
not come within a minute, or where rows, files or memory are not given back.
"""

import argparse
import asyncio
import collections
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx

from experiments.serving import serving

HERE = Path(__file__).parent
CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


async def client(number: int, place: str, end: float, seen: collections.Counter[str]) -> None:
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=place, timeout=60) as http:
        while time.monotonic() < end:
            kind = rng.choice(["stream", "stream", "whole", "json", "call", "leave", "leave", "drop", "wrong", "long"])
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * rng.randrange(1, 200)}]}
            body["max_tokens"] = rng.randrange(1, 120)
            if kind == "json":
                body |= {"response_format": {"type": "json_object"}, "max_tokens": 150}
            elif kind == "call":
                body |= {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200}
            elif kind == "wrong":
                body["temperature"] = -1
            elif kind == "long":
                body["messages"][0]["content"] = "x" * 5000
            if kind in ("stream", "leave"):
                body |= {"stream": True, "n": rng.choice([1, 1, 2])}
                async with http.stream("POST", CHAT, json=body) as response:
                    status, lines = response.status_code, 0
                    async for line in response.aiter_lines():
                        lines += bool(line)
                        if kind == "leave" and lines == 2:
                            break
            elif kind == "drop":  # before there is an answer
                try:
                    status = (await http.post(CHAT, json={**body, "max_tokens": 900}, timeout=0.2)).status_code
                except httpx.ReadTimeout:
                    status = 0
            else:
                response = await http.post(CHAT, json=body)
                status = response.status_code
                if status == 200 and kind == "json":
                    json.loads(response.json()["choices"][0]["message"]["content"])
                if status == 200 and kind == "call":
                    for call in response.json()["choices"][0]["message"]["tool_calls"]:
                        json.loads(call["function"]["arguments"])
            seen[f"{kind} {status}"] += 1
            if status >= 500:
                raise RuntimeError(f"{kind}: status {status}")


def held(pid: int) -> tuple[float, int]:
    """MiB of memory and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(memory.split()[1]) / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def watch(place: str, pid: int, end: float, rows: list[list[float]]) -> None:
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=place, timeout=60) as http:
        while time.monotonic() < end:
            health = (await http.get("/health")).json()
            rows.append([round(time.monotonic() - start, 1), *held(pid), health["running"], health["waiting"]])
            await asyncio.sleep(5)


async def soak(place: str, pid: int, streams: int, seconds: float) -> dict[str, object]:
    seen: collections.Counter[str] = collections.Counter()
    rows: list[list[float]] = []
    await asyncio.gather(*(client(n, place, time.monotonic() + 10, seen) for n in range(streams)))  # first use of all
    await asyncio.sleep(2)
    before = held(pid)
    end = time.monotonic() + seconds
    await asyncio.gather(*(client(1000 + n, place, end, seen) for n in range(streams)), watch(place, pid, end, rows))
    await asyncio.sleep(3)
    after = held(pid)
    async with httpx.AsyncClient(base_url=place) as http:
        health = (await http.get("/health")).json()
    if health != {"status": "ok", "running": 0, "waiting": 0}:
        raise RuntimeError(f"rows are not free: {health}")
    if after[1] > before[1] + 4:
        raise RuntimeError(f"files are open: {before[1]} before, {after[1]} after")
    third = len(rows) // 3
    growth = max(row[1] for row in rows[-third:]) - max(row[1] for row in rows[third : 2 * third])
    if growth > 50:
        raise RuntimeError(f"memory grew by {growth:.0f} MiB in the last third")
    return {
        "seconds": seconds,
        "streams": streams,
        "requests": sum(seen.values()),
        "by_kind_and_status": dict(sorted(seen.items())),
        "memory_mib": {"before": round(before[0]), "after": round(after[0]), "growth_last_third": round(growth, 1)},
        "files": {"before": before[1], "after": after[1]},
        "most_running": max(row[3] for row in rows),
        "most_waiting": max(row[4] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=32)
    given = parser.parse_args()
    with serving(given.model, "--rows", "32", "--max-length", "2048") as (place, process):
        result = asyncio.run(soak(place, process.pid, given.streams, given.seconds))
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
