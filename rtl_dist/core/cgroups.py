"""The control groups that this process is in: what a container, or a job of SLURM's, is granted."""

from __future__ import annotations

from pathlib import Path


def groups_of(controller: str, root: Path) -> list[Path]:
    """The folders of the groups that limit this process by a controller, its own and those above.

    Args:
        root: of the file system.
    """
    found: list[Path] = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        hierarchy = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = hierarchy / group.lstrip("/")
        # in a container the group may be told as the host names it: then only the root is there
        found += [one for one in (folder, *folder.parents) if one.is_relative_to(hierarchy)]
    return found


def read_text(path: Path) -> str:
    """What a file holds; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
