"""All shards' scans together: is each whole, which member is the label, who is val."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.core.text import shorten, shown
from rtl_dist.prepare.holdout import held_out
from rtl_dist.prepare.indexing.classes import all_values, number_classes
from rtl_dist.prepare.indexing.inputs import InputShard
from rtl_dist.prepare.indexing.labels import Value
from rtl_dist.prepare.indexing.samples import LABEL_EXTENSIONS
from rtl_dist.prepare.indexing.scan import Chosen, ShardScan
from rtl_dist.prepare.splits import TRAIN, VAL


@dataclass(frozen=True, slots=True, order=True)
class LeftOutSample:
    """A sample that is not indexed, or a member that is none, and why."""

    shard: str
    """Where its tar is: a local path or a URL."""
    key: str
    """What webdataset would call it."""
    reason: str
    """To be put behind the key."""


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """What the label members of all shards say together."""

    task: str
    """``single_label`` or ``multi_label``."""
    classes: tuple[str, ...]
    """Their names, in the order of their numbers."""
    labels: list[list[tuple[int, ...]]]
    """The class numbers of each sample of each shard, ascending."""
    image: list[str]
    """Extensions of the image members, sorted; with the two below, what ``dataset.json`` says of
    where images and labels were found."""
    label: str
    """Extension of the label members."""
    field: str | None
    """The label's field in JSON, dotted; None: no JSON, or all of it."""
    notes: tuple[str, ...]
    """What was guessed: a line each."""


def check_scans(scans: Sequence[ShardScan]) -> None:
    """Raises DataError: shards are damaged, all are named. UserError: a choice is needed."""
    damaged = [shown(scan.damage) for scan in scans if scan.damage]
    if len(damaged) == 1:
        raise DataError(f"{damaged[0]}; correct its name or the file, then index again")
    if damaged:
        lines = "\n".join(f"  {line}" for line in damaged)
        raise DataError(
            f"{len(damaged)} of {len(scans)} shards cannot be used; correct them, then"
            f" index again:\n{lines}"
        )
    for scan in scans:
        if scan.choice:
            key, option, candidates = scan.choice
            what = "images" if option == "--image" else "fields that may be the label"
            raise UserError(
                f"{shown(scan.location)}: sample {shown(key)} has several {what},"
                f" {shorten(candidates)}: choose with {option}"
            )


def settle_label_member(scans: Sequence[ShardScan], chosen: Chosen) -> None:
    """Leaves out samples that lack the label member most others have.

    Each sample's label was read from the first kind of member it has; but that must be the same
    kind everywhere, or two meanings would be mixed.
    """
    counts = Counter(extension for scan in scans for extension in scan.label_members)
    if chosen.label is not None or len(counts) <= 1:
        return
    first = max(LABEL_EXTENSIONS, key=lambda extension: counts[extension])  # of equals the first
    for scan in scans:
        kept = [i for i, extension in enumerate(scan.label_members) if extension == first]
        if len(kept) == len(scan.keys):
            continue
        scan.left_out += [
            (key, f"has no .{first}, the label of other samples (its .{extension} is not it)")
            for key, extension in zip(scan.keys, scan.label_members, strict=True)
            if extension != first
        ]
        scan.rows = scan.rows[kept]
        for column in ("keys", "labels", "images", "label_members", "fields"):
            setattr(scan, column, [getattr(scan, column)[i] for i in kept])


def label_samples(scans: Sequence[ShardScan], given: Sequence[str] | None) -> Labelling:
    """Numbers the classes of what all scans found.

    Raises:
        DataError: the labels do not agree in kind. UserError: ``given`` does not fit them.
    """
    kinds: dict[bool, ShardScan] = {}
    fields: dict[str | None, ShardScan] = {}
    where: dict[Value, str] = {}  # for messages
    for scan in scans:
        for value in sorted(all_values(scan.labels), key=lambda v: (isinstance(v, str), v)):
            where.setdefault(value, shown(scan.location))
        for label in set(scan.labels):
            kinds.setdefault(isinstance(label, tuple), scan)
        for name in dict.fromkeys(scan.fields):
            fields.setdefault(name, scan)
    if len(kinds) > 1:
        raise DataError(
            f"some labels are lists (in {shown(kinds[True].location)}), some are not (in"
            f" {shown(kinds[False].location)}): choose another member or field with --label or"
            " --field"
        )
    if len(fields) > 1:
        found = [
            f"{name or 'the whole file'} (in {shown(fields[name].location)})" for name in fields
        ]
        raise UserError(
            f"the label is in several JSON fields, {' and '.join(found)}: choose with --field"
        )
    classes, numbers, notes = number_classes(where, given)
    if not classes:
        raise DataError("no sample has any label; choose another member with --label or --field")
    cache: dict[object, tuple[int, ...]] = {}
    labels = []
    for scan in scans:
        for label in scan.labels:
            if label not in cache:
                several = label if isinstance(label, tuple) else (label,)
                cache[label] = tuple(sorted(numbers[value] for value in several))
        labels.append([cache[label] for label in scan.labels])
    return Labelling(
        task=MULTI_LABEL if True in kinds else SINGLE_LABEL,
        classes=classes,
        labels=labels,
        image=sorted({extension for scan in scans for extension in scan.images}),
        label=next(extension for scan in scans for extension in scan.label_members),
        field=next(iter(fields)),
        notes=notes,
    )


def split_samples(
    shards: Sequence[InputShard],
    scans: Sequence[ShardScan],
    labels: list[list[tuple[int, ...]]],
    task: str,
    val_fraction: float,
) -> list[list[str]]:
    """The split of each shard's samples: its shard's, or val for the chosen part of train.

    Chosen by keys alone, as ``pack`` chooses by names, so it is the same wherever the shards lie.
    """
    splits = [[s.split] * len(scan.keys) for s, scan in zip(shards, scans, strict=True)]
    if not val_fraction:
        return splits
    seen: Counter[str] = Counter()
    train: dict[str, tuple[int, ...]] = {}
    places = {}
    for number, (scan, its_labels) in enumerate(zip(scans, labels, strict=True)):
        if shards[number].split != TRAIN:
            continue
        for row, (key, label) in enumerate(zip(scan.keys, its_labels, strict=True)):
            seen[key] += 1  # keys may start anew in each shard
            name = f"{key}\0{seen[key]}"
            train[name] = label
            places[name] = (number, row)
    for name in held_out(train, task, val_fraction):
        number, row = places[name]
        splits[number][row] = VAL
    return splits


def left_out_samples(
    shards: Sequence[InputShard], scans: Sequence[ShardScan]
) -> dict[str, list[LeftOutSample]]:
    """What is left out of each split, in the order of the shards."""
    found: dict[str, list[LeftOutSample]] = {}
    for shard, scan in zip(shards, scans, strict=True):
        found.setdefault(shard.split, []).extend(
            LeftOutSample(scan.location, key, reason) for key, reason in scan.left_out
        )
    return found


def check_something_left(
    shards: Sequence[InputShard], scans: Sequence[ShardScan], splits: Sequence[str]
) -> None:
    """Raises DataError: no sample of a split can be indexed; names some and why."""
    left_out = left_out_samples(shards, scans)
    for split in splits:
        its = [scan for shard, scan in zip(shards, scans, strict=True) if shard.split == split]
        if any(scan.keys for scan in its):
            continue
        reasons = [f"{s.key} in {s.shard} {s.reason}" for s in left_out[split]]
        why = shorten(reasons) or "there is no member with a key and an extension in its shards"
        raise DataError(f"no sample of split {split!r} can be indexed: {why}")
