"""One shard, read once from end to end: its samples' places, checksums and labels, its faults."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, ShardError
from rtl_dist.core.files import sha256_of
from rtl_dist.core.urls import is_url
from rtl_dist.data.format.split import INDEX_DTYPE
from rtl_dist.data.format.tar_reader import Member, walk
from rtl_dist.data.images.foreign import suffix_of
from rtl_dist.prepare.images import MAX_FILE_BYTES, checked_image
from rtl_dist.prepare.indexing.labels import MAX_LABEL_BYTES, Label, read_label
from rtl_dist.prepare.indexing.local_copy import local_copy
from rtl_dist.prepare.indexing.samples import ChoiceNeededError, Sample, grouped, image_of, label_of


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was asked for: image extensions in the order they are looked for (none: whichever a
    sample has), the label's extension, and the field in its JSON."""

    image: tuple[str, ...] = ()
    label: str | None = None
    field: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """A shard to be read. ``folder`` is where a remote one is put meanwhile."""

    location: str
    chosen: Chosen
    decode: bool
    folder: Path


@dataclass(kw_only=True)
class ShardScan:
    """What is in a shard.

    ``rows`` has dtype ``INDEX_DTYPE`` and shape (samples,), with offset, size and crc32 filled in;
    ``keys``, ``labels``, ``images``, ``label_members`` and ``fields`` are as long and say each
    sample's key, what its label member says, both members' extensions, and the JSON field.
    ``left_out`` pairs keys with reasons. ``damage`` is empty if the tar is whole, else a sentence.
    ``choice``, if one is needed, is a key, the option and its candidates.
    """

    location: str
    bytes: int = 0
    sha256: str = ""
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, INDEX_DTYPE))
    keys: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    label_members: list[str] = field(default_factory=list)
    fields: list[str | None] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    damage: str = ""
    choice: tuple[str, str, tuple[str, ...]] | None = None


def scan_shard(job: ShardJob, advance: Callable[[int], Any]) -> ShardScan:
    """Reads a shard; ``advance(n)`` is told of n more bytes done.

    Damage does not raise: other shards may be damaged too, and are to be named with it.

    Raises:
        UserError: a URL's scheme is unknown. RemoteError: a remote place cannot be reached.
    """
    scan = ShardScan(location=job.location)
    remote = is_url(job.location)
    try:
        with (
            local_copy(job.location, job.folder) if remote else nullcontext(Path(job.location))
        ) as path:
            scan.sha256 = sha256_of(path)
            _read(scan, path, job, advance)
    except ShardError as error:  # of the remote file; its cure is for training
        scan.damage = str(error).partition("; ")[0]
    except DataError as error:
        scan.damage = f"{job.location} {error}"
    except OSError as error:
        scan.damage = f"{job.location} cannot be read: {error.strerror or error}"
    return scan


def _read(scan: ShardScan, path: Path, job: ShardJob, advance: Callable[[int], Any]) -> None:
    rows: list[tuple[int, int, int]] = []
    names: dict[Any, Any] = {}  # equal labels are one object, which keeps them small when pickled
    done = 0
    with open(path, "rb", buffering=0) as file:
        scan.bytes = os.fstat(file.fileno()).st_size
        for sample in grouped(walk(path)):
            try:
                image, label = image_of(sample, job.chosen.image), ""
                label = label_of(sample, job.chosen.label)
                content = _content(file.fileno(), sample, label, MAX_LABEL_BYTES)
                value, json_field = read_label(content, label, job.chosen.field)
                content = _content(file.fileno(), sample, image, MAX_FILE_BYTES)
                if job.decode:
                    checked_image(content, None)
                else:
                    suffix_of(content[:16])
            except ChoiceNeededError as choice:
                scan.choice = scan.choice or (sample.key, choice.option, choice.candidates)
            except DataError as error:
                scan.left_out.append((sample.key, str(error)))
            else:
                member = sample.members[image]
                rows.append((member.offset, member.size, zlib.crc32(content)))
                scan.keys.append(sample.key)
                scan.labels.append(names.setdefault((type(value), value), value))
                scan.images.append(names.setdefault(image, image))
                scan.label_members.append(names.setdefault(label, label))
                scan.fields.append(names.setdefault(json_field, json_field))
            position = _end_of(sample)
            advance(max(0, position - done))
            done = max(done, position)
    advance(scan.bytes - done)
    scan.rows = np.zeros(len(rows), INDEX_DTYPE)
    for name, column in zip(("offset", "size", "crc32"), zip(*rows, strict=True), strict=False):
        scan.rows[name] = column
    scan.left_out = _explained(scan.left_out)


def _content(descriptor: int, sample: Sample, extension: str, most: int) -> bytes:
    member: Member = sample.members[extension]
    if member.size > most:
        raise DataError(f"its .{extension} has {member.size:,} bytes; {most:,} are allowed")
    return os.pread(descriptor, member.size, member.offset)


def _end_of(sample: Sample) -> int:
    return max((member.offset + member.size for member in sample.members.values()), default=0)


def _explained(left_out: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A key in several incomplete pieces has one cause, which neither piece's reason tells."""
    pieces = Counter(key for key, reason in left_out if reason.startswith("has no "))
    apart = "its members do not stand side by side in the tar (tar --sort=name keeps them together)"
    return [
        (key, apart) if pieces[key] > 1 and reason.startswith("has no ") else (key, reason)
        for key, reason in left_out
    ]
