"""Short programs per second in the sandbox, one worker per processor.

    python experiments/sandbox_speed/sandbox_speed.py [PROGRAMS]

The processor time says what an otherwise idle machine would do, whatever else this one was doing meanwhile.
"""

import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from m1jax import sandbox

KINDS = {
    "Python as text": "print(sum(map(int, input().split())))",
    "Python, executed": ["python", "-c", "print(sum(map(int, input().split())))"],
    "/bin/true": ["true"],
}


def processor_seconds() -> float:
    """Of this process and of all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main(programs: int) -> None:
    processors = len(os.sched_getaffinity(0))
    print(f"{processors} processors, load {os.getloadavg()[0]:.1f}")
    for kind, command in KINDS.items():
        before = processor_seconds()
        with sandbox.Pool() as pool, ThreadPoolExecutor(processors) as threads:
            list(threads.map(lambda _: pool.run("pass"), range(processors)))  # all workers are started
            begun = time.perf_counter()
            results = list(threads.map(lambda _, c=command: pool.run(c, stdin="1 2 3\n"), range(programs)))
            seconds = time.perf_counter() - begun
        each = (processor_seconds() - before) / programs
        assert {result.reason for result in results} == {"ok"}
        print(f"{kind:18} {programs / seconds:6.1f} a second, {each * 1e3:5.1f} ms of processor time each")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
