"""What was typed to the shards it means, each in a split: files, folders, patterns, URLs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.text import shorten, shown
from rtl_dist.core.urls import is_url, secret_in
from rtl_dist.prepare.patterns import without_braces
from rtl_dist.prepare.splits import SPLIT_ORDER, TRAIN, split_named, splits_in

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_ASSIGNED = re.compile(r"([A-Za-z]+)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class InputShard:
    """One tar that was named."""

    location: str
    """A local path or a URL."""
    split: str
    """``train``, ``val`` or ``test``."""


def find_shards(inputs: Sequence[str]) -> list[InputShard]:
    """The shards in the order they were given, a folder's sorted by path.

    Args:
        inputs: files, folders, brace or ``*`` patterns, URLs; each may be ``SPLIT=`` one of these.

    Raises:
        UserError: an input is refused or missing, or means no shard, or the same one twice.
        DataError: files are compressed.
    """
    shards = [shard for text in inputs for shard in _shards_of(text)]
    missing = [s.location for s in shards if not is_url(s.location) and not _is_file(s.location)]
    if missing:
        raise UserError(f"no such shard: {shorten(missing)}; correct the path or the pattern")
    compressed = [s.location for s in shards if s.location.lower().endswith(_COMPRESSED)]
    if compressed:
        raise DataError(
            f"compressed tars cannot be indexed: {shorten(compressed)}; decompress them, or train"
            " on them with data.backend=stream data.stream_urls=PATTERN"
        )
    seen: dict[str, str] = {}
    for shard in shards:
        same = shard.location if is_url(shard.location) else os.path.realpath(shard.location)
        if same in seen:
            also = f", as {seen[same]} and as {shard.split}" if seen[same] != shard.split else ""
            raise UserError(f"{shard.location} is given twice{also}: name each shard once")
        seen[same] = shard.split
    return shards


def splits_of(shards: Sequence[InputShard]) -> tuple[str, ...]:
    """The splits that have shards, as train, val, test."""
    present = {shard.split for shard in shards}
    return tuple(split for split in SPLIT_ORDER if split in present)


def _shards_of(text: str) -> list[InputShard]:
    split, pattern = None, text
    assigned = _ASSIGNED.fullmatch(text)
    if assigned and not Path(text).exists():
        split, pattern = split_named(assigned[1]), assigned[2]
        if split is None:
            raise UserError(
                f"{text}: {assigned[1]!r} is no split; there are: {', '.join(SPLIT_ORDER)}"
            )
    if pattern.startswith("pipe:"):
        raise UserError(
            f"{text}: commands are never run; give a path or a URL, or train on it with"
            " data.backend=stream data.stream_urls=PATTERN"
        )
    found = []
    for location in _expanded(pattern):
        folder = Path(location)
        if is_url(location) or not folder.is_dir():
            name = PurePosixPath(*PurePosixPath(location.split("?")[0]).parts[-2:])
            found.append(InputShard(location, split or _split_of(name, text)))
            continue
        tars = sorted(_tars_below(folder))
        if not tars:
            raise UserError(f"{folder} holds no .tar file: name the shards, or a folder of them")
        found += [
            InputShard(str(folder / name), split or _split_of(PurePosixPath(name), text))
            for name in tars
        ]
    return found


def _expanded(pattern: str) -> list[str]:
    names = without_braces(pattern, what="shards")
    found = []
    for name in names:
        if name.startswith(("file://", "local://")):
            name = name.split("://", 1)[1]
        if is_url(name):
            _check_url(name)
        elif "*" in name and not Path(name).exists():
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                raise UserError(f"{name} fits no file: correct the pattern")
            found += matches
            continue
        found.append(name)
    return found


def _check_url(url: str) -> None:
    if url.endswith("/"):
        raise UserError(f"{url} is a folder: name its shards, as in {url}train-{{000..099}}.tar")
    if "*" in url:
        raise UserError(f"{url}: behind a URL, name shards by braces, as in train-{{000..099}}.tar")
    if reason := secret_in(url):
        raise UserError(reason)


def _tars_below(folder: Path) -> Iterator[str]:
    """Paths relative to the folder, compressed ones included: those must not be passed over."""
    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # links can lead in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith((".tar", *_COMPRESSED)) and not name.startswith("."):
                yield (Path(where) / name).relative_to(folder).as_posix()


def _split_of(path: PurePosixPath, text: str) -> str:
    """By a word of the file's name, else by the nearest folder that is called like a split."""
    named = splits_in(path.name)
    if len(named) == 1:
        return named.pop()
    for folder in reversed(path.parent.parts):
        if split := split_named(folder):
            return split
    if named:
        raise UserError(
            f"{shown(str(path))} is named after two splits, {' and '.join(sorted(named))}: say"
            f" which, as in train={text}"
        )
    return TRAIN


def _is_file(location: str) -> bool:
    return Path(location).is_file()
