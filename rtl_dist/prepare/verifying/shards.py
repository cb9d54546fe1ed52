"""One shard: its hash, and every sample that the index says is in it."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtl_dist.core.errors import DataError
from rtl_dist.core.files import is_no_file, sha256_of
from rtl_dist.data.format.tar import BLOCK
from rtl_dist.data.images.decode import decode_file
from rtl_dist.data.images.doubts import doubt_of
from rtl_dist.data.images.foreign import MAX_FILE_BYTES
from rtl_dist.data.storage.shard_files import Shard, ShardFiles
from rtl_dist.prepare.verifying.findings import Damage

_MOST_LABEL_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class CheckJob:
    """A shard and the index rows that point into it. Everything in it can be pickled."""

    split: str
    """The split it is of."""
    shard: Shard
    """What the description says of it."""
    files: ShardFiles
    """Of this shard alone: its number 0."""
    samples: np.ndarray
    """int64 (n,): numbers within the split."""
    rows: np.ndarray
    """``INDEX_DTYPE`` (n,): where these samples are said to be."""
    labels: np.ndarray
    """(n,) or (n, classes): as ``CheckedSplit.labels``."""
    classes: tuple[str, ...]
    """Their names, in the order of their numbers."""
    check_members: bool
    """Whether a label member must follow each image, as ``rtl-dist pack`` writes it."""


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """What was found in a shard."""

    split: str
    """The split it is of."""
    samples: np.ndarray
    """int64 (n,): numbers within the split."""
    digests: np.ndarray
    """uint64 (n, 2): 128 bits of each sample's pixels; 0 where it could not be decoded."""
    sizes: np.ndarray
    """uint32 (n, 2): width and height in pixels; 0 where it could not be decoded."""
    damage: list[Damage]
    """What is wrong with it."""
    doubts: list[tuple[int, str]]
    """(number within the split, ``doubt_of``) of samples that may not be what they show."""


def check_shard(job: CheckJob, advance: Callable[[int], Any]) -> ShardResult:
    """Hashes a shard, then reads, checks and decodes each of its samples."""
    torch.set_num_threads(1)  # the processes are the parallelism
    count = len(job.samples)
    digests = np.zeros((count, 2), np.uint64)
    sizes = np.zeros((count, 2), np.uint32)
    damage: list[Damage] = []
    doubts: list[tuple[int, str]] = []
    done = 0
    try:
        path = job.files.sound_path(0)
        if is_no_file(path):
            raise DataError("is not a plain file")
        with open(path, "rb", buffering=0) as file:
            damage += _check_file(job, path, os.fstat(file.fileno()).st_size)
            for i in range(count):
                damage += (
                    _of_sample(job, i, kind, what)
                    for kind, what in _check_sample(job, i, file.fileno(), digests, sizes, doubts)
                )
                advance(1)
                done += 1
    except (OSError, DataError) as error:
        advance(count - done)
        why = error.strerror if isinstance(error, OSError) else str(error)
        damage.append(
            Damage(
                kind="missing_shard",
                split=job.split,
                where=job.shard.path,
                what=f"{why}; {count - done} samples are lost",
            )
        )
    return ShardResult(
        split=job.split,
        samples=job.samples,
        digests=digests,
        sizes=sizes,
        damage=damage,
        doubts=doubts,
    )


def digest_of(pixels: torch.Tensor) -> bytes:
    """128 bits of a decoded image: equal for equal sizes and pixels, however they were stored."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    digest.update(array.data)
    return digest.digest()


def _check_file(job: CheckJob, path: Path, size: int) -> Iterator[Damage]:
    def damage(kind: str, what: str) -> Damage:
        return Damage(kind=kind, split=job.split, where=job.shard.path, what=what)

    if size != job.shard.bytes:
        how = "cut to" if size < job.shard.bytes else "grown to"
        yield damage("shard_size", f"{how} {size} bytes where {job.shard.bytes} were packed")
    elif not job.files.is_remote(0) and sha256_of(path) != job.shard.sha256:
        yield damage("shard_sha256", "its sha256 is not that of dataset.json")
    _, first, repeats = np.unique(job.rows["offset"], return_index=True, return_counts=True)
    for i in first[repeats > 1]:
        yield _of_sample(job, int(i), "index_row", "points at the same bytes as another row")


def _check_sample(
    job: CheckJob,
    i: int,
    file: int,
    digests: np.ndarray,
    sizes: np.ndarray,
    doubts: list[tuple[int, str]],
) -> Iterator[tuple[str, str]]:
    """What is wrong with the i-th sample, as (kind, what); fills in its digest, size and doubt."""
    yield from _check_label(job, i)
    offset, size = int(job.rows["offset"][i]), int(job.rows["size"][i])
    if offset < BLOCK or offset + size > job.shard.bytes:
        yield "index_row", f"{size} bytes from {offset} are not in a shard of {job.shard.bytes}"
        return
    if size > MAX_FILE_BYTES:
        yield "undecodable", f"is larger than the {MAX_FILE_BYTES >> 20} MiB allowed"
        return
    content = os.pread(file, size, offset)
    if len(content) != size:
        yield "cut_short", "the shard ends before it does"
        return
    if zlib.crc32(content) != job.rows["crc32"][i]:
        yield "crc32", "its bytes fail their checksum"
        return
    if job.check_members:
        yield from _check_member(job, i, file, offset, size)
    try:
        image = decode_file(content, 3)
    except DataError as error:
        yield "undecodable", str(error)
        return
    digests[i] = np.frombuffer(digest_of(image.pixels), np.uint64)
    sizes[i] = image.pixels.shape[2], image.pixels.shape[1]
    if doubt := doubt_of(image):
        doubts.append((int(job.samples[i]), doubt))


def _check_label(job: CheckJob, i: int) -> Iterator[tuple[str, str]]:
    label = job.labels[i]
    if label.ndim:
        if label.size and label.max() > 1:
            yield "label_range", f"a label is {label.max()}, neither 0 nor 1"
    elif not 0 <= label < len(job.classes):
        yield "label_range", f"has class {label}, but there are {len(job.classes)}"


def _check_member(
    job: CheckJob, i: int, file: int, offset: int, size: int
) -> Iterator[tuple[str, str]]:
    """Compares a row with the tar's headers around the image and the label member behind it."""
    behind = offset + size + -size % BLOCK
    try:
        image = _header(file, offset - BLOCK)
        member = _header(file, behind)
        content = os.pread(file, min(member.size, _MOST_LABEL_BYTES), behind + BLOCK)
        told = _labels_in(member.name, content)
    except (tarfile.HeaderError, ValueError, KeyError, TypeError):
        yield "label_member", "the shard holds no label where it should be"
        return
    key, _, _ = image.name.rpartition(".")
    if image.size != size or member.name.rpartition(".")[0] != key:
        yield "index_row", f"is not what the shard calls {image.name}"
        return
    label = job.labels[i]
    if label.ndim and not label.size:
        return  # the label file cannot be used, which was told already
    known: set[int | str] = (
        {job.classes[n] for n in np.flatnonzero(label)} if label.ndim else {int(label)}
    )
    if told != known:
        yield "label_member", f"{_listed(known)} in the index, {_listed(told)} in the shard"


def _header(file: int, offset: int) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(os.pread(file, BLOCK, offset), "utf-8", "surrogateescape")


def _labels_in(name: str, content: bytes) -> set[int | str]:
    """What a label member says: a class number, or label names."""
    if name.endswith(".cls"):
        return {int(content)}
    if name.endswith(".json"):
        return set(json.loads(content)["labels"])
    raise ValueError(f"{name} is no label member")


def _listed(labels: set[int | str]) -> str:
    return ", ".join(sorted(map(str, labels))) or "no label"


def _of_sample(job: CheckJob, i: int, kind: str, what: str) -> Damage:
    return Damage(
        kind=kind,
        split=job.split,
        where=job.shard.path,
        what=what,
        sample=int(job.samples[i]),
    )
