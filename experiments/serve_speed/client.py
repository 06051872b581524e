"""A client that costs next to nothing: plain sockets, and nothing is parsed before the clock has stopped.

    python -m experiments.serve_speed.client http://127.0.0.1:8000 '{"streams": 32, "tokens": 256, "rounds": [0], ...}'

Prints JSON: tokens and seconds of each round, the seconds to each lone request's first token, and what processor time
this process took meanwhile.
"""

import json
import re
import selectors
import socket
import sys
import time
from typing import Any

PROMPT = 32
END = b"data: [DONE]"
IDS = re.compile(rb'"token_ids":\[([0-9,]*)\]')


def prompts(count: int, seed: int) -> list[list[int]]:
    """Of 32 tokens each, all different from the first token on."""
    return [[(seed * 37 + 11 * n) % 250, *((seed + n * 7 + i) % 250 for i in range(PROMPT - 1))] for n in range(count)]


class Stream:
    """One connection, and what came over it for the request that is in work."""

    def __init__(self, host: str, port: int):
        self._host = f"{host}:{port}"
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = bytearray()
        self.first = 0.0

    def send(self, path: str, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)

    def read(self) -> bool:
        """What is there; whether that is all."""
        got = self.socket.recv(1 << 16)
        if not got:
            raise RuntimeError(f"the server hung up: {bytes(self.data)[-300:]!r}")
        self.data += got
        if not self.first and b"data: {" in self.data:
            self.first = time.perf_counter()
        return END in self.data[-64:] and self.data.endswith(b"0\r\n\r\n")

    @property
    def tokens(self) -> int:
        return sum(ids.count(b",") + 1 for ids in IDS.findall(bytes(self.data)) if ids)


def together(place: str, asked: list[dict[str, Any]]) -> tuple[float, float, int]:
    """(seconds, seconds to the first piece of the first, tokens) of completions that begin together."""
    host, _, port = place.removeprefix("http://").rpartition(":")
    streams = [Stream(host, int(port)) for _ in asked]
    start = time.perf_counter()
    with selectors.DefaultSelector() as ready:
        for stream, body in zip(streams, asked):
            stream.send("/v1/completions", body)
            ready.register(stream.socket, selectors.EVENT_READ, stream)
        while ready.get_map():
            for key, _ in ready.select():
                if key.data.read():
                    ready.unregister(key.fileobj)
    seconds = time.perf_counter() - start
    for stream in streams:
        stream.socket.close()
    return seconds, streams[0].first - start, sum(stream.tokens for stream in streams)


def body(prompt: list[int], tokens: int) -> dict[str, Any]:
    """Without chance: random weights would end a reply after some hundred tokens."""
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "seed": 0}
    return asked | {"stream": True, "return_token_ids": True}


def main() -> None:
    place, asked = sys.argv[1], json.loads(sys.argv[2])

    def rounds(seeds: list[int], count: int, tokens: int) -> list[tuple[float, float, int]]:
        return [together(place, [body(p, tokens) for p in prompts(count, seed)]) for seed in seeds]

    processor = time.process_time()
    many = rounds(asked["rounds"], asked["streams"], asked["tokens"])
    processor = time.process_time() - processor
    lone = rounds(asked["firsts"], 1, asked["first_tokens"])
    told = [(seconds, tokens) for seconds, _, tokens in many]
    print(json.dumps({"rounds": told, "firsts": [first for _, first, _ in lone], "processor": processor}))


if __name__ == "__main__":
    main()
