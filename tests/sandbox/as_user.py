"""Runs programs in a pool as an ordinary user: JSON lines in, JSON lines out. Started by root, who becomes nobody."""

import ctypes
import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def become_nobody():
    """Gives up root; where the interpreter or this repository lie in root's home, they are shown to nobody first."""
    sys.path.insert(0, str(ROOT / "m1jax" / "sandbox" / "zygote"))
    import linux

    needed = {Path(sys.prefix), Path(sys.base_prefix), ROOT}
    closed = sorted({parent for path in needed for parent in path.parents if not parent.stat().st_mode & 0o001})
    if closed:
        linux.unshare(linux.CLONE_NEWNS)
        linux.make_private("/")
        within = [path for path in needed if path.is_relative_to(closed[0])]
        copies = {path: linux.copy_of_mount(str(path)) for path in within}
        linux.mount("tmpfs", str(closed[0]), 0, "mode=755")
        for path, copy in copies.items():
            path.mkdir(parents=True)
            linux.attach(copy, str(path))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as if the user had started it
    os.environ["HOME"] = "/nonexistent"


def main():
    become_nobody()
    from m1jax import sandbox

    with sandbox.Pool(1) as pool:
        print("ready", flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            result = pool.run(job["command"], stdin=job["stdin"], limits=sandbox.Limits(**job["limits"]))
            print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
