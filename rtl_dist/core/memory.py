"""How much of the host's memory there is for this process, whatever the machine has."""

from __future__ import annotations

import os
from pathlib import Path

from rtl_dist.core.cgroups import groups_of, read_text

_UNKNOWN = 8 * 2**30  # bytes: where the system does not say


def available_memory() -> int:
    """Bytes of the machine, or what its container grants where that is less."""
    return min(_machine_memory(), container_memory() or _machine_memory())


def container_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the process's cgroup, or one above it, grants; None: no limit.

    Args:
        root: of the file system.
    """
    limits = []
    for folder in groups_of("memory", root):
        # version 2, and 1, which says no limit by a number that no machine has
        text = read_text(folder / "memory.max") or read_text(folder / "memory.limit_in_bytes")
        if text.strip().isdecimal():
            limits.append(int(text))
    return min(limits, default=None)


def _machine_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not of Unix
        return _UNKNOWN
