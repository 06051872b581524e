"""The process that programs are forked from: an interpreter that is ready, and has never seen any of their data."""

import gc
import importlib
import os
import site
import socket

import init
import linux

DESCRIPTORS = 5
"""what a request brings along: the ends of job, stdin, stdout, stderr and report"""
# What short programs import most often; forked, they have it at no cost.
_READY = (
    *("array", "bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "fractions", "functools"),
    *("heapq", "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "threading"),
    *("time", "traceback", "typing"),
)


def serve(requests: socket.socket, supervisor: int, packages: list[str]) -> None:
    """Forks a program's init for each request, says which process it is, and when nothing of it is left.

    Returns when the supervisor has ended; in the process of a program that was given as source, it does not return but
    raises SystemExit.

    Args:
        requests: from the supervisor.
        supervisor: its process id.
        packages: folders of installed packages.
    """
    for name in _READY:
        importlib.import_module(name)
    site.setquit()
    site.setcopyright()
    site.sethelper()
    gc.collect()
    gc.freeze()  # the collector would copy every page that it looks at
    pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(requests, 1, DESCRIPTORS)
        except ConnectionResetError:
            return
        if not message:
            return
        linux.unshare(linux.CLONE_NEWPID)
        child = os.fork()
        if child == 0:
            requests.close()
            os.close(pids)
            init.main(descriptors, packages)
        linux.enter_pid_namespace(pids)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(child).encode())
        while (ended := os.wait()[0]) != child:
            if ended == supervisor:
                return
        requests.send(b"gone")
