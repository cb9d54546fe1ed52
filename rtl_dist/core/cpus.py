"""How many CPUs this process may use, whatever the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

from rtl_dist.core.cgroups import groups_of, read_text


def available_cpus() -> int:
    """The CPUs of its affinity, because the count of all lies under SLURM; fewer where the time
    that its container grants is that of fewer."""
    here = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        here = len(os.sched_getaffinity(0))
    granted = container_cpus()
    return here if granted is None else max(1, min(here, math.ceil(granted)))


def container_cpus(root: Path = Path("/")) -> float | None:
    """The CPUs whose time the process's cgroup, or one above it, grants; None: no limit.

    Args:
        root: of the file system.
    """
    limits = map(_limit, groups_of("cpu", root))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    """Of one cgroup: ``quota period``, of version 2 in a file, of version 1 in two."""
    words = read_text(folder / "cpu.max").split() or [
        read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    try:
        quota, period = map(int, words)
    except ValueError:  # max, or there is no such file
        return None
    return quota / period if quota > 0 and period > 0 else None
