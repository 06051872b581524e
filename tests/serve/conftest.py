"""A server in this process, with the smallest model and random weights."""

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from m1jax.chat import Tokenizer
from m1jax.serve.app import make_app
from m1jax.serve.backend import Backend, engines
from m1jax.serve.grammar import Grammars
from m1jax.serve.job import Served
from m1jax.serve.limits import Limits
from m1jax.serve.server import listen
from tests import tiny

ROWS = 4


@pytest.fixture(scope="session")
def make_engine():
    """Makes an engine for the smallest model."""
    return engines(tiny.model(), rows=ROWS, max_length=2048)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.tiny()


class Live:
    """A running server, and a client for it."""

    def __init__(self, backend: Backend, served: Served, client: httpx.Client):
        self.backend, self.served, self.client = backend, served, client

    def post(self, path: str, **body) -> httpx.Response:
        return self.client.post(path, json=body)

    def chat(self, content="hi", **body):
        """A reply's first choice."""
        answer = self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def at_rest(self, seconds=10.0) -> bool:
        """Whether every row is free again before long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            engine = self.backend._engine
            if engine is not None and not engine.busy and not self.backend.running:
                return not any(part.running or part.waiting for part in engine._parts)
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def running(make_engine, tokenizer, *, api_key=None, thinking=None, **limits) -> Iterator[Live]:
    backend = Backend(make_engine, (chosen := Limits(**limits)).queue)
    served = Served(
        name="tiny",
        tokenizer=tokenizer,
        capacity=backend.capacity,
        limits=chosen,
        grammars=Grammars(tokenizer, tiny.CONFIG.vocab_size),
        thinking=thinking,
    )
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(backend, served, api_key), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = listening.getsockname()[1]
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            yield Live(backend, served, client)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="session")
def live(make_engine, tokenizer) -> Iterator[Live]:
    """The server that most tests share."""
    with running(make_engine, tokenizer, new_tokens=1000, queue=64) as live:
        yield live
