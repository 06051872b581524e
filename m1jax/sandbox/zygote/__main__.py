"""A worker of the sandbox: `python -S <this folder> <descriptor> <setup as JSON>`.

It is started with an empty environment and knows the standard library alone, so there is nothing of its parent's in it.

    waiter         this process; only waits
      zygote       first process of the worker's namespaces; forks, and never sees what it is forked for
        supervisor   takes jobs, watches programs, answers
        init         first process of one program's namespaces
          program

Whichever of waiter, zygote and supervisor dies, the others die, and with the zygote all that programs have started:
when the first process of a namespace of process ids ends, the kernel kills all others in there.
"""

import json
import os
import socket
import sys

import filter as seccomp
import jail
import linux
import protocol
import supervisor
import zygote

_NOBODY = 65534


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    setup = json.loads(sys.argv[2])
    try:
        seccomp.build(os.uname().machine)  # kept for all programs
        with open("/proc/self/oom_score_adj", "w") as file:  # if memory runs out, programs go first
            file.write("1000")
        uid, gid = _who_to_be()
        # Zygote, supervisor and init count as processes of the program's user; and this one, if it is the same user.
        ours = 4 if uid == os.geteuid() else 3
        jail.new_namespaces(uid, gid)
        child = os.fork()
        if child == 0:
            jail.enter(setup["folders"], setup["links"])
            linux.prctl(linux.PR_SET_PDEATHSIG, 9)
            jail.require_process_limit()
    except OSError as error:
        protocol.send(control, {"refused": protocol.describe(error)})
        return
    if child > 0:
        control.close()
        os.waitpid(child, 0)
        return
    supervised, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        requests.close()
        supervisor.serve(control, supervised, ours)
        return
    control.close()
    supervised.close()
    zygote.serve(requests, child, setup["packages"])


def _who_to_be() -> tuple[int, int]:
    """User and group outside: root becomes nobody, where there is one; anybody else stays who he is."""
    if os.geteuid() == 0 and _is_known("uid_map") and _is_known("gid_map"):
        os.setgroups([])
        return _NOBODY, _NOBODY
    return os.geteuid(), os.getegid()


def _is_known(table: str) -> bool:
    with open(f"/proc/self/{table}") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= _NOBODY < first + count for first, _, count in ranges)


main()
