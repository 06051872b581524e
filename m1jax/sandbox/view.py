"""What a program sees of this machine's files: the system's own, and the interpreter that runs us with its packages."""

import dataclasses
import os
import sys
from pathlib import Path

# Programs and libraries; no home, no configuration, nothing of /var, /run or /sys.
_SYSTEM = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store"),
    *("/etc/alternatives", "/etc/ld.so.cache"),
)


@dataclasses.dataclass(frozen=True)
class View:
    """Read-only."""

    folders: list[tuple[str, str]]
    """(path outside, path inside)"""
    links: list[tuple[str, str]]
    """(path inside, where it points)"""


def view() -> View:
    """What exists of it on this machine."""
    folders: list[tuple[str, str]] = []
    links: list[tuple[str, str]] = []
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            links.append((str(path), str(path.readlink())))
        elif path.exists():
            folders.append((str(path), str(path)))
    for path in _interpreter():
        if not any(path.is_relative_to(inside) for _, inside in folders):
            folders.append((str(path), str(path)))
    return View(folders, links)


def _interpreter() -> list[Path]:
    """Where the interpreter's parts lie, as they are called and as they are; outer folders first."""
    executable = Path(os.path.realpath(sys.executable))
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), executable.parent.parent}
    prefixes |= {prefix.resolve() for prefix in prefixes}
    forbidden = Path(os.path.expanduser("~")).resolve()
    # Never all of the machine, nor anybody's whole home.
    return sorted(path for path in prefixes if not forbidden.is_relative_to(path))
