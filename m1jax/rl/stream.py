"""Generation beside training: batch b is made by version max(b - k, 0) of the parameters, exactly.

Version v is what v generation batches of updates have made of the parameters; k is the staleness. With k = 0 a batch is
made when it is asked for, by the caller's own thread; with more, one further thread makes batches in their order while
the caller trains: on the same devices, or on some that do nothing else and receive every version that they write with.
What is made depends on versions alone, never on which of the two was faster. A run makes no batches beyond its last: of
one that had ended and is extended, the first k further batches are made by the version that it had ended with.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from m1jax.errors import UserError
from m1jax.rl.experience import Experience, Made
from m1jax.sharding import make_mesh, parameter_shardings, parse_mesh
from m1jax.train import placement
from m1jax.train.step import Params

T = TypeVar("T")


class Stream:
    """Generation batches in their order. A context manager.

    Args:
        experience: makes them.
        staleness: k.
        batches: how many there will be.
        mesh: of the devices that generate; None: those of the training.

    Raises:
        UserError: several processes would have to agree on an order.
    """

    def __init__(self, experience: Experience, *, staleness: int, batches: int, mesh: Mesh | None = None):
        if staleness and jax.process_count() > 1:
            raise UserError(f"staleness = {staleness}: generation beside training needs a single process; take 0")
        self._experience, self._staleness, self._batches = experience, staleness, batches
        self._apart = mesh is not None
        self._mesh = placement.current_mesh() if mesh is None else mesh
        # Another mesh needs a thread even where nothing happens beside it: what is ambient here is the training's.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "generation") if staleness or self._apart else None
        self._ready: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
        self._begun = 0
        """batches that are made or being made"""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def give(self, params: Params, version: int) -> None:
        """A version of the parameters, which may be donated as soon as its batches with staleness 0 are taken.

        Adds to a batch's figures how long it took to make, and how long the parameters took to where it was made, in
        seconds; with devices that only generate also `sync_bytes`, what they received together.
        """
        last = min(version + self._staleness, self._batches - 1)
        if self._begun > last:
            return
        begin = time.perf_counter()
        params = self._own(params)
        figures = {"sync_seconds": time.perf_counter() - begin}
        if self._apart:
            figures["sync_bytes"] = sum(x.sharding.num_devices * _shard_bytes(x) for x in jax.tree.leaves(params))

        def batch() -> Made:
            begin = time.perf_counter()
            made = self._experience.batch(params, version)
            seconds = {"generation_seconds": time.perf_counter() - begin}
            return dataclasses.replace(made, figures={**made.figures, **figures, **seconds})

        while self._begun <= last:
            self._ready.append(self._submit(batch))
            self._begun += 1

    def take(self) -> Made:
        """The next batch."""
        return self._ready.popleft().result()

    def run(self, function: Callable[[Experience, Params], T], params: Params) -> T:
        """Something else for which the policy writes, behind all batches that have begun."""
        params = self._own(params)
        return self._submit(lambda: function(self._experience, params)).result()

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Waits for what is in flight, and gives (what JSON can hold, arrays) from which `restore` goes on."""
        ready = [future.result().to_arrays() for future in self._ready]
        rest, arrays = self._experience.state()
        flight = {str(number): made for number, (_, made) in enumerate(ready)}
        return {"experience": rest, "begun": self._begun, "ready": [said for said, _ in ready]}, {
            **arrays,
            "ready": flight,
        }

    def restore(self, stored: dict[str, Any], arrays: dict[str, Any]) -> None:
        self._experience.restore(stored["experience"], arrays)
        self._begun = stored["begun"]
        for number, said in enumerate(stored["ready"]):
            future: concurrent.futures.Future[Made] = concurrent.futures.Future()
            future.set_result(Made.from_arrays(said, arrays["ready"][str(number)]))
            self._ready.append(future)

    def _own(self, params: Params) -> Params:
        """Parameters that the training cannot take away while they are used."""
        if self._apart and self._mesh is not None:
            alone = self._mesh.size == 1
            where = self._mesh.devices.item() if alone else parameter_shardings(params, self._mesh)
            return jax.block_until_ready(jax.device_put(params, where))
        return params if self._pool is None else jax.block_until_ready(jax.tree.map(jnp.copy, params))

    def _submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        def placed() -> T:
            with contextlib.ExitStack() as around:  # what is ambient is so for each thread
                if self._mesh is not None:
                    around.enter_context(_on(self._mesh))
                return job()

        if self._pool is not None:
            return self._pool.submit(placed)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_result(placed())
        return future


def split(spec: str) -> tuple[list[Any], Mesh | None]:
    """(devices that train, mesh of those that generate) where the last devices do nothing else; a spec as `make_mesh`
    has it, empty: all train, and there is no such mesh.

    Raises:
        UserError: what `make_mesh` raises, no device would be left to train, or there are several processes.
    """
    devices = jax.devices()
    if not spec:
        return devices, None
    sizes = parse_mesh(spec)
    count = math.prod(sizes.values())
    if not 0 < count < len(devices):
        raise UserError(
            f"generator_mesh {spec!r} must be for 1 to {len(devices) - 1} devices: there are {len(devices)}, and one "
            "must train"
        )
    if jax.process_count() > 1:
        raise UserError(f"generator_mesh {spec!r}: devices that only generate need a single process")
    return devices[:-count], make_mesh(spec, devices[-count:])


def _on(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Work on a mesh; what one device does alone needs none."""
    return jax.default_device(mesh.devices.item()) if mesh.size == 1 else jax.set_mesh(mesh)


def _shard_bytes(x: jax.Array) -> int:
    """On one device."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
