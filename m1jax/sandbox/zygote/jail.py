"""What a program finds itself in: namespaces and a file system of its own.

The worker enters the jail once (`enter`); each program then gets what must be fresh (`furnish`): process ids, mounts, a
scratch folder, the network. The worker's user is nobody outside and 1000 inside, without any privilege there once a
program has been executed: executing drops the capabilities of everybody who is not root, and there is no root here.
"""

import errno
import os
import resource
import socket

import linux

USER = 1000
SCRATCH = "/scratch"
_DEVICES = ("null", "full", "random", "urandom")  # no zero: mapped shared, it is memory that no process is charged for
_ETC = {
    "passwd": f"sandbox:x:{USER}:{USER}::{SCRATCH}:/bin/sh\n",
    "group": f"sandbox:x:{USER}:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_LINKS = [("/dev/fd", "/proc/self/fd"), ("/dev/shm", SCRATCH), ("/tmp", SCRATCH), ("/var/tmp", SCRATCH)]
_STAGE = "/tmp"  # every system has this folder; the new root is built upon it
_QUIET = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
_FRESH = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS


def new_namespaces(uid: int, gid: int) -> None:
    """Puts this process into a user namespace whose only user is `uid` outside and USER inside, and into namespaces for
    the rest.

    Process ids are those of the old namespace still; the next child is the first process of the new one. A child that
    stays behind writes the tables of users: only the old namespace may name another user than oneself.
    """
    process = os.getpid()
    reader, writer = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(writer)
            if os.read(reader, 1):
                # Denying setgroups is required of whoever is not root; groups were given up before.
                tables = {"setgroups": "deny", "gid_map": f"{USER} {gid} 1", "uid_map": f"{USER} {uid} 1"}
                for name, text in tables.items():
                    with open(f"/proc/{process}/{name}", "w") as file:
                        file.write(text)
                os._exit(0)
        finally:
            os._exit(1)
    os.close(reader)
    try:
        linux.unshare(linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWCGROUP | _FRESH)
        os.write(writer, b"x")
    finally:
        os.close(writer)
        _, status = os.waitpid(helper, 0)
    if status != 0:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), "uid_map")


def enter(folders: list[tuple[str, str]], links: list[tuple[str, str]]) -> None:
    """Becomes USER, and makes the read-only root of the sandbox the root of this mount namespace.

    Args:
        folders: (path outside, path inside) of what is shown.
        links: (path inside, where it points).
    """
    linux.make_private("/")
    # Taken hold of while this is still the user outside: an interpreter in root's home is out of nobody's reach.
    shown = {inside: linux.copy_of_mount(outside) for outside, inside in folders}
    for tree in shown.values():
        linux.set_mount_attributes(tree, linux.MOUNT_ATTR_NODEV)
    shown |= {f"/dev/{name}": linux.copy_of_mount(f"/dev/{name}") for name in _DEVICES}
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)

    linux.mount("tmpfs", _STAGE, linux.MS_NOSUID | linux.MS_NODEV, "size=4m,nr_inodes=4k,mode=755")
    for path, tree in shown.items():
        _place(f"{_STAGE}{path}", os.path.isdir(f"/proc/self/fd/{tree}"))
        linux.attach(tree, f"{_STAGE}{path}")
    for name, text in _ETC.items():
        _place(f"{_STAGE}/etc/{name}", folder=False)
        with open(f"{_STAGE}/etc/{name}", "w") as file:
            file.write(text)
    for path, target in [*links, *_LINKS]:
        if not os.path.lexists(f"{_STAGE}{path}"):  # an interpreter below /tmp is shown where it is
            os.makedirs(os.path.dirname(f"{_STAGE}{path}"), exist_ok=True)
            os.symlink(target, f"{_STAGE}{path}")
    for path in (SCRATCH, "/proc"):
        _place(f"{_STAGE}{path}", folder=True)
    # Possible only where a whole /proc is seen already, as it is here still. Those of programs are mounted over it.
    linux.mount("proc", f"{_STAGE}/proc", _QUIET, "")
    linux.enter_root(_STAGE)
    linux.set_mount_attributes("/", linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)  # USER cannot look into this process, nor into those forked from it


def require_process_limit() -> None:
    """The kernel lets its own root have as many processes as it likes, whatever that user is called in here.

    Raises:
        OSError: of such a user.
    """
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
            if os.fork() > 0:
                os.wait()
        except BlockingIOError:
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        raise PermissionError(errno.EPERM, "this user's processes cannot be limited", "RLIMIT_NPROC")


def _place(path: str, folder: bool) -> None:
    """Something to mount upon."""
    if folder:
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "a").close()


def furnish(scratch_bytes: int) -> None:
    """In the first process of a program's process ids: its own mounts, scratch folder, /proc, network and IPC."""
    linux.unshare(_FRESH)
    options = f"size={scratch_bytes},nr_inodes={max(64, scratch_bytes // 4096)},mode=700,uid={USER},gid={USER}"
    linux.mount("tmpfs", SCRATCH, linux.MS_NOSUID | linux.MS_NODEV, options)
    # Processes only, and only those that the program may look into: not the first one, which is ours.
    linux.mount("proc", "/proc", _QUIET, "hidepid=invisible,subset=pid")
    socket.sethostname("sandbox")
