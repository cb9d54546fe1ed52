"""What ``rtl-dist verify`` says: aligned tables, then damage, then warnings with their cure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import and_more, shorten, shown
from rtl_dist.prepare.verifying.duplicates import Group, Kind
from rtl_dist.prepare.verifying.findings import KINDS
from rtl_dist.prepare.verifying.sizes import EXTREME_ASPECT, SMALL_SIDE
from rtl_dist.prepare.verifying.skew import TRAIN
from rtl_dist.prepare.verifying.verification import Verification

_MOST_SHOWN = 20
_MOST_CLASSES = 30
_MOST_MEMBERS = 4
# Below these nobody need do anything.
_UNEQUAL = 3.0
_FAR = 0.1


def summary_of(found: Verification) -> str:
    """The whole summary but for its last line."""
    parts = [
        _split_table(found),
        _class_table(found),
        "\n".join(_damage(found)) or "no damage",
        "\n".join(warnings_of(found)) or "no warnings",
    ]
    return "\n\n".join(parts)


def warnings_of(found: Verification) -> Iterator[str]:
    """One warning a finding, each with the cure, its examples below it."""
    yield from _across(found)
    yield from _conflicts(found)
    yield from _within(found)
    yield from _skew(found)
    yield from _sizes(found)
    yield from _doubts(found)


def _split_table(found: Verification) -> str:
    multi = found.dataset.task == MULTI_LABEL
    rows = [["split", "samples", "shards", "MB", "decoded", "width", "height"]]
    rows[0] += ["labels an image", "without label"] if multi else []
    for name in found.splits:
        split = found.split_facts(name)
        row = [
            name,
            f"{split['samples']:,}",
            f"{split['shards']:,}",
            f"{split['bytes'] / 1e6:,.1f}",
            f"{split['decoded']:,}",
            _spread(split["width"]),
            _spread(split["height"]),
        ]
        if multi:
            row += [f"{split.get('mean_labels', 0):.2f}", f"{split.get('without_label', 0):,}"]
        rows.append(row)
    return aligned(rows) + "\n(width and height in pixels: smallest / median / largest)"


def _spread(side: dict[str, int] | None) -> str:
    return "-" if side is None else f"{side['min']} / {side['median']} / {side['max']}"


def _class_table(found: Verification) -> str:
    """Counts and shares a split; of many classes the largest and smallest."""
    first = next(iter(found.skew.values()))
    order = list(range(len(found.dataset.classes)))
    left_out = len(order) - _MOST_CLASSES
    if left_out > 0:
        order.sort(key=lambda n: -first.counts[n])
        order = order[: _MOST_CLASSES // 2] + order[-_MOST_CLASSES // 2 :]
    rows = [["class", *(cell for name in found.skew for cell in (name, ""))]]
    for n in order:
        row = [found.dataset.classes[n]]
        for skew in found.skew.values():
            share = skew.counts[n] / skew.num_samples if skew.num_samples else 0.0
            row += [f"{skew.counts[n]:,}", f"{share:.1%}"]
        rows.append(row)
    table = aligned(rows)
    if left_out > 0:
        table += f"\n(the largest and smallest; {left_out:,} classes in between are not shown)"
    return table


def _damage(found: Verification) -> Iterator[str]:
    for kind, count in found.damage.counts.items():
        yield f"DAMAGED: {KINDS[kind]}: {count:,}"
        yield from _examples((str(found.with_key(one)) for one in found.damage.listed[kind]), count)


def _across(found: Verification) -> Iterator[str]:
    across = found.duplicates.across
    if not across.num_groups:
        return
    # the other splits are judged against train, and test against val
    names = sorted(found.splits, key=lambda name: name != TRAIN)
    shares = [
        f"{count:,} of {found.splits[a].num_rows:,} samples of {a}"
        f" ({count / found.splits[a].num_rows:.1%}) are also in {b}"
        for i, a in enumerate(names)
        for b in names[:i]
        if (count := found.duplicates.overlap[a][b])
    ]
    yield (
        f"warning: {'; '.join(shares)}: what is measured there is too good; take them out of one"
        " side in the source and pack again"
    )
    yield from _groups(found, across)


def _conflicts(found: Verification) -> Iterator[str]:
    conflicts = found.duplicates.conflicts
    if not conflicts.num_groups:
        return
    yield (
        f"warning: {conflicts.num_groups:,} images ({conflicts.num_samples:,} samples) stand under"
        " different labels, so that no answer is right: decide on one in the source and pack again"
    )
    yield from _groups(found, conflicts)


def _within(found: Verification) -> Iterator[str]:
    within = found.duplicates.within
    if not within.num_groups:
        return
    surplus = ", ".join(f"{n:,} in {name}" for name, n in found.duplicates.surplus.items() if n)
    yield (
        f"warning: samples that repeat an earlier one of their split: {surplus}; they count twice"
        " or more in training and in figures, remove them from the source if that is not meant"
    )
    yield from _groups(found, within)


def _groups(found: Verification, kind: Kind) -> Iterator[str]:
    yield from _examples((_group(found, group) for group in kind.listed), kind.num_groups)


def _group(found: Verification, group: Group) -> str:
    members = [
        shown(f"{one['key']} in {one['shard']} ({', '.join(one['labels']) or 'no label'})")
        + _made_of(one["file"])
        for one in found.members(group)[:_MOST_MEMBERS]
    ]
    return " = ".join(members) + and_more(group.size - len(members), " = {:,} more")


def _made_of(file: str | None) -> str:
    return "" if file is None else f", made of {shown(file)}"


def _examples(lines: Iterable[str], count: int) -> Iterator[str]:
    """The first few of ``count`` findings, indented."""
    yield from (f"  {line}" for line in islice(lines, _MOST_SHOWN))
    if count > _MOST_SHOWN:
        yield f"  ...{and_more(count - _MOST_SHOWN)}"


def _skew(found: Verification) -> Iterator[str]:
    for name, skew in found.skew.items():
        absent = [found.dataset.classes[n] for n in skew.absent]
        if absent and skew.num_samples:
            what = "cannot be learned" if name == TRAIN else "are not measured"
            yield (
                f"warning: {len(absent):,} classes have no sample in {name} ({shorten(absent)}):"
                f" they {what}; add images of them"
            )
        if name == TRAIN and skew.ratio is not None and skew.ratio >= _UNEQUAL:
            yield (
                f"warning: the largest class of {name} has {skew.ratio:.1f} times the samples of"
                " the smallest; optim.class_weights=balanced weighs them alike"
            )
        if skew.distance is None or skew.by_chance is None:
            continue
        if skew.distance > max(_FAR, 2 * skew.by_chance):
            yield (
                f"warning: the class shares of {name} differ from train's by {skew.distance:.1%}"
                f" (about {skew.by_chance:.1%} would be chance): {name} measures another mix than"
                " was trained on; rtl-dist pack --val-fraction takes the same share of each class"
            )


def _sizes(found: Verification) -> Iterator[str]:
    for name, sizes in found.sizes.items():
        if not sizes.num_extreme:
            continue
        yield (
            f"warning: {sizes.num_extreme:,} images of {name} have a side below {SMALL_SIDE} pixels"
            f" or one {EXTREME_ASPECT:g} times the other; look whether they are images at all"
        )
        lines = (
            f"{found.keys[name, n]}: {width} x {height}{_made_of(found.files.get((name, n)))}"
            for n, width, height in sizes.extreme
        )
        yield from _examples(lines, sizes.num_extreme)


def _doubts(found: Verification) -> Iterator[str]:
    for name, doubts in found.doubts.items():
        if not doubts.total:
            continue
        yield (
            f"warning: {doubts.total:,} images of {name} are decoded, but perhaps not to what they"
            " show; look at them, mend or remove them in the source and pack again"
        )
        lines = (f"{found.keys[name, sample]} {why}" for sample, why in doubts.listed)
        yield from _examples(lines, doubts.total)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
