"""Why a system does not isolate programs, and what to install or allow."""

import os
import platform
import sys

_OLDEST = (5, 14)
"""the first Linux that counts processes per user namespace"""


def unsupported() -> str | None:
    """Why this system cannot be asked at all."""
    if sys.platform != "linux":
        return f"it needs Linux {_OLDEST[0]}.{_OLDEST[1]} or later, this is {platform.system()}; use a virtual machine"
    release = platform.release()
    version = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if version < _OLDEST:
        return f"it needs Linux {_OLDEST[0]}.{_OLDEST[1]} or later, this is {release}; a newer kernel must be installed"
    return None


def explain(failed: str) -> str:
    """What failed, such as `unshare: Operation not permitted (EPERM)`, and what to do about it."""
    return f"this system does not let a program be isolated: {failed}. {_remedy(failed)}"


def _remedy(failed: str) -> str:
    if "ENOSYS" in failed:
        return "The kernel or the container's system-call filter lacks this call: allow it, or use Linux 5.14 or later"
    for setting, bad, good in (
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("user/max_user_namespaces", "0", "10000"),
        ("user/max_pid_namespaces", "0", "10000"),
        ("user/max_mnt_namespaces", "0", "10000"),
        ("user/max_net_namespaces", "0", "10000"),
    ):
        if _setting(setting) == bad and not (setting.startswith("kernel/") and os.geteuid() == 0):
            return f"Allow it as root: sysctl -w {setting.replace('/', '.')}={good}"
    if failed.startswith("RLIMIT_NPROC"):
        return "Run as an ordinary user, or as root of a container that knows more users than root"
    if failed.startswith("mount of proc"):
        return (
            "Inside a container /proc is partly hidden: start it with --privileged, or with "
            "--security-opt systempaths=unconfined (Kubernetes: procMount: Unmasked)"
        )
    return (
        "Inside a container, start it with --privileged, or with --security-opt seccomp=unconfined --security-opt "
        "apparmor=unconfined --security-opt systempaths=unconfined; on a machine of your own, allow user namespaces"
    )


def _setting(name: str) -> str | None:
    try:
        with open(f"/proc/sys/{name}") as file:
            return file.read().strip()
    except OSError:
        return None
