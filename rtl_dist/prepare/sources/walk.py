"""The files below a folder: links followed, but never in a circle; what is no file is named."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rtl_dist.core.errors import DataError
from rtl_dist.core.text import shown

# Files that systems leave behind, besides those whose names begin with a dot.
_SYSTEM_FILES = {
    *("thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information"),
    *("lost+found", "@eadir", "#recycle"),
}
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True, slots=True)
class Listing:
    """What a folder holds, sorted and without hidden and system files."""

    folders: list[str] = field(default_factory=list)
    """Their names."""
    files: list[str] = field(default_factory=list)
    """Names of files, links to nothing among them: to read those says what is wrong."""
    odd: list[tuple[str, str]] = field(default_factory=list)
    """(name, what it is) of all that can never be read to its end."""


@dataclass(frozen=True, slots=True)
class Walked:
    """What lies below a folder."""

    files: list[Path] = field(default_factory=list)
    """Folder by folder."""
    odd: list[tuple[Path, str]] = field(default_factory=list)
    """What is left out, and why."""


def list_folder(folder: Path) -> Listing:
    """Raises DataError: the folder cannot be listed."""
    listing = Listing()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in _SYSTEM_FILES:
                    _put(entry, listing)
    except OSError as error:
        raise DataError(
            f"cannot list {shown(str(folder))}: {error.strerror}; correct its permissions"
        ) from error
    for names in (listing.folders, listing.files, listing.odd):
        names.sort()
    return listing


def walk(folder: Path, root: Path) -> Walked:
    """Everything visible below ``folder``; see ``walk_files``."""
    found = Walked()
    found.files.extend(walk_files(folder, root, found.odd))
    return found


def walk_files(folder: Path, root: Path, odd: list[tuple[Path, str]]) -> Iterator[Path]:
    """Every visible file below ``folder``: a folder's own by name, then those of the folders in it,
    by theirs; no more is remembered than the names of one folder on each level, and of all folders.

    A folder is entered once, however many links lead to it; and a link that leads to ``root`` or
    above it is not followed, or all of the source would be of one class.

    Args:
        odd: what is left out, and why, is added to it.
    """
    real_root = _resolved(root)
    entered: set[Path] = set()
    waiting, links = [folder], list[Path]()
    while waiting or links:  # links last, so that a folder counts by its own name
        path = waiting.pop() if waiting else links.pop(0)
        real = _resolved(path)
        if path != root and (real == real_root or real in real_root.parents):
            odd.append((path, "is a link to a folder above itself"))
        elif real in entered:
            odd.append((path, "is a link to a folder that is here already"))
        else:
            entered.add(real)
            listing = list_folder(path)
            odd.extend((path / name, what) for name, what in listing.odd)
            yield from (path / name for name in listing.files)
            below = [path / name for name in listing.folders]
            links += [one for one in below if one.is_symlink()]
            waiting += [one for one in reversed(below) if not one.is_symlink()]


def _resolved(folder: Path) -> Path:
    return Path(os.path.realpath(folder))


def _put(entry: os.DirEntry[str], listing: Listing) -> None:
    try:
        if entry.is_dir():
            listing.folders.append(entry.name)
        elif entry.is_file() or (what := _oddity(entry)) is None:
            listing.files.append(entry.name)
        else:
            listing.odd.append((entry.name, what))
    except OSError as error:
        in_circles = error.errno == errno.ELOOP
        what = "is a link to itself" if in_circles else f"cannot be read: {error.strerror}"
        listing.odd.append((entry.name, what))


def _oddity(entry: os.DirEntry[str]) -> str | None:
    try:
        kind = stat.S_IFMT(entry.stat().st_mode)
    except FileNotFoundError:  # a link to nothing
        return None
    return f"is {_KINDS.get(kind, 'something else')}, not a plain file"
