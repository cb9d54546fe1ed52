"""``rtl-dist index SHARDS... OUT``: WebDataset tars made by anyone become a data set, uncopied.

The story: find the shards and their splits, read each once (in processes), refuse what is damaged
or ambiguous, number the classes, then publish the same index and ``dataset.json`` as ``pack``. The
same shards give the same bytes, with however many workers they are read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtl_dist.core.errors import DataError, RtlDistError, UserError
from rtl_dist.core.processes import check_workers
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.core.text import command, shown
from rtl_dist.core.urls import Redirects
from rtl_dist.data.format.trainable import why_untrainable
from rtl_dist.prepare.class_names import are_numbers, class_line
from rtl_dist.prepare.holdout import check_large_enough, check_val_fraction
from rtl_dist.prepare.indexing.classes import read_classes
from rtl_dist.prepare.indexing.inputs import find_shards, splits_of
from rtl_dist.prepare.indexing.labels import PICKLED
from rtl_dist.prepare.indexing.merge import (
    Labelling,
    LeftOutSample,
    check_scans,
    check_something_left,
    label_samples,
    left_out_samples,
    settle_label_member,
    split_samples,
)
from rtl_dist.prepare.indexing.publish import check_place, describe_splits, publish
from rtl_dist.prepare.indexing.samples import IMAGE_KINDS
from rtl_dist.prepare.indexing.scan import Chosen, scan_shards
from rtl_dist.prepare.publish import doubt_lines, left_out_lines
from rtl_dist.prepare.splits import SPLIT_ORDER, TRAIN, VAL, check_classes_in_splits

_MOST_NAMED = 20  # classes in a command to be typed


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What was indexed."""

    out: Path
    """The folder of the description and the index."""
    task: str
    """``single_label`` or ``multi_label``."""
    classes: tuple[str, ...]
    """Their names, in the order of their numbers."""
    num_shards: int
    """Of all splits."""
    num_samples: dict[str, int]
    """By split."""
    class_counts: dict[str, tuple[int, ...]]
    """Samples of each class, by split."""
    left_out: tuple[LeftOutSample, ...]
    """By split, in the order of the shards."""
    doubtful: tuple[str, ...]
    """Images that may not be decoded to what they show, each with the reason."""
    notes: tuple[str, ...]
    """What was guessed: a line each."""
    fingerprint: str
    """Of ``dataset.json``: a sha256 in hexadecimal."""
    seconds: float
    """How long it took."""

    def __str__(self) -> str:
        """What the command says: what was indexed, what was left out, and what to type next."""
        left_out = [f"{one.key} in {one.shard} ({one.reason})" for one in self.left_out]
        lines = left_out_lines(left_out, self.out) + doubt_lines(self.doubtful, self.out)
        if len(self.left_out) > sum(self.num_samples.values()):
            lines.append("MOST SAMPLES WERE LEFT OUT: look at the reasons above")
        lines += self.notes
        lines.append(class_line(self.classes, self.class_counts))
        if are_numbers(self.classes):
            lines.append("classes are numbers here: --classes A,B,... names them")
        places = f"data.path={self.out}", f"run.dir=runs/{self.out.resolve().name}"
        following = command("train", "--config", "configs/transfer.yaml", *places)
        if TRAIN not in self.num_samples:
            following = "index it with train shards, train=... val=..., to train on it"
        elif why := why_untrainable(self.task, self.classes, TRAIN, self.class_counts[TRAIN]):
            following = f"add samples, for it cannot be trained on: {why}"
        elif VAL not in self.num_samples:
            following = (
                "the same command with --val-fraction 0.2 --overwrite: training needs a val split"
            )
        counts = ", ".join(f"{name} {count:,}" for name, count in self.num_samples.items())
        without = f" ({len(self.left_out):,} left out)" if self.left_out else ""
        lines.append(
            f"indexed {len(self.classes):,} classes, {counts} images{without} of"
            f" {self.num_shards:,} shards into {self.out} in {self.seconds:.0f} s; next:"
            f" {following}"
        )
        return "\n".join(map(shown, lines))


def index(
    shards: Sequence[str],
    out: Path,
    *,
    image: str | None = None,
    label: str | None = None,
    field: str | None = None,
    classes: str | None = None,
    val_fraction: float = 0.0,
    workers: int | None = None,
    allow_missing_classes: bool = False,
    skip_decode: bool = False,
    overwrite: bool = False,
    redirects: Redirects = "origin",
    show_progress: bool = True,
) -> IndexReport:
    """Describes WebDataset shards where they are, as a data set in OUT.

    Args:
        shards: files, folders, brace patterns and URLs, each with ``SPLIT=`` before it or not.
        image: extensions of the image member, in the order they are looked for, as ``jpg,png``;
            None: the only image of each sample.
        label: extension of the label member; None: the one of cls, json, txt
            and label that most samples have.
        field: the label's field in JSON, dotted; None: the one of the usual names that is there.
        classes: names with commas or a file of one a line: the classes' order, or the numbers'
            names.
        val_fraction: the part of train, of each class alike, that becomes val.
        workers: processes; None takes this process's CPUs, or one where starting more costs more.
        allow_missing_classes: accept what cannot be trained on: classes without a sample in some
            split, or one class only.
        skip_decode: take it on trust that every image can be decoded.
        overwrite: replace a data set's description and index in OUT. Shards are never touched.
        redirects: of URLs, whether they are followed to other servers, too.
        show_progress: a bar on stderr, where that is a terminal.

    Raises:
        UserError: an argument is wrong, a choice is needed, or OUT holds something else.
        DataError: shards are missing or damaged (all are named), or nothing in them can be used.
        RtlDistError: a worker was killed, or a remote place or the disk failed.
    """
    started_at = time.monotonic()
    out = Path(out)
    chosen = _chosen(image, label, field)
    check_val_fraction(val_fraction)
    check_workers(workers)
    names = None if classes is None else read_classes(classes)
    check_place(out, overwrite)  # before anything is read
    inputs = find_shards(shards)
    splits = splits_of(inputs)
    _check_val(val_fraction, splits)

    scans = scan_shards(
        inputs,
        chosen,
        decode=not skip_decode,
        workers=workers,
        description=f"indexing {out.name}",
        redirects=redirects,
        show_progress=show_progress,
    )
    check_scans(scans)
    settle_label_member(scans, chosen)
    check_something_left(inputs, scans, splits)
    found = label_samples(scans, names)
    sample_splits = split_samples(inputs, scans, found.labels, found.task, val_fraction)
    by_split = left_out_samples(inputs, scans)
    left_out = [one for split in splits for one in by_split[split]]
    if not allow_missing_classes:
        _check_classes(found, sample_splits, left_out, held_out=val_fraction > 0)
    num_left_out = {split: len(its) for split, its in by_split.items()}
    described = describe_splits(out, inputs, scans, found, sample_splits, num_left_out)
    settings = {"val_fraction": val_fraction, "decoded": not skip_decode}
    try:
        fingerprint = publish(out, found, settings, described, left_out, overwrite)
    except OSError as error:
        raise RtlDistError(
            f"cannot write into {out}: {error.strerror or error}; make room and start the same"
            " command again"
        ) from error
    entries = {name: split.entry for name, split in described.items()}
    return IndexReport(
        out=out,
        task=found.task,
        classes=found.classes,
        num_shards=len(inputs),
        num_samples={name: entry["num_samples"] for name, entry in entries.items()},
        class_counts={name: tuple(entry["class_counts"]) for name, entry in entries.items()},
        left_out=tuple(left_out),
        doubtful=tuple(
            f"{key} in {scan.location} {why}" for scan in scans for key, why in scan.doubtful
        ),
        notes=found.notes,
        fingerprint=fingerprint,
        seconds=time.monotonic() - started_at,
    )


def _chosen(image: str | None, label: str | None, field: str | None) -> Chosen:
    images = tuple(name.strip().lstrip(".").lower() for name in (image or "").split(",") if name)
    for name in images:
        if name.rsplit(".", 1)[-1] not in IMAGE_KINDS:
            raise UserError(f"--image {name}: images are {', '.join(IMAGE_KINDS)}")
    label = None if label is None else label.strip().lstrip(".").lower()
    if label is not None and label.rsplit(".", 1)[-1] in PICKLED:
        raise UserError(
            f"--label {label}: such members can hold code and are never opened; choose one of text"
            " or JSON"
        )
    if field is not None and label is not None and label.rsplit(".", 1)[-1] != "json":
        raise UserError(f"--field {field} is for .json members, but --label is {label}")
    if field is not None and label is None:
        label = "json"
    return Chosen(image=images, label=label, field=field)


def _check_val(val_fraction: float, splits: tuple[str, ...]) -> None:
    if not val_fraction:
        return
    if VAL in splits:
        raise UserError(
            "--val-fraction was given, but there are val shards already: leave the option out, or"
            " name the shards with train=..."
        )
    if TRAIN not in splits:
        raise UserError("--val-fraction was given, but there are no train shards to take from")


def _check_classes(
    found: Labelling,
    sample_splits: list[list[str]],
    left_out: list[LeftOutSample],
    *,
    held_out: bool,
) -> None:
    """Raises DataError: a split has no sample of some class, perhaps because they were left out."""
    if found.task == SINGLE_LABEL and len(found.classes) < 2:
        raise DataError(
            f"the shards give one class only, {shown(found.classes[0])!r}, and there is nothing to"
            " tell it from: add the shards of the others, or name them with --classes"
        )
    counts: dict[str, Counter[int]] = {}
    for labels, splits in zip(found.labels, sample_splits, strict=True):
        for its, split in zip(labels, splits, strict=True):
            counts.setdefault(split, Counter()).update(its)
    if held_out and found.task == SINGLE_LABEL:
        check_large_enough(found.classes, [counts.get(s, Counter()) for s in (TRAIN, VAL)])
    why = ""
    if left_out:
        why = (
            f" that can be used; {len(left_out):,} samples were left out, such as"
            f" {shown(left_out[0].key)} ({shown(left_out[0].reason)})"
        )
    totals = sum(counts.values(), Counter[int]())
    there = [name for number, name in enumerate(found.classes) if totals[number]]
    which = ",".join(there) if len(there) <= _MOST_NAMED else "FILE, of the names that are there"
    check_classes_in_splits(
        found.classes,
        {s: counts[s] for s in SPLIT_ORDER if s in counts},
        why,
        leave_out=f"leave the class out with --classes {which}",
    )
