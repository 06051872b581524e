"""The server as a process: its socket, its signals, its end."""

from __future__ import annotations

import contextlib
import errno
import gc
import signal
import socket
import sys
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from m1jax.errors import UserError
from m1jax.serve.backend import Backend

DRAIN = 20.0
"""Seconds that replies have to come to their end once the server is asked to stop."""


SWITCH = 0.0005
"""Seconds after which the thread of the engine gets the interpreter from the event loop. Python's own 0.005 are a fifth
of an engine's call on a fast device, which would have nothing to do meanwhile."""


class _Server(uvicorn.Server):
    """Uvicorn's, which tells the backend when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, backend: Backend):
        super().__init__(config)
        self._backend = backend

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._backend.draining:
            self._backend.drain(DRAIN)
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one. Raises UserError where that cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port} is none; --port takes 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{host} port {port} is in use by another program, perhaps another server; end that one, or choose "
                "another port with --port (0 takes a free one)"
            ) from error
        why = (error.strerror or str(error)).partition(" (")[0]
        raise UserError(f"cannot listen on {host} port {port}: {why}; choose others with --host and --port") from error


def run(app: ASGIApp, backend: Backend, listening: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT; then replies that are being written come to their end first."""
    sys.setswitchinterval(SWITCH)
    # The model and what JAX knows stay; to look through it for garbage would stop all threads for a tenth of a second.
    gc.collect()
    gc.freeze()
    # Uvicorn sends itself the signal again when it is done, and SIGTERM has been obeyed by then.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(DRAIN) + 5,
        lifespan="on",
        proxy_headers=False,
    )
    with contextlib.closing(listening):
        try:
            _Server(config, backend).run([listening])
        finally:
            signal.signal(signal.SIGTERM, before)
