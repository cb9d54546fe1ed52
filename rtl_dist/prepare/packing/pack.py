"""``rtl-dist pack SOURCE OUT``: images to shuffled, indexed, reproducible WebDataset shards.

The story: list the source, plan every shard, write the shards (in processes, resumable), then
publish the index and, last of all, ``dataset.json``. The same source gives the same bytes, wherever
it lies, whenever and with however many workers it is packed.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.processes import check_workers
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.core.text import command, shorten, shown
from rtl_dist.data.format.trainable import why_untrainable
from rtl_dist.prepare.class_names import class_line
from rtl_dist.prepare.conversion import cure_of
from rtl_dist.prepare.holdout import check_large_enough
from rtl_dist.prepare.packing.plan import PackOptions, Plan, make_plan
from rtl_dist.prepare.packing.publish import PackedSplit, gather_split, publish
from rtl_dist.prepare.packing.resume import check_unfinished, claim, release
from rtl_dist.prepare.publish import doubt_lines, left_out_lines
from rtl_dist.prepare.sources import LeftOut, is_path, open_source
from rtl_dist.prepare.splits import TRAIN, VAL, check_classes_in_splits
from rtl_dist.prepare.work_folder import locked


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What was packed."""

    out: Path
    """The data set's folder."""
    task: str
    """``single_label`` or ``multi_label``."""
    classes: tuple[str, ...]
    """Their names, in the order of their numbers."""
    num_samples: dict[str, int]
    """By split."""
    class_counts: dict[str, tuple[int, ...]]
    """Samples of each class, by split."""
    left_out: tuple[LeftOut, ...]
    """Images that are not in it, sorted by name."""
    doubtful: tuple[str, ...]
    """Images that may not be decoded to what they show, each with the reason."""
    notes: tuple[str, ...]
    """What was guessed or passed over: a line each."""
    fingerprint: str
    """Of ``dataset.json``: a sha256 in hexadecimal."""
    shards_kept: int
    """Shards that an earlier, interrupted start of the same pack had finished."""
    seconds: float
    """How long it took, this start alone."""

    @property
    def resumed(self) -> bool:
        return self.shards_kept > 0

    @property
    def remarks(self) -> list[str]:
        """What is to be known of it: guesses, what was left out, the classes. A line each."""
        left_out = [f"{file.name} ({file.reason})" for file in self.left_out]
        lines = [*self.notes, *left_out_lines(left_out, self.out)]
        lines += doubt_lines(self.doubtful, self.out)
        if cure := cure_of(file.reason for file in self.left_out):
            lines.append(cure)
        lines.append(class_line(self.classes, self.class_counts))
        return list(map(shown, lines))

    @property
    def untrainable(self) -> str:
        """Why ``train`` would refuse it; empty where it would not."""
        counts = self.class_counts.get(TRAIN)
        return "" if counts is None else why_untrainable(self.task, self.classes, TRAIN, counts)

    def __str__(self) -> str:
        """What the command says: the remarks, what was packed, and what to type next."""
        counts = ", ".join(f"{name} {count:,}" for name, count in self.num_samples.items())
        lines = self.remarks
        kept = f" ({self.shards_kept} shards were already there)" if self.resumed else ""
        places = f"data.path={self.out}", f"run.dir=runs/{self.out.resolve().name}"
        following = command("train", "--config", "configs/transfer.yaml", *places)
        if TRAIN not in self.num_samples:
            following = "pack it with train images, to train on it"
        elif self.untrainable:
            following = f"add images, for it cannot be trained on: {self.untrainable}"
        elif VAL not in self.num_samples:
            following = (
                "the same command with --val-fraction 0.2 --overwrite: training needs a val split"
            )
        lines.append(
            f"packed {len(self.classes):,} classes, {counts} images into {self.out} in"
            f" {self.seconds:.0f} s{kept}; next: {following}"
        )
        return "\n".join(map(shown, lines))


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    val_fraction: float = 0.0,
    shard_size: int = 1000,
    resize: int | None = None,
    workers: int | None = None,
    labels: Sequence[str] | None = None,
    file_column: str | None = None,
    convert: bool = False,
    allow_missing_classes: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> PackReport:
    """Packs SOURCE into the data set OUT, taking up what an interrupted start of it has finished.

    Args:
        source: a folder, a .csv file, ``digits`` or ``torchvision:NAME``.
        val_fraction: the part of train, of each class alike, that becomes val.
        shard_size: samples a shard.
        resize: images whose short side has more pixels are shrunk to it; None: files unchanged.
        workers: processes; None takes this process's CPUs, or one where starting more costs more.
        labels: a CSV's label columns, or the classes to keep, in that order.
        file_column: a CSV's column of the images' paths; None: ``file``, or it is found.
        convert: make PNGs and JPEGs of images of other formats, instead of leaving them out.
        allow_missing_classes: accept what cannot be trained on: classes without a sample in some
            split, or one class only.
        overwrite: replace a finished data set that ``pack`` wrote in OUT.
        show_progress: a bar on stderr, where that is a terminal.

    Raises:
        UserError: an argument is wrong, or OUT holds something else.
        DataError: the source cannot be understood, or none of its images can be packed.
        RtlDistError: a worker was killed or the disk is full; the same call goes on from there.
    """
    from rtl_dist.prepare.packing.shard import write_shards  # its decoder needs torch

    started_at = time.monotonic()
    source, out = os.fspath(source), Path(out)
    check_workers(workers)
    options = PackOptions(
        val_fraction=val_fraction,
        shard_size=shard_size,
        resize=resize,
        labels=None if labels is None else tuple(labels),
        convert=convert,
    )
    _check_apart(source, out)
    if not overwrite:
        check_unfinished(out)  # before anything is downloaded or listed
    plan = make_plan(open_source(source, options.labels, file_column, convert), options)
    if not allow_missing_classes:
        _check_classes(plan)
    with locked(out):
        claim(out, plan.digest, plan.files, overwrite)
        with tqdm(
            desc=f"packing {out.name}",
            total=sum(len(shard.items) for shard in plan.shards),
            unit="image",
            disable=None if show_progress else True,  # None: quiet when stderr is no terminal
        ) as bar:
            kept = write_shards(plan, out, workers, bar.update)
        splits = {split: gather_split(plan, out, split) for split in plan.source.splits}
        bad = [file for split in splits.values() for file in split.left_out]
        left_out = sorted([*plan.source.left_out, *bad])
        if not allow_missing_classes:
            _check_packed_classes(plan, splits)
        fingerprint = publish(plan, out, splits, left_out)
        release(out)
    entries = {name: split.indexed.entry for name, split in splits.items()}
    return PackReport(
        out=out,
        task=plan.source.task,
        classes=plan.source.classes,
        num_samples={name: entry["num_samples"] for name, entry in entries.items()},
        class_counts={name: tuple(entry["class_counts"]) for name, entry in entries.items()},
        left_out=tuple(left_out),
        doubtful=tuple(sorted(one for split in splits.values() for one in split.doubtful)),
        notes=tuple(plan.source.notes),
        fingerprint=fingerprint,
        shards_kept=kept,
        seconds=time.monotonic() - started_at,
    )


def _check_apart(source: str, out: Path) -> None:
    """OUT must not be in a source folder, where the next start would take it for images."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: OUT must be a folder")
    if is_path(source) and Path(source).is_dir():
        inside = Path(source).resolve()
        if inside == out.resolve() or inside in out.resolve().parents:
            raise UserError(f"{out} lies in the source {source}: choose an OUT outside of it")


def _check_classes(plan: Plan) -> None:
    source = plan.source
    if source.task == SINGLE_LABEL and len(source.classes) == 1:
        cure = source.if_one or "name another with --labels, or add images of a second class"
        raise DataError(
            f"{shown(str(source.root))} gives one class only, {source.classes[0]!r}, and there is"
            f" nothing to tell it from: {cure}"
        )
    counts = {split: Counter[int]() for split in plan.source.splits}
    for item in plan.source.items:
        counts[item.split].update(item.labels)
    if plan.options.val_fraction and plan.source.task == SINGLE_LABEL:
        check_large_enough(plan.source.classes, [counts[TRAIN], counts.get(VAL, Counter())])
    check_classes_in_splits(plan.source.classes, counts)


def _check_packed_classes(plan: Plan, splits: dict[str, PackedSplit]) -> None:
    counts = {
        name: Counter(dict(enumerate(split.indexed.entry["class_counts"])))
        for name, split in splits.items()
    }
    bad = [f"{file.name} ({file.reason})" for split in splits.values() for file in split.left_out]
    check_classes_in_splits(
        plan.source.classes, counts, f" that can be packed; left out: {shorten(bad)}"
    )
