"""The seccomp filter of a program: system calls that have no place in a sandbox fail.

Namespaces, mounts and limits already hold the program. The filter takes away what they do not cover (sockets of
families that know no namespaces, such as vsock; memory that belongs to no process, such as memfd), and those doors into
the kernel that had to be mended most often.
"""

import ctypes
import errno
import functools
import os
import struct

import linux

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""the architectures whose system calls are known here -> AUDIT_ARCH"""

_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000

# x86_64 and aarch64; None where the call does not exist.
_REFUSED = {
    # looking into other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "perf_event_open": (298, 241),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # memory that no process is charged for, or that outlives its process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # large interfaces of the kernel
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "modify_ldt": (154, None),
    # the machine
    "sync": (162, 81),
    "syncfs": (306, 267),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "iopl": (172, None),
    "ioperm": (173, None),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
}
_CLONE, _CLONE3 = (56, 220), 435
_SOCKET, _SOCKETPAIR = (41, 198), (53, 199)
_MMAP = (9, 222)
_SETRLIMIT, _PRLIMIT = (160, 164), (302, 261)
# Newer calls than those looked through here do not exist for a program.
_NEWEST = 466
_X32 = 0x40000000

_NEW_NAMESPACES = (
    linux.CLONE_NEWNS
    | linux.CLONE_NEWCGROUP
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUSER
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
)
_AF_UNIX = 1
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20
_RLIMIT_CORE = 4

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _GREATER = 0x15, 0x25
_NUMBER, _ARCH = 0, 4  # offsets in struct seccomp_data


def _argument(index: int) -> int:
    """Offset of the low half of an argument; both machines are little-endian."""
    return 16 + 8 * index


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]


@functools.cache
def build(machine: str) -> bytes:
    """The filter as classic BPF.

    Raises:
        OSError: none of MACHINES.
    """
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"its system calls are not known, only those of {', '.join(MACHINES)}", machine)
    column = list(MACHINES).index(machine)
    code: list[tuple[int, int, int, int]] = []

    def step(operation: int, value: int, yes: int = 0, no: int = 0) -> None:
        code.append((operation, yes, no, value))

    def fail(error: int) -> None:
        step(_RETURN, _ERRNO | error)

    def rule(number: int, *body: tuple[int, int, int, int]) -> None:
        """For this call, the body decides; it may fall through, and then the call is allowed."""
        step(_EQUAL, number, 0, len(body) + 1)
        code.extend(body)
        step(_RETURN, _ALLOW)

    eperm = _ERRNO | errno.EPERM
    step(_LOAD, _ARCH)
    step(_EQUAL, MACHINES[machine], 1, 0)
    step(_RETURN, _KILL)
    step(_LOAD, _NUMBER)
    step(_GREATER, _X32 - 1, 0, 1)
    fail(errno.EPERM)
    step(_GREATER, _NEWEST, 0, 1)
    fail(errno.ENOSYS)
    step(
        _EQUAL, _CLONE3, 0, 1
    )  # its flags lie in memory, where a filter cannot look; the C library falls back to clone
    fail(errno.ENOSYS)
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            step(_EQUAL, numbers[column], 0, 1)
            fail(errno.EPERM)
    rule(
        _CLONE[column],
        (_LOAD, 0, 0, _argument(0)),
        (_AND, 0, 0, _NEW_NAMESPACES),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, eperm),
    )
    for call in (_SOCKET, _SOCKETPAIR):
        rule(call[column], (_LOAD, 0, 0, _argument(0)), (_EQUAL, 1, 0, _AF_UNIX), (_RETURN, 0, 0, eperm))
    shared = _MAP_SHARED | _MAP_ANONYMOUS
    rule(
        _MMAP[column],
        (_LOAD, 0, 0, _argument(3)),
        (_AND, 0, 0, shared),
        (_EQUAL, 0, 1, shared),
        (_RETURN, 0, 0, eperm),
    )
    # A limit of one byte is what keeps a crash from being handed to the machine's collector of core dumps.
    rule(_SETRLIMIT[column], (_LOAD, 0, 0, _argument(0)), (_EQUAL, 0, 1, _RLIMIT_CORE), (_RETURN, 0, 0, eperm))
    rule(
        _PRLIMIT[column],
        (_LOAD, 0, 0, _argument(1)),
        (_EQUAL, 0, 5, _RLIMIT_CORE),
        (_LOAD, 0, 0, _argument(2)),
        (_EQUAL, 0, 2, 0),
        (_LOAD, 0, 0, _argument(2) + 4),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, eperm),
    )
    step(_RETURN, _ALLOW)
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def install() -> None:
    """From here on, and in all children. Needs PR_SET_NO_NEW_PRIVS."""
    program = build(os.uname().machine)
    linux.prctl(linux.PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(_Filter(len(program) // 8, program)))
