"""Which samples hold the same pixels, from digests of 16 bytes: 40 bytes a sample at the peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

MOST_LISTED = 1000
MOST_MEMBERS = 100

_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples with the same pixels."""

    size: int
    """How many there are."""
    members: tuple[tuple[str, int], ...]
    """(split, sample) of each, at most the first ``MOST_MEMBERS``."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """All groups of one kind."""

    num_groups: int
    """How many there are."""
    num_samples: int
    """How many samples are in them, together."""
    listed: tuple[Group, ...]
    """At most the first ``MOST_LISTED``."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Groups may be of several kinds."""

    within: Kind
    """Two members or more in one split."""
    across: Kind
    """Members in more than one split."""
    conflicts: Kind
    """Members with different labels."""
    surplus: dict[str, int]
    """By split: samples that repeat an earlier one of the same split."""
    overlap: dict[str, dict[str, int]]
    """``overlap["val"]["train"]``: samples of val whose pixels are in train as well."""


class Digests:
    """A 128-bit digest for each sample of all splits; (0, 0) where there is none.

    Samples get global numbers, split after split.
    """

    def __init__(self, num_samples: dict[str, int]) -> None:
        self.splits = tuple(num_samples)
        self.starts = np.cumsum([0, *num_samples.values()])
        self._high, self._low = np.zeros((2, int(self.starts[-1])), np.uint64)

    def put(self, split: str, samples: np.ndarray, digests: np.ndarray) -> None:
        numbers = self.starts[self.splits.index(split)] + samples
        self._high[numbers] = digests[:, 0]
        self._low[numbers] = digests[:, 1]

    def runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(order, starts, ends): ``order[start:end]`` are a group's global numbers, ascending.

        Only groups of two or more.
        """
        order = np.lexsort((self._low, self._high))
        equal = np.ones(max(0, len(order) - 1), bool)
        for part in (self._high, self._low):
            ordered = part[order]
            equal &= ordered[1:] == ordered[:-1]
        del ordered
        first = np.flatnonzero(np.diff(equal.view(np.int8), prepend=0, append=0))
        starts, ends = first[::2], first[1::2] + 1
        if len(starts) and not (self._high[order[starts[0]]] or self._low[order[starts[0]]]):
            starts, ends = starts[1:], ends[1:]  # those without a digest sort first
        return order, starts, ends


def find_duplicates(
    digests: Digests, labels_of: Callable[[str, np.ndarray], np.ndarray]
) -> Duplicates:
    """Finds all groups; ``labels_of(split, samples)`` gives (n,) numbers or (n, classes) rows."""
    order, starts, ends = digests.runs()
    sizes = ends - starts
    num_splits = len(digests.splits)
    counts = np.zeros((len(starts), num_splits), np.int64)  # members by group and split
    conflict = np.zeros(len(starts), bool)
    for group, members in _chunks(order, starts, ends):
        split = np.searchsorted(digests.starts, members, "right") - 1
        np.add.at(counts, (group, split), 1)
        labels = _labels(digests, labels_of, members)
        of_first = _labels(digests, labels_of, order[starts[group]])
        differs = (labels != of_first).reshape(len(members), -1).any(axis=1)
        conflict[group[differs]] = True

    def kind(chosen: np.ndarray) -> Kind:
        numbers = np.flatnonzero(chosen)
        numbers = numbers[np.argsort(order[starts[numbers]], kind="stable")]
        listed = (_group(digests, order[starts[n] : ends[n]]) for n in numbers[:MOST_LISTED])
        return Kind(
            num_groups=len(numbers),
            num_samples=int(sizes[numbers].sum()),
            listed=tuple(listed),
        )

    present = counts > 0
    surplus = (counts - 1).clip(min=0).sum(axis=0)
    shared = counts.T @ present  # (splits, splits)
    return Duplicates(
        within=kind(np.any(counts > 1, axis=1)),
        across=kind(np.sum(present, axis=1) > 1),
        conflicts=kind(conflict),
        surplus=dict(zip(digests.splits, surplus.tolist(), strict=True)),
        overlap={
            a: {b: int(shared[i, j]) for j, b in enumerate(digests.splits) if i != j}
            for i, a in enumerate(digests.splits)
        },
    )


def _chunks(
    order: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(group number of each, global number of each) for all members of all groups, in pieces."""
    total = np.concatenate([[0], np.cumsum(ends - starts)])
    for position in range(0, int(total[-1]), _CHUNK):
        rank = np.arange(position, min(position + _CHUNK, int(total[-1])))
        group = np.searchsorted(total, rank, "right") - 1
        yield group, order[starts[group] + rank - total[group]]


def _labels(
    digests: Digests, labels_of: Callable[[str, np.ndarray], np.ndarray], numbers: np.ndarray
) -> np.ndarray:
    """Labels by global number."""
    split_of = np.searchsorted(digests.starts, numbers, "right") - 1
    labels: np.ndarray | None = None
    for i in np.unique(split_of):
        chosen = split_of == i
        part = labels_of(digests.splits[i], numbers[chosen] - digests.starts[i])
        if labels is None:
            labels = np.zeros((len(numbers), *part.shape[1:]), part.dtype)
        labels[chosen] = part
    assert labels is not None
    return labels


def _group(digests: Digests, members: np.ndarray) -> Group:
    shown = members[:MOST_MEMBERS]
    split_of = np.searchsorted(digests.starts, shown, "right") - 1
    return Group(
        size=len(members),
        members=tuple(
            (digests.splits[i], int(number - digests.starts[i]))
            for i, number in zip(split_of, shown, strict=True)
        ),
    )
