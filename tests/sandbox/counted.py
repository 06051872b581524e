"""What is there before and after: processes, mounts, and files in places that everybody may write to."""

import os
import time
from pathlib import Path


def processes():
    """Ids of all processes below this one."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {os.getpid()}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found - {os.getpid()}


def ours():
    """Processes below this one once the number of them has come to rest: the kernel reaps in its own time."""
    before = processes()
    for _ in range(100):
        time.sleep(0.02)
        now = processes()
        if now == before:
            return now
        before = now
    return before


def files(mark):
    """Files with this mark in their names wherever a stranger might have got to."""
    places = ["/tmp", "/var/tmp", "/dev/shm", "/", "/usr", str(Path.home()), os.getcwd()]
    return [path for place in places for path in Path(place).glob(f"*{mark}*")]


def mounts():
    return sorted(Path("/proc/self/mountinfo").read_text().splitlines())
