"""Writing one shard, and the processes that write many at once."""

from __future__ import annotations

import contextlib
import functools
import json
import zlib
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, RtlDistError
from rtl_dist.core.processes import map_in_order, num_workers
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.data.format.tar import TarWriter
from rtl_dist.prepare.image_file import read_image_file
from rtl_dist.prepare.images import checked_image
from rtl_dist.prepare.packing.plan import Plan, ShardPlan, key_of
from rtl_dist.prepare.packing.resume import ShardRecord, is_finished, record_shard
from rtl_dist.prepare.sources.items import Item
from rtl_dist.prepare.work_folder import publishing

# Starting processes costs about as much as packing this many bytes of images on one core.
_ALONE_BELOW_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class PackContext:
    """What a worker needs to know besides the shard. Everything in it can be pickled."""

    out: Path
    """The data set's folder."""
    root: Path
    """What the items' names are relative to, absolute."""
    task: str
    """``single_label`` or ``multi_label``."""
    classes: tuple[str, ...]
    """Their names, in the order of their numbers."""
    resize: int | None
    """Pixels: see ``PackOptions``."""
    convert: bool
    """As ``PackOptions`` has it."""


def write_shards(plan: Plan, out: Path, workers: int | None, advance: Callable[[int], Any]) -> int:
    """Writes every shard that is not there yet; ``advance(n)`` is told of n more items done.

    Args:
        workers: processes; None chooses.

    Returns:
        How many shards were kept from an earlier start.

    Raises:
        RtlDistError: a worker was killed or the disk is full. What is finished stays.
    """
    source = plan.source
    context = PackContext(
        out=out,
        root=source.root.absolute(),
        task=source.task,
        classes=source.classes,
        resize=plan.options.resize,
        convert=plan.options.convert,
    )
    work = functools.partial(write_shard, context)
    count = num_workers(workers, len(plan.shards), alone=plan.source_bytes < _ALONE_BELOW_BYTES)
    try:
        with contextlib.closing(map_in_order(work, plan.shards, count, advance)) as kept:
            return sum(kept)
    except BrokenProcessPool as error:
        raise RtlDistError(
            "a packing process was killed, perhaps for want of memory: start the same command again"
            " with fewer --workers; finished shards are kept"
        ) from error
    except OSError as error:
        raise RtlDistError(
            f"cannot write into {out}: {error.strerror or error}; make room and start the same"
            " command again, finished shards are kept"
        ) from error


def write_shard(context: PackContext, shard: ShardPlan, advance: Callable[[int], Any]) -> bool:
    """Writes one shard and its sidecar, a sample in memory at a time.

    Returns:
        True if the shard was there already, whole.
    """
    if is_finished(context.out, shard.path):
        advance(len(shard.items))
        return True
    rows: list[tuple[int, int, int, int]] = []
    left_out: list[tuple[str, str]] = []
    doubtful: list[tuple[str, str]] = []
    with publishing(context.out, context.out / shard.path) as file:
        tar = TarWriter(file)
        for position, item in enumerate(shard.items):
            try:
                image = checked_image(_read(item, context), context.resize)
            except DataError as error:
                left_out.append((item.name, str(error)))
            else:
                key = key_of(shard.first + position, item.name)
                offset = tar.add(f"{key}.{image.suffix}", image.content)
                tar.add(*_label_member(key, item, context))
                rows.append((position, offset, len(image.content), zlib.crc32(image.content)))
                if image.doubt:
                    doubtful.append((item.name, image.doubt))
            advance(1)
        tar.finish()
        record = ShardRecord(
            path=shard.path,
            bytes=tar.num_bytes,
            sha256=tar.sha256,
            rows=rows,
            left_out=left_out,
            doubtful=doubtful,
        )
        # Before the shard gets its name: then a shard without a sidecar cannot be. A sidecar
        # without its shard means nothing.
        record_shard(context.out, record)
    return False


def _read(item: Item, context: PackContext) -> bytes | np.ndarray:
    """The item's content. Raises DataError: unreadable, or not worth reading whole."""
    if item.content is not None:
        return item.content
    return read_image_file(context.root / item.name, convert=context.convert)


def _label_member(key: str, item: Item, context: PackContext) -> tuple[str, bytes]:
    if context.task != MULTI_LABEL:
        return f"{key}.cls", str(item.labels[0]).encode()
    labels = {"labels": [context.classes[label] for label in item.labels]}
    return f"{key}.json", json.dumps(labels, ensure_ascii=False).encode()
