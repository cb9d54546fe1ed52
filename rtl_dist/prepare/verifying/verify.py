"""``rtl-dist verify DATASET``: is everything as it was packed, and what should one know of it?

The story: compare each split's index with the description, let processes hash every shard and
decode every sample, then look for equal pixels and unequal classes. Damage makes a data set
unsound; duplicates, conflicts, skew and odd sizes are findings. Near duplicates (the same
photograph scaled or compressed again) are not looked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rtl_dist.core.errors import RtlDistError, UserError
from rtl_dist.core.files import write_json
from rtl_dist.core.processes import check_workers, map_in_order, num_workers
from rtl_dist.core.regular_files import open_regular
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import shown_lines
from rtl_dist.core.urls import Redirects, is_url
from rtl_dist.data.format.dataset import Dataset, open_dataset
from rtl_dist.data.storage.shard_files import Shards
from rtl_dist.prepare.verifying.duplicates import Digests, Duplicates, find_duplicates
from rtl_dist.prepare.verifying.findings import DamageList, DoubtList
from rtl_dist.prepare.verifying.shards import CheckJob, check_shard
from rtl_dist.prepare.verifying.sizes import SizeTable
from rtl_dist.prepare.verifying.skew import measure_skew
from rtl_dist.prepare.verifying.splits import CheckedSplit, check_split
from rtl_dist.prepare.verifying.summary import summary_of
from rtl_dist.prepare.verifying.verification import Verification

REPORT = "verify.json"

# Starting processes costs about as much as checking this many bytes of shards on one core.
_ALONE_BELOW_BYTES = 64 << 20


def verify_and_report(
    path: str,
    *,
    out: Path | None = None,
    workers: int | None = None,
    strict: bool = False,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    redirects: Redirects = "origin",
    show: Callable[[str], Any],
) -> str:
    """The command: checks, shows the summary, writes the report, and only then complains.

    Returns:
        The last line.

    Raises:
        DataError: the data set is damaged or, if strict, has duplicates across splits or label
            conflicts. And as ``verify``.
        UserError: the report cannot be written.
    """
    started_at = time.monotonic()
    out = _report_path(path, out)  # before hours are spent
    found = verify(
        path, workers=workers, cache_dir=cache_dir, cache_gb=cache_gb, redirects=redirects
    )
    show(f"{shown_lines(summary_of(found))}\n\n")
    try:
        write_json(out, found.to_json())
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror}; name another file, --out FILE"
        ) from error
    found.require_sound(strict=strict)
    samples = sum(split.num_rows for split in found.splits.values())
    shards = sum(len(split.split.shards) for split in found.splits.values())
    untrainable = f"; it cannot be trained on: {why}" if (why := found.untrainable) else ""
    return (
        f"{path} is sound: {samples:,} samples in {shards:,} shards, checked in"
        f" {time.monotonic() - started_at:.0f} s; all findings are in {out}{untrainable}"
    )


def verify(
    path: str,
    *,
    workers: int | None = None,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    redirects: Redirects = "origin",
    show_progress: bool = True,
) -> Verification:
    """Checks a data set, going on after whatever is wrong with it. Changes nothing.

    Args:
        workers: processes; None takes this process's CPUs, or one where starting more costs more.
            Their number changes nothing in the result.
        cache_dir, cache_gb, redirects: of remote data; see ``Cache``.
        show_progress: a bar on stderr, where that is a terminal.

    Raises:
        UserError: an argument is wrong.
        DataError: there is no data set, or its description cannot be read.
        RtlDistError: a worker was killed.
    """
    check_workers(workers)
    dataset = open_dataset(path, cache_dir=cache_dir, cache_gb=cache_gb, redirects=redirects)
    damage = DamageList()
    splits = {name: check_split(dataset, name, damage) for name in dataset.split_names}
    num_samples = {name: split.num_rows for name, split in splits.items()}
    sizes = {name: SizeTable() for name in splits}
    doubts = {name: DoubtList() for name in splits}
    digests = Digests(num_samples)
    shard_bytes = [shard.bytes for split in splits.values() for shard in split.split.shards]
    alone = sum(shard_bytes) < _ALONE_BELOW_BYTES
    with tqdm(
        desc=f"verifying {Path(path).name}",
        total=sum(num_samples.values()),
        unit="image",
        disable=None if show_progress else True,  # None: quiet when stderr is no terminal
    ) as bar:
        jobs = _jobs(dataset, splits.values())
        number = num_workers(workers, len(shard_bytes), alone=alone)
        try:
            with closing(map_in_order(check_shard, jobs, number, bar.update)) as results:
                for result in results:
                    damage.add(result.damage)
                    sizes[result.split].add(result.samples, result.sizes)
                    doubts[result.split].add(result.doubts)
                    digests.put(result.split, result.samples, result.digests)
        except BrokenProcessPool as error:
            raise RtlDistError(
                "a verifying process was killed, perhaps for want of memory: start the same command"
                " again with fewer --workers"
            ) from error
    return Verification(
        dataset=dataset,
        splits=splits,
        damage=damage,
        sizes=sizes,
        doubts=doubts,
        duplicates=_find_duplicates(digests, splits),
        skew=measure_skew(
            {name: split.class_counts() for name, split in splits.items()},
            num_samples,
            multi_label=dataset.task == MULTI_LABEL,
        ),
    )


def _report_path(dataset: str, out: Path | None) -> Path:
    if out is None and is_url(dataset):
        raise UserError(f"nothing can be written into {dataset}: name a report, --out FILE")
    path = Path(dataset) / REPORT if out is None else out
    folder = path.absolute().parent
    if path.is_dir() or (folder.exists() and not os.access(folder, os.W_OK)):
        raise UserError(f"cannot write {path}: name another file, --out FILE")
    if os.path.lexists(path) and not _is_report(path):
        raise UserError(
            f"{path} is no report of verify, so it is not replaced: name another, --out"
        )
    return path


def _is_report(path: Path) -> bool:
    """By how ``Verification.to_json`` begins, so that no large file of another kind is read."""
    beginning = b'{\n  "dataset":'
    try:
        with open_regular(path) as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def _jobs(dataset: Dataset, splits: Iterable[CheckedSplit]) -> Iterator[CheckJob]:
    """A job a shard, made when it is its turn."""
    for checked in splits:
        split = checked.split
        entries = dataset.description["splits"][split.name]["shards"]
        for number, samples in enumerate(checked.samples_by_shard()):
            entry = Shards(entries[number : number + 1])
            yield CheckJob(
                split=split.name,
                shard=entry[0],
                files=dataset.shard_files(entry),
                samples=samples,
                rows=np.asarray(split.index[samples]),
                labels=checked.labels(samples),
                classes=dataset.classes,
                check_members=split.are_ours,
            )


def _find_duplicates(digests: Digests, splits: dict[str, CheckedSplit]) -> Duplicates:
    usable = all(split.has_labels for split in splits.values())

    def labels_of(split: str, samples: np.ndarray) -> np.ndarray:
        # without labels nothing can contradict; that they cannot be used was told already
        return splits[split].labels(samples) if usable else np.zeros(len(samples))

    return find_duplicates(digests, labels_of)
