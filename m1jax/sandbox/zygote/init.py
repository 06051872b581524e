"""The first process of a program's namespaces: furnishes them, starts the program, and reports how it ended."""

import json
import os
import resource
import signal
import struct
from typing import NoReturn

import filter as seccomp
import inplace
import jail
import linux
from protocol import Job, describe

STARTED, REFUSED, NOT_FOUND = b"S", b"F", b"X"
"""first byte of a report: then follows the status of the program, why there is no jail, or why there is no program"""


def main(descriptors: list[int], packages: list[str]) -> NoReturn:
    """Ends this process; that of a program given as source by SystemExit, for the interpreter to end as it always does.

    Args:
        descriptors: the request, to be read to its end; the program's stdin, stdout and stderr; the report, to which is
            written how it ended.
        packages: folders of installed packages.
    """
    job, stdin, stdout, stderr, report = descriptors
    with os.fdopen(job, "rb") as stream:
        head, _, source = stream.read().partition(b"\n")
    words = json.loads(head)
    ours = words.pop("ours")
    wanted = Job(**words)
    try:
        jail.furnish(wanted.files)
    except OSError as error:
        os.write(report, REFUSED + describe(error).encode())
        os._exit(1)
    program = os.fork()
    if program == 0:
        try:
            _prepare(wanted, stdin, stdout, stderr, ours)
            if not wanted.command:
                with open(inplace.NAME, "wb") as file:
                    file.write(source)
            else:
                os.execvpe(wanted.command[0], wanted.command, wanted.environment)
        except OSError as error:
            name = wanted.command[0] if wanted.command else inplace.NAME
            os.write(report, NOT_FOUND + f"{name}: {error.strerror}\0".encode("utf-8", "replace"))
            os._exit(127)
        os.close(report)
        inplace.run(source, wanted.environment, packages)
    for descriptor in (stdin, stdout, stderr):
        os.close(descriptor)
    while True:
        ended, status = os.wait()  # orphans become our children, too
        if ended == program:
            os.write(report, STARTED + struct.pack("=i", status))
            os._exit(0)


def _prepare(job: Job, stdin: int, stdout: int, stderr: int, ours: int) -> None:
    """Takes from this process what a program must not have."""
    os.setsid()
    for target, descriptor in enumerate((stdin, stdout, stderr)):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(jail.SCRATCH)
    os.umask(0o077)
    seconds = int(job.cpu_seconds) + 2  # of one process; the supervisor counts them all, and more finely
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_DATA, job.memory, job.memory),
        (resource.RLIMIT_STACK, min(8 << 20, job.memory), job.memory),
        (resource.RLIMIT_NPROC, job.processes + ours, job.processes + ours),
        (resource.RLIMIT_FSIZE, job.files, job.files),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        # Zero would still hand a crash to a collector of core dumps; one byte does not.
        (resource.RLIMIT_CORE, 1, 1),
    ):
        _, allowed = resource.getrlimit(limit)
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(limit, (soft, hard))
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_DUMPABLE, 1)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install()
    if job.command:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
