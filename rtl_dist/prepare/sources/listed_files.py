"""Which file a table's line means, though it was written on another system, or by another hand."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath

from rtl_dist.core.errors import DataError
from rtl_dist.core.text import did_you_mean, shorten, shown
from rtl_dist.prepare.sources.items import IMAGE_SUFFIXES
from rtl_dist.prepare.sources.walk import list_folder

_ABSOLUTE = re.compile(r"([A-Za-z]:)?/")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MOST_BELOW = 1_000_000  # files among which one is looked for by its name alone
_MOST_COMPARED = 5_000  # names among which the nearest is looked for


class ListedFiles:
    """Files by how a table writes them; remembers what was not written as the files are called.

    In turn: as it is written; with slashes for backslashes; below the table's folder for an
    absolute path of another system; in another case or spelling of letters; with the extension that
    is missing; and anywhere below, if only one file has that name.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[Path, dict[str, list[str]]] = {}
        self._odd = Counter[str]()
        self._examples: dict[str, str] = {}

    def is_file(self, written: str) -> bool:
        """Whether it is one as it is written, but for slashes, the case and the folders above."""
        if not written:
            return False
        return any(self._folded(path) is not None for path in _readings(written))

    def find(self, written: str) -> str:
        """The file's path relative to the root, with forward slashes.

        Raises:
            DataError: there is none, or several it may be; to be put behind the path.
        """
        if _URL.match(written):
            raise DataError("is a URL: download the images, and list the files")
        plain = posixpath.normpath(written)
        if not _is_absolute(plain) and (self.root / plain).is_file():
            return plain
        readings = list(_readings(written))
        for path in readings:
            if (found := self._folded(path)) is not None:
                kind = "written in another way"
                if _is_absolute(written):
                    kind = "with folders of another place"
                elif found == posixpath.normpath(written.replace("\\", "/")):
                    kind = "with backslashes"
                return self._remember(written, found, kind)
        for path in readings:
            if (found := self._without_extension(path)) is not None:
                return self._remember(written, found, "without extension")
        name = readings[-1].name
        same = self._below.get(_fold(name), [])
        if len(same) == 1:
            return self._remember(written, same[0], "without their folder")
        if len(same) > 1:
            raise DataError(f"may be {shorten(sorted(same))}: write which, with its folder")
        if _is_absolute(plain):
            raise DataError(
                "is an absolute path, and there is no such file below the table: write it"
                " relative to the CSV's folder, or the data set depends on this machine"
            )
        if (self.root / plain).exists():
            raise DataError("is not a plain file: correct the path or remove the line")
        raise DataError(
            f"is no file in {shown(str(self.root))}{self._nearest(readings[0])}:"
            " correct the path or remove the line"
        )

    @property
    def notes(self) -> list[str]:
        """What was read in another way than written: a line a kind."""
        return [
            f"{count:,} paths {kind}: {self._examples[kind]}" for kind, count in self._odd.items()
        ]

    def _remember(self, written: str, found: str, kind: str) -> str:
        self._odd[kind] += 1
        self._examples.setdefault(kind, f"{shown(written)} is taken for {shown(found)}")
        return found

    def _folded(self, path: PurePosixPath) -> str | None:
        """The only file of this path but for case and spelling; itself, if it is there."""
        if (self.root / path).is_file():
            return path.as_posix()
        here = [PurePosixPath()]
        for part in path.parts:
            if part == "..":
                return None
            here = [
                one / name
                for one in here
                for name in self._listing(self.root / one).get(_fold(part), [])
            ]
        files = [one.as_posix() for one in here if (self.root / one).is_file()]
        return files[0] if len(files) == 1 else None

    def _without_extension(self, path: PurePosixPath) -> str | None:
        folder = self.root / path.parent
        if ".." in path.parts or not folder.is_dir():
            return None
        found = [
            name
            for suffix in IMAGE_SUFFIXES
            for name in self._listing(folder).get(_fold(path.name + suffix), [])
        ]
        if len(found) > 1:
            raise DataError(f"may be {shorten(sorted(found))}: write which")
        return (path.parent / found[0]).as_posix() if found else None

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """Names in a folder by how they are compared; of none where it is no folder."""
        if folder not in self._listings:
            by_fold: dict[str, list[str]] = {}
            if folder.is_dir():
                listing = list_folder(folder)
                for name in (*listing.folders, *listing.files):
                    by_fold.setdefault(_fold(name), []).append(name)
            self._listings[folder] = by_fold
        return self._listings[folder]

    @cached_property
    def _below(self) -> dict[str, list[str]]:
        """Every file below the root by its name, with extension and without, as compared."""
        found: dict[str, list[str]] = {}
        count = 0
        for where, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            count += len(files)
            if count > _MOST_BELOW:  # a home folder, say: too much to look through
                return {}
            for name in files:
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    path = (Path(where) / name).relative_to(self.root).as_posix()
                    for one in (name, Path(name).stem):
                        found.setdefault(_fold(one), []).append(path)
        return found

    def _nearest(self, path: PurePosixPath) -> str:
        folder = self.root / path.parent
        if ".." not in path.parts and folder.is_dir() and path.parent.parts:
            known = [(path.parent / name).as_posix() for name in list_folder(folder).files]
        else:
            known = list({one: None for its in self._below.values() for one in its})
        if len(known) > _MOST_COMPARED:
            start = _fold(path.as_posix())[: len(path.parent.as_posix()) + 3]
            known = [name for name in known if _fold(name).startswith(start)][:_MOST_COMPARED]
        return did_you_mean(path.as_posix(), known)


def _readings(written: str) -> Iterator[PurePosixPath]:
    """What a path may mean, relative to the table: the longest first."""
    path = PurePosixPath(posixpath.normpath(written.replace("\\", "/")))
    if not _is_absolute(path.as_posix()):
        yield path
        return
    parts = path.parts[1:]
    for first in range(len(parts)):
        yield PurePosixPath(*parts[first:])
    if not parts:
        yield PurePosixPath(".")


def _is_absolute(path: str) -> bool:
    return _ABSOLUTE.match(path.replace("\\", "/")) is not None


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
