"""Everything that was found, and as what it goes into ``verify.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.trainable import why_untrainable
from rtl_dist.prepare.verifying.duplicates import Duplicates, Group, Kind
from rtl_dist.prepare.verifying.findings import Damage, DamageList, DoubtList
from rtl_dist.prepare.verifying.sizes import SizeTable
from rtl_dist.prepare.verifying.skew import TRAIN, SplitSkew
from rtl_dist.prepare.verifying.splits import CheckedSplit


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The findings about a data set."""

    dataset: Dataset
    """What was looked at."""
    splits: dict[str, CheckedSplit]
    """Its splits by name, as far as they can be read."""
    damage: DamageList
    """What is not as it was packed; any makes the data set unsound."""
    sizes: dict[str, SizeTable]
    """The images' sizes, by split."""
    doubts: dict[str, DoubtList]
    """Images that may not be decoded to what they show, by split."""
    duplicates: Duplicates
    """Samples with the same pixels."""
    skew: dict[str, SplitSkew]
    """How unequal the classes are, by split."""

    def require_sound(self, *, strict: bool) -> None:
        """Raises DataError: something is damaged; or, if strict, splits share images or labels
        contradict each other."""
        where = self.dataset.where
        if self.damage.total:
            raise DataError(
                f"{where} is damaged ({self.damage.total:,} findings; the summary names"
                " some, verify.json all): restore the"
                " files from a copy, or make the data set again"
            )
        across, conflicts = self.duplicates.across, self.duplicates.conflicts
        if strict and (across.num_groups or conflicts.num_groups):
            raise DataError(
                f"{where} has {across.num_groups:,} images in more than one split and"
                f" {conflicts.num_groups:,} under different labels, which --strict does not accept:"
                " take them out of the source and pack again"
            )

    @property
    def untrainable(self) -> str:
        """Why ``train`` would refuse its train split; empty where it would not or there is none."""
        if TRAIN not in self.skew:
            return ""
        counts = self.skew[TRAIN].counts
        return why_untrainable(self.dataset.task, self.dataset.classes, TRAIN, counts)

    def to_json(self) -> dict[str, Any]:
        """Nothing in it depends on when, or by how many processes, it was found."""
        listed = (one for of_kind in self.damage.listed.values() for one in of_kind)
        kinds = {
            "within_splits": self.duplicates.within,
            "across_splits": self.duplicates.across,
            "label_conflicts": self.duplicates.conflicts,
        }
        return {
            "dataset": self.dataset.where,
            "fingerprint": self.dataset.fingerprint,
            "task": self.dataset.task,
            "sound": not self.damage.total,
            "damage": {
                "count": self.damage.total,
                "by_kind": self.damage.counts,
                "listed": [asdict(self.with_key(one)) for one in listed],
            },
            "splits": {name: self.split_facts(name) for name in self.splits},
            "duplicates": {
                "surplus": self.duplicates.surplus,
                "overlap": self.duplicates.overlap,
                **{name: self._kind(kind) for name, kind in kinds.items()},
            },
            "classes": list(self.dataset.classes),
            "untrainable": self.untrainable,
            "skew": {name: skew.to_json() for name, skew in self.skew.items()},
        }

    @cached_property
    def keys(self) -> dict[tuple[str, int], str | None]:
        """The key of each sample that is listed anywhere, None where it cannot be read."""
        kinds = (self.duplicates.within, self.duplicates.across, self.duplicates.conflicts)
        listed = {member for kind in kinds for group in kind.listed for member in group.members}
        for of_kind in self.damage.listed.values():
            listed |= {(one.split, one.sample) for one in of_kind if one.sample is not None}
        for name, sizes in self.sizes.items():
            listed |= {(name, sample) for sample, _, _ in sizes.extreme}
            listed |= {(name, sample) for sample, _ in self.doubts[name].listed}
        # In the shards' order: to find one key in a foreign tar all of it must be walked.
        keys = {(name, sample): self.splits[name].key(sample) for name, sample in sorted(listed)}
        for checked in self.splits.values():
            checked.split.files.close()
        return keys

    @cached_property
    def files(self) -> dict[tuple[str, int], str]:
        """The user's files of the samples in ``keys``, as far as they are known."""
        found = {}
        for name, checked in self.splits.items():
            keys = {n: key for (split, n), key in self.keys.items() if split == name and key}
            found.update({(name, n): file for n, file in checked.split.files_of(keys).items()})
        return found

    def split_facts(self, name: str) -> dict[str, Any]:
        """A split's counts and sizes, as they go into the JSON."""
        checked, sizes = self.splits[name], self.sizes[name]
        facts: dict[str, Any] = {
            "samples": checked.num_rows,
            "shards": len(checked.split.shards),
            "bytes": sum(shard.bytes for shard in checked.split.shards),
            "decoded": sizes.num_decoded,
            **sizes.to_json(),
            "extreme_sizes": sizes.num_extreme,
            "extreme_listed": [
                {
                    "sample": sample,
                    "key": self.keys[name, sample],
                    "file": self.files.get((name, sample)),
                    "width": width,
                    "height": height,
                }
                for sample, width, height in sizes.extreme
            ],
            "doubtful": self.doubts[name].total,
            "doubtful_listed": [
                {"sample": sample, "key": self.keys[name, sample], "why": why}
                for sample, why in self.doubts[name].listed
            ],
        }
        matrix = checked.split.label_matrix
        if self.dataset.task == MULTI_LABEL and matrix is not None and len(matrix):
            of_sample = matrix.sum(axis=1, dtype=np.int64)
            facts["mean_labels"] = round(float(of_sample.mean()), 6)
            facts["without_label"] = int(np.count_nonzero(of_sample == 0))
        return facts

    def with_key(self, damage: Damage) -> Damage:
        """The damage with its sample's key and file, where they can still be read."""
        if damage.sample is None:
            return damage
        place = damage.split, damage.sample
        return replace(damage, key=self.keys[place], file=self.files.get(place))

    def members(self, group: Group) -> list[dict[str, Any]]:
        """A group's members: split, sample, key, file, shard and names of the labels."""
        return [self._member(split, sample) for split, sample in group.members]

    def _member(self, name: str, sample: int) -> dict[str, Any]:
        checked = self.splits[name]
        split = checked.split
        label = checked.labels(np.array([sample]))[0]
        numbers = np.flatnonzero(label).tolist() if label.ndim else [int(label)]
        classes = self.dataset.classes
        return {
            "split": name,
            "sample": sample,
            "key": self.keys[name, sample],
            "file": self.files.get((name, sample)),
            "shard": split.shards[int(split.index["shard"][sample])].path,
            "labels": [classes[n] if 0 <= n < len(classes) else str(n) for n in numbers],
        }

    def _kind(self, kind: Kind) -> dict[str, Any]:
        return {
            "groups": kind.num_groups,
            "samples": kind.num_samples,
            "groups_not_listed": kind.num_groups - len(kind.listed),
            "listed": [{"size": g.size, "samples": self.members(g)} for g in kind.listed],
        }
