"""What the processes of one job tell each other.

Except for `writes` and `own_rows`, all processes must call a function here, in the same order; a process that is alone
gets its own values back.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from m1jax.errors import UserError


def writes() -> bool:
    """Whether this process writes what all know: logs, samples, exports."""
    return jax.process_index() == 0


def gathered(value: np.ndarray) -> np.ndarray:
    """[processes, ...]: this process's value beside those of all others; shapes and dtypes are equal everywhere."""
    if jax.process_count() == 1:
        return np.asarray(value)[None]
    return np.asarray(multihost_utils.process_allgather(value))


def on_host(tree: Any) -> Any:
    """Arrays as numpy, whole, in every process. An array of this process alone stays its own."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(whole, tree)


def from_first(numbers: list[int]) -> list[int]:
    """The list of process 0, whatever this one has; its numbers fit into 32 bits."""
    if jax.process_count() == 1:
        return numbers
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    mine = np.resize(np.array([*numbers, 0], np.int32), length)  # of this process; only those of process 0 count
    return [int(number) for number in multihost_utils.broadcast_one_to_all(mine)] if length else []


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return bool(gathered(np.array(flag)).any())


def raise_together(error: BaseException | None, otherwise: str) -> None:
    """Lets all processes fail where one does, so that none waits for it in vain.

    Raises:
        BaseException: `error`, in the process that has one.
        UserError: `otherwise`, in those that have none while another has.
    """
    somewhere = any_of(error is not None)
    if error is not None:
        raise error
    if somewhere:
        raise UserError(otherwise)


def stop_agreed(number: int) -> bool:
    """Whether the job was asked to stop (SIGTERM to any process) and all processes can do so at this point.

    Args:
        number: of the point, the same in every process; grows with every call. Needs `jax.distributed`.
    """
    return multihost_utils.reached_preemption_sync_point(number)


def own_rows(array: Any) -> np.ndarray:
    """An array of this process; of a global one (placed by a NamedSharding), what this process holds, in order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    sharding: Any = array.sharding
    return np.asarray(multihost_utils.global_array_to_host_local_array(array, sharding.mesh, sharding.spec))
