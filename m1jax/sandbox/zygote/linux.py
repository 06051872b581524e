"""The system calls that Python's standard library lacks, by way of the C library. Every failure is an OSError that
names the call."""

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
_MS_REC = 16384
_MS_PRIVATE = 1 << 18

MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MNT_DETACH = 2
# Calls that came after 2018 have the same number on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_CAPABILITIES_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def _check(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def _syscall(name: str, number: int, *arguments) -> int:
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words), name)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def enter_pid_namespace(descriptor: int) -> None:
    """Later children are born into the namespace of this `/proc/.../ns/pid`."""
    _check(_libc.setns(descriptor, CLONE_NEWPID), "setns")


def make_private(target: str) -> None:
    """Nothing that is mounted from here on shows outside this namespace."""
    _check(_libc.mount(b"none", os.fsencode(target), None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount")


def mount(kind: str, target: str, flags: int, options: str) -> None:
    """A new file system of a kind."""
    arguments = (kind.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(_libc.mount(*arguments), f"mount of {kind} on {target}")


def copy_of_mount(path: str) -> int:
    """Descriptor of a file or folder, with all that is mounted below it, which can be attached elsewhere."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    return _syscall(f"open_tree of {path}", _OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def attach(descriptor: int, target: str) -> None:
    """Mounts what `copy_of_mount` gave, and closes it."""
    arguments = (descriptor, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    _syscall(f"move_mount to {target}", _MOVE_MOUNT, *arguments)
    os.close(descriptor)


def set_mount_attributes(target: str | int, attributes: int) -> None:
    """Adds attributes to a mount (a path, or a descriptor of `copy_of_mount`) and all that are mounted below it."""
    attr = _MountAttr(attributes, 0, 0, 0)
    place = (target, b"") if isinstance(target, int) else (_AT_FDCWD, os.fsencode(target))
    flags = _AT_RECURSIVE | _AT_EMPTY_PATH
    _syscall("mount_setattr", _MOUNT_SETATTR, *place, flags, ctypes.byref(attr), ctypes.sizeof(attr))


def enter_root(root: str) -> None:
    """Makes `root`, a mount, the root of this mount namespace, and leaves the old one behind."""
    os.chdir(root)
    _syscall("pivot_root", _PIVOT_ROOT[os.uname().machine], b".", b".")  # the old one now lies over the new
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def prctl(option: int, argument: int, more=None) -> None:
    words = [ctypes.c_ulong(argument), more or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)]
    _check(_libc.prctl(option, *words), f"prctl {option}")


def drop_capabilities() -> None:
    """For good, where no privileges can be gained by executing something (PR_SET_NO_NEW_PRIVS)."""
    none = (ctypes.c_uint32 * 6)()  # two words each of effective, permitted and inheritable ones
    header = _CapabilityHeader(_CAPABILITIES_VERSION, 0)
    _check(_libc.capset(ctypes.byref(header), none), "capset")
