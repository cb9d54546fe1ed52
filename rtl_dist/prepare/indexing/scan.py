"""Shards, each read once from end to end: samples' places, checksums and labels, and faults."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rtl_dist.core.errors import DataError, RtlDistError, ShardError
from rtl_dist.core.files import sha256_of
from rtl_dist.core.processes import map_in_order, num_workers
from rtl_dist.core.urls import Redirects, is_url
from rtl_dist.data.format.split import INDEX_DTYPE
from rtl_dist.data.format.tar_reader import Member, walk
from rtl_dist.data.images.foreign import MAX_FILE_BYTES, suffix_of
from rtl_dist.prepare.images import checked_image
from rtl_dist.prepare.indexing.inputs import InputShard
from rtl_dist.prepare.indexing.labels import MAX_LABEL_BYTES, Label, read_label
from rtl_dist.prepare.indexing.local_copy import local_copy
from rtl_dist.prepare.indexing.samples import ChoiceNeededError, Sample, grouped, image_of, label_of

# Starting processes costs about as much as reading this many bytes of shards on one core.
_ALONE_BELOW_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What was asked for."""

    image: tuple[str, ...] = ()
    """Extensions of the image member, in the order they are looked for; none: whichever a sample
    has."""
    label: str | None = None
    """Extension of the label member; None: the first of ``LABEL_EXTENSIONS`` a sample has."""
    field: str | None = None
    """The label's field in JSON, dotted; None: the one of ``DEFAULT_FIELDS`` that is there."""


@dataclass(frozen=True, kw_only=True)
class ScanJob:
    """A shard to be read. Everything in it can be pickled."""

    location: str
    """A local path or a URL."""
    chosen: Chosen
    """Which members are image and label."""
    decode: bool
    """Whether each image is decoded; else only its first bytes are looked at."""
    folder: Path
    """Where a remote one is put meanwhile."""
    redirects: Redirects
    """Of a remote one, whether they are followed to other servers, too."""


@dataclass(kw_only=True)
class ShardScan:
    """What is in a shard. The lists from ``keys`` to ``fields`` have an entry a row."""

    location: str
    """A local path or a URL."""
    bytes: int = 0
    """The tar's size."""
    sha256: str = ""
    """Of the tar, in hexadecimal."""
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, INDEX_DTYPE))
    """``INDEX_DTYPE`` (num_samples,), with offset, size and crc32 filled in."""
    keys: list[str] = field(default_factory=list)
    """What webdataset calls each sample."""
    labels: list[Label] = field(default_factory=list)
    """What its label member says."""
    images: list[str] = field(default_factory=list)
    """The extension of its image member."""
    label_members: list[str] = field(default_factory=list)
    """The extension of its label member."""
    fields: list[str | None] = field(default_factory=list)
    """The JSON field of its label; None: no JSON, or all of it."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of what is in no row."""
    doubtful: list[tuple[str, str]] = field(default_factory=list)
    """(key, ``doubt_of``) of images that are in a row with a doubt."""
    damage: str = ""
    """Empty if the tar is whole, else a sentence."""
    choice: tuple[str, str, tuple[str, ...]] | None = None
    """(key, option, candidates) of the first sample that can be understood in several ways."""


def scan_shards(
    inputs: Sequence[InputShard],
    chosen: Chosen,
    *,
    decode: bool,
    workers: int | None,
    description: str,
    redirects: Redirects,
    show_progress: bool,
) -> list[ShardScan]:
    """Reads every shard, in processes, and says what is in it, in the order of ``inputs``.

    Args:
        decode: whether each image is decoded.
        workers: processes; None chooses.
        description: of the bar on stderr, where that is a terminal.
        redirects: of remote ones, whether they are followed to other servers, too.

    Raises:
        RtlDistError: a process was killed, or a remote place failed. UserError: a URL's scheme is
            unknown.
    """
    local = [shard.location for shard in inputs if not is_url(shard.location)]
    num_bytes = sum(os.path.getsize(location) for location in local)
    all_local = len(local) == len(inputs)
    scans: list[ShardScan] = []

    def jobs(folder: Path) -> Iterator[ScanJob]:
        for shard in inputs:
            # once there is damage nothing is published: only more of it is looked for
            sound = not any(scan.damage for scan in scans)
            yield ScanJob(
                location=shard.location,
                chosen=chosen,
                decode=decode and sound,
                folder=folder,
                redirects=redirects,
            )

    with (
        tempfile.TemporaryDirectory(prefix="rtl-dist-index-") as folder,
        tqdm(
            desc=description,
            total=num_bytes if all_local else None,
            unit="B",
            unit_scale=True,
            disable=None if show_progress else True,  # None: quiet when stderr is no terminal
        ) as bar,
    ):
        alone = all_local and num_bytes < _ALONE_BELOW_BYTES
        count = num_workers(workers, len(inputs), alone=alone)
        try:
            with closing(map_in_order(scan_shard, jobs(Path(folder)), count, bar.update)) as found:
                for scan in found:
                    scans.append(scan)
        except BrokenProcessPool as error:
            raise RtlDistError(
                "an indexing process was killed, perhaps for want of memory: start the same command"
                " again with fewer --workers"
            ) from error
    return scans


def scan_shard(job: ScanJob, advance: Callable[[int], Any]) -> ShardScan:
    """Reads a shard; ``advance(n)`` is told of n more bytes done.

    Damage does not raise: other shards may be damaged too, and are to be named with it.

    Raises:
        UserError: a URL's scheme is unknown. RemoteError: a remote place cannot be reached.
    """
    scan = ShardScan(location=job.location)
    remote = is_url(job.location)
    try:
        with (
            local_copy(job.location, job.folder, job.redirects)
            if remote
            else nullcontext(Path(job.location))
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


def _read(scan: ShardScan, path: Path, job: ScanJob, advance: Callable[[int], Any]) -> None:
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
                doubt = ""
                if job.decode:
                    doubt = checked_image(content, None).doubt
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
                if doubt:
                    scan.doubtful.append((sample.key, doubt))
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
