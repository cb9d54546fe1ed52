"""What a check can find: damage, and lists that stay short however much there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rtl_dist.core.text import shown

MOST_LISTED = 1000

# What each kind of damage is called in the summary, in the order in which it is told.
KINDS = {
    "missing_shard": "shards missing or unreadable",
    "shard_size": "shards of another size than packed",
    "shard_sha256": "shards with other bytes than packed",
    "index_file": "index files missing, altered or of another shape",
    "totals": "counts that do not add up",
    "index_row": "index rows that cannot be right",
    "label_range": "labels out of range",
    "label_member": "labels that differ between index and shard",
    "cut_short": "samples beyond the end of their shard",
    "crc32": "samples with other bytes than packed",
    "undecodable": "samples that cannot be decoded",
}


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was packed."""

    kind: str
    """A key of ``KINDS``."""
    split: str
    """The split it is in."""
    where: str
    """The file, relative to the data set."""
    what: str
    """What is wrong."""
    sample: int | None = None
    """The sample's number within the split; None: it is not about one."""
    key: str | None = None
    """The sample's key, where that can still be read."""
    file: str | None = None
    """The file that it was packed from, where that is known."""

    def __str__(self) -> str:
        name = "" if self.sample is None else f" sample {self.sample}"
        key = "" if self.key is None else f" (key {self.key})"
        file = "" if self.file is None else f", made of {shown(self.file)}"
        return f"{shown(self.where)}{name}{key}{file}: {shown(self.what)}"


class DamageList:
    """Counts all damage by kind, and keeps the first ``MOST_LISTED`` of each kind."""

    def __init__(self) -> None:
        self.listed: dict[str, list[Damage]] = {kind: [] for kind in KINDS}
        self._counts = Counter[str]()

    @property
    def counts(self) -> dict[str, int]:
        """How many of each kind there are, where there are any."""
        return {kind: self._counts[kind] for kind in KINDS if self._counts[kind]}

    @property
    def total(self) -> int:
        return self._counts.total()

    def add(self, damage: Iterable[Damage]) -> None:
        for one in damage:
            self._counts[one.kind] += 1
            if len(self.listed[one.kind]) < MOST_LISTED:
                self.listed[one.kind].append(one)


class DoubtList:
    """Counts a split's images that may not be decoded to what they show; keeps the first
    ``MOST_LISTED``."""

    def __init__(self) -> None:
        self.listed: list[tuple[int, str]] = []
        """(sample, why)"""
        self.total = 0

    def add(self, doubts: list[tuple[int, str]]) -> None:
        self.total += len(doubts)
        self.listed += doubts[: MOST_LISTED - len(self.listed)]
