"""How many CPUs this process may use, whatever the machine has."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Set
from pathlib import Path

from rtl_dist.core.cgroups import groups_of, read_text


def available_cpus() -> int:
    """The CPUs of its affinity, because the count of all lies under SLURM; fewer where the time
    that its container grants is that of fewer."""
    granted = container_cpus()
    here = len(own_cpus())
    return here if granted is None else max(1, min(here, math.ceil(granted)))


def own_cpus() -> frozenset[int]:
    """The numbers of the CPUs of its affinity."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def share_of_cpus(mine: Set[int], processes: Iterable[Set[int]], granted: float | None) -> int:
    """How many CPUs one of the processes of a machine may use beside the others.

    Each CPU is shared by those that may run on it: a task that a scheduler gave CPUs of its own has
    all of them, processes that were given none have their part of the machine.

    Args:
        mine: of this process, one of ``processes``.
        granted: see ``container_cpus``; shared by those that share CPUs.
    """
    sharing = Counter(cpu for one in processes for cpu in one)
    share = sum(1 / max(1, sharing[cpu]) for cpu in mine)
    if granted is not None:
        share = min(share, math.ceil(granted) / max(sharing[cpu] for cpu in mine))
    return max(1, int(share + 1e-6))


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
