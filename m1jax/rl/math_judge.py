"""Whether two mathematical answers are equal, by math-verify, within limits that always hold.

math-verify's own limits use SIGALRM: they work in the main thread only, and a power tower inside sympy's integers never
returns to the interpreter to see the signal. So the judging runs in one helper process, which limits its own processor
time and memory. What an answer costs there does not depend on how busy the machine is, so a run that is resumed judges
alike; and what happens to the helper from outside never becomes a judgement.
"""

import atexit
import contextlib
import json
import logging
import select
import signal
import subprocess
import sys
from pathlib import Path

from m1jax.errors import UserError

log = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("math_judge_worker.py")
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""what an answer may do to a library; other signals come from outside"""


class MathJudge:
    """Judges answers; the helper process starts with the first question that plain comparison cannot decide.

    Args:
        cpu_seconds: processor time for one judgement, at least 1; an answer that takes more is wrong.
        patience: seconds without any answer after which the helper counts as stuck.
    """

    def __init__(self, cpu_seconds: int = 5, patience: float = 120.0):
        self._cpu_seconds, self._patience = cpu_seconds, patience
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, expected: str, answer: str) -> bool:
        """True where the answer is the expected one, as text or as mathematics (`0.5` and `\\frac12`).

        Raises:
            UserError: the helper was killed or stuck twice in a row, which says nothing about the answer.
        """
        if expected.strip() == answer.strip():
            return True
        first = self._ask(expected, answer)
        if isinstance(first, bool):
            return first
        log.warning("the helper that judges answers %s at %.60r; asking another one", first, answer)
        second = self._ask(expected, answer)
        if isinstance(second, bool):
            return second
        if first == second and first in map(_killed_by, _CRASHES):
            log.warning("the helper %s again at %.60r: this answer counts as wrong", second, answer)
            return False
        raise UserError(
            f"the helper that judges mathematical answers {first}, and another one {second}, at {answer!r:.60}: is the "
            "memory full? The same command goes on from the last checkpoint"
        )

    def close(self) -> None:
        """Ends the helper process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.close)
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        process.wait()

    def _ask(self, expected: str, answer: str) -> bool | str:
        """The judgement, or what happened to the helper instead."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([expected, answer]).encode() + b"\n")
            process.stdin.flush()
            return self._read(process) == "true"
        except TimeoutError:
            self.close()
            return f"was silent for {self._patience:g} seconds"
        except (BrokenPipeError, EOFError):
            status = process.wait()
            self.close()
            return False if status == -signal.SIGXCPU else _killed_by(-status)

    def _start(self) -> subprocess.Popen[bytes]:
        # Run as a file, not as a module of this package: the helper needs neither jax nor its start-up time. -P: nor
        # the files beside it, some of which have names of the standard library.
        command = [sys.executable, "-P", str(_WORKER), str(self._cpu_seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.close)
        return self._process

    def _read(self, process: subprocess.Popen[bytes]) -> str:
        """One line from the helper. The protocol is one answer per question, so nothing is left in the pipe's
        buffer."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], self._patience)
        if not ready:
            raise TimeoutError
        line = process.stdout.readline()
        if not line:
            raise EOFError
        return line.decode().strip()


def _killed_by(number: int) -> str:
    """A helper's end in words, from the signal (or, below one, minus the exit status)."""
    return f"was killed by {signal.Signals(number).name}" if number > 0 else f"ended with status {-number}"
