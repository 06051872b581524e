"""What becomes of memory that XLA:CPU gives back after every update."""

import ctypes
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
KEPT = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets a process that computes on a CPU keep up to 2 GiB of what it frees, where its C library is glibc.

    An update's temporary memory is allocated and freed as a whole. By default glibc maps so large a piece anew each
    time, and each of its pages costs a fault: a fifth of the processor time of an update of a small model
    (experiments/rl_speed).
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT)
