"""Generation beside training: batch b is made by version max(b - k, 0) of the parameters, exactly.

Version v is what v generation batches of updates have made of the parameters; k is the staleness. With k = 0 a batch is
made when it is asked for, by the caller's own thread; with more, one further thread makes batches in their order while
the caller trains. What is made depends on versions alone, never on which of the two was faster.
"""

import collections
import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from m1jax.errors import UserError
from m1jax.rl.experience import Experience, Made
from m1jax.train import placement
from m1jax.train.step import Params

T = TypeVar("T")


class Stream:
    """Generation batches in their order. A context manager.

    Args:
        experience: makes them.
        staleness: k.
        batches: how many there will be.
        device: number of the device that generates; None: those of the training.

    Raises:
        UserError: there is no such device, or several processes would have to agree on an order.
    """

    def __init__(self, experience: Experience, *, staleness: int, batches: int, device: int | None = None):
        if staleness and jax.process_count() > 1:
            raise UserError(f"staleness = {staleness}: generation beside training needs a single process; take 0")
        if device is not None and device >= len(jax.devices()):
            raise UserError(f"generator_device = {device}: there are devices 0 to {len(jax.devices()) - 1}")
        self._experience, self._staleness, self._batches = experience, staleness, batches
        self._device = None if device is None else jax.devices()[device]
        self._mesh = None if device is not None else placement.current_mesh()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "generation") if staleness else None
        self._ready: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
        self._begun = 0
        """batches that are made or being made"""

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def give(self, params: Params, version: int) -> None:
        """A version of the parameters, which may be donated as soon as its batches with staleness 0 are taken."""
        last = min(version + self._staleness, self._batches - 1)
        if self._begun > last:
            return
        params = self._own(params)
        while self._begun <= last:
            self._ready.append(self._submit(lambda: self._experience.batch(params, version)))
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
        if self._device is not None:
            return jax.device_put(params, self._device, may_alias=False)
        return params if self._pool is None else jax.tree.map(jnp.copy, params)

    def _submit(self, job: Callable[[], T]) -> concurrent.futures.Future[T]:
        def placed() -> T:
            with contextlib.ExitStack() as around:  # what is ambient is so for each thread
                if self._mesh is not None:
                    around.enter_context(jax.set_mesh(self._mesh))
                if self._device is not None:
                    around.enter_context(jax.default_device(self._device))
                return job()

        if self._pool is not None:
            return self._pool.submit(placed)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_result(placed())
        return future
