"""Files appear whole or not at all, errors name the file, a directory belongs to one process."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from m1jax import disk
from m1jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    disk.write_atomically(file, "before")
    disk.write_atomically(file, b"after \xff")
    assert file.read_bytes() == b"after \xff"

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        disk.write_atomically(file, "lost")
    assert file.read_bytes() == b"after \xff"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_directory_takes_the_place_of_another(tmp_path):
    for name, text in (("here", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    disk.put_in_place(tmp_path / "new", tmp_path / "here")
    assert (tmp_path / "here" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("number", "named", "says"),
    [
        (
            errno.ENOSPC,
            None,
            r"x: the disk is full \(1,000 bytes were to be written\); free some and start again",
        ),
        (errno.EDQUOT, "/data/y", r"/data/y: the disk is full"),
        (errno.EROFS, None, r"/data/x: this file system is read-only; choose another place"),
        (errno.EACCES, None, r"/data/x: not permitted \(.*\); choose another place, or change its permissions"),
        (errno.EIO, None, r"/data/x: cannot be written \(Input/output error\)"),
    ],
)
def test_errors_name_the_file(number, named, says):
    with pytest.raises(UserError, match=says), disk.writing(Path("/data/x"), 1000):
        raise OSError(number, os.strerror(number), named)


def test_a_place_that_is_moved_is_noticed(tmp_path):
    (tmp_path / "run").mkdir()
    place = disk.Place(tmp_path / "run")
    place.check()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="run was moved or removed"):
        place.check()
    (tmp_path / "run").mkdir()  # by somebody else
    with pytest.raises(UserError, match="run was moved or removed"):
        place.check()
    (tmp_path / "run").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    place.check()


HOLDER = """
import sys, time
from pathlib import Path
from m1jax.disk import Lock
lock = Lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        named = rf"{tmp_path} is in use: process {holder.pid} on {socket.gethostname()}, since \d{{4}}-"
        for _ in range(2):  # having been refused changes nothing
            with pytest.raises(UserError, match=named) as error:
                disk.Lock(tmp_path)
        assert "\n" not in str(error.value)
    finally:
        holder.kill()
        holder.communicate()
    lock = disk.Lock(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / disk.LOCK).read_text()
    del lock


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", missing)
    disk.Lock(tmp_path)
    assert "has no locks" in caplog.text
