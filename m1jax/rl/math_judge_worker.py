"""The helper process of `math_judge`: lines `[expected, answer]` (JSON) in, `true` or `false` out.

python math_judge_worker.py CPU_SECONDS     SIGXCPU ends it at a question that takes longer
"""

import contextlib
import json
import math
import resource
import sys

MEMORY = 4 * 2**30  # bytes; beyond it an answer is a MemoryError, and wrong


def main(cpu_seconds: int) -> None:
    from math_verify import parse, verify

    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that a library prints may look like an answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin.buffer:
        expected, answer = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            gold, found = (parse(text, parsing_timeout=None) for text in (expected, answer))  # pyright: ignore[reportArgumentType]
            equal = bool(verify(gold, found, timeout_seconds=None))
        except Exception:  # whatever a strange answer does to the parser, it is not the expected one
            equal = False
        answers.write(b"true\n" if equal else b"false\n")
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
