"""Systems that cannot isolate a program: it is not run, and the message says what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m1jax.sandbox import refusal

ROOT = Path(__file__).parents[2]

# Lives in a namespace of its own, of which it is root: there it may forbid what this machine allows.
WITHOUT_NAMESPACES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.geteuid(), os.getegid()
assert libc.unshare(0x10000000) == 0, os.strerror(ctypes.get_errno())
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)
with open("/proc/sys/user/SETTING", "w") as file:
    file.write("0")
"""
# As the filters of containers do: unshare fails.
WITH_A_FILTER = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
program = b"".join(struct.pack("=HBBI", *line) for line in [
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)])
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(4, program)), 0, 0) == 0
"""
ASK = """
import json
from m1jax import sandbox
from m1jax.errors import UserError
said = []
for attempt in (sandbox.require, sandbox.Pool):
    try:
        attempt()
    except UserError as error:
        said.append(str(error))
result = sandbox.run("open('/tmp/m1jax-was-run', 'w')")
print(json.dumps([said, result.status, result.stdout, result.stderr, result.reason]))
"""


def ask(preparation):
    done = subprocess.run(
        [sys.executable, "-c", preparation + ASK], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("preparation", "cause", "remedy"),
    [
        (
            WITHOUT_NAMESPACES.replace("SETTING", "max_user_namespaces"),
            "unshare: No space left",
            "sysctl -w user.max_user_namespaces=",
        ),
        (
            WITHOUT_NAMESPACES.replace("SETTING", "max_net_namespaces"),
            "unshare: No space left",
            "sysctl -w user.max_net_namespaces=",
        ),
        (WITH_A_FILTER, "unshare: Operation not permitted (EPERM)", "--privileged"),
    ],
    ids=["no-user-namespaces", "no-net-namespaces", "filter"],
)
def test_refused(preparation, cause, remedy):
    said, *result, message, reason = ask(preparation)
    assert (result, reason) == ([None, ""], "refused")
    assert len(said) == 2
    for text in (*said, message):
        assert "does not let a program be isolated" in text
        assert cause in text
        assert remedy in text
    assert not Path("/tmp/m1jax-was-run").exists()


def test_the_kernels_own_root_in_disguise():
    """Its processes are not counted, whatever it is called; anybody else is at home in a namespace with one user."""
    preparation = WITHOUT_NAMESPACES[: WITHOUT_NAMESPACES.index('with open("/proc/sys/user')]
    said, *_, message, reason = ask(preparation)
    if os.geteuid() == 0:
        assert reason == "refused"
        assert "RLIMIT_NPROC" in message
        assert "Run as an ordinary user" in said[0]
    else:
        assert (said, reason) == ([], "ok")


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=10000"),
    ],
)
def test_settings_of_distributions(monkeypatch, setting, value, remedy):
    monkeypatch.setattr(refusal, "_setting", lambda name: value if name == setting else None)
    monkeypatch.setattr(refusal.os, "geteuid", lambda: 1000)
    assert refusal.explain("unshare: Operation not permitted (EPERM)").endswith(remedy)


def test_a_hidden_proc_is_named():
    said = refusal.explain("mount of proc on /tmp/proc: Operation not permitted (EPERM)")
    assert "systempaths=unconfined" in said


@pytest.mark.parametrize(
    ("platform", "release", "said"),
    [
        ("darwin", "24.1.0", "needs Linux 5.14 or later, this is "),
        ("linux", "4.18.0-553.el8_10.x86_64", "needs Linux 5.14 or later, this is 4.18.0-553"),
        ("linux", "5.14.0-427.el9.x86_64", None),
        ("linux", "6.18.44", None),
    ],
)
def test_systems_that_are_too_old(monkeypatch, platform, release, said):
    monkeypatch.setattr(refusal.sys, "platform", platform)
    monkeypatch.setattr(refusal.platform, "release", lambda: release)
    reason = refusal.unsupported()
    assert reason is None if said is None else said in reason
