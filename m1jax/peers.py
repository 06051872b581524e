"""Who of a job is still there.

When a process dies, the connections of the others break, and JAX says no more than that. So each process listens on a
port of its own and tells JAX's coordination service (which process 0 runs) where: what nobody listens on any more
belonged to one that is gone. Nothing is ever sent over these connections.
"""

import contextlib
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from jax._src.distributed import global_state  # no public name leads to the service's dictionary

KEY = "m1jax/peers"
SETTLING = 1.0  # seconds in which all connections of a dying process are closed, one after the other


class Peers:
    """The other processes of the job that this one has joined (`jax.distributed`)."""

    def __init__(self) -> None:
        host, _, port = str(global_state.coordinator_address).rpartition(":")
        self._coordinator = host.strip("[]"), int(port)
        assert global_state.client is not None, "jax.distributed has not been initialised"
        self._client = global_state.client
        with contextlib.suppress(OSError):  # then the others cannot name this process, which is no reason to stop
            self._listening = _listen(self._coordinator)
            place, port, *_ = self._listening.getsockname()
            where = f"{os.getpid()} {socket.gethostname()} {place} {port}"
            self._client.key_value_set(f"{KEY}/{global_state.process_id}", where)

    @property
    def first(self) -> bool:
        """Whether this is process 0, which runs the coordination service."""
        return global_state.process_id == 0

    def gone(self) -> list[str]:
        """Names of the processes that are no longer there, such as "process 3 (pid 4711 on host-b)"."""
        deadline = time.monotonic() + SETTLING
        while not (found := self._look()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _look(self) -> list[str]:
        if not self.first and not _listens(self._coordinator):
            return ["process 0, which runs the coordination service,"]
        try:
            entries = self._client.key_value_dir_get(KEY)
        except RuntimeError:  # it ends just now
            return []
        names, places = [], []
        for key, where in entries:
            pid, name, host, port = where.split()
            names.append(f"process {key.rpartition('/')[2]} (pid {pid} on {name})")
            places.append((host, int(port)))
        with ThreadPoolExecutor(32) as pool:
            return [name for name, listens in zip(names, pool.map(_listens, places)) if not listens]


def _listen(coordinator: tuple[str, int]) -> socket.socket:
    """Listens at that address of this host from which the coordinator is reached."""
    family, kind, _, _, place = socket.getaddrinfo(*coordinator, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as route:
        route.connect(place)  # sends nothing
        return socket.create_server((route.getsockname()[0], 0), family=family)


def _listens(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=2).close()
    except OSError:
        return False
    return True
