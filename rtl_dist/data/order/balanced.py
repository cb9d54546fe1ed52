"""A training stream that has each class equally often, whatever its size.

The stream is a sequence of blocks as long as there are classes. A block has each class once, in a
keyed order of its own; what block ``b`` has of a class is position ``b`` of that class's own
stream, which is one keyed permutation of its members after another: its cycles. So a class of 10
samples has each of them 100 times by the time that a class of 1000 has had all of its own, and any
position costs the same as the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rtl_dist.core.keys import Stream, stream_keys
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.data.order.permutation import permute_each


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMembers:
    """Which samples each class has."""

    samples: np.ndarray
    """(num_samples,), class after class, each in the samples' order; of the smallest unsigned type
    that holds them, so 4 bytes a sample of up to 2^32."""
    starts: np.ndarray
    """int64 (num_classes + 1,): where each class starts in ``samples``; at last the end."""


def group_by_class(labels: np.ndarray, *, num_classes: int) -> ClassMembers:
    """Takes about 24 bytes a sample while it works, with the 8 of ``labels``.

    Args:
        labels: int64 (num_samples,), the class of each sample.

    Raises:
        ValueError: a label is out of range, or a class has no sample.
    """
    counts = np.bincount(labels, minlength=num_classes)
    if len(counts) > num_classes:
        raise ValueError(f"a label is {len(counts) - 1}, but there are {num_classes} classes")
    if not counts.all():
        raise ValueError(f"class {int(np.argmin(counts))} has no sample")
    narrow = labels.astype(np.min_scalar_type(num_classes))  # two bytes are sorted in linear time
    samples = np.argsort(narrow, kind="stable")
    return ClassMembers(
        samples=samples.astype(np.min_scalar_type(len(labels))),
        starts=np.concatenate([[0], np.cumsum(counts)]),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class BalancedOrder(TrainingStream):
    """The stream of which any C positions from a multiple of C on have each of C classes once.

    An epoch, as many positions as there are samples, need not have every sample.
    """

    members: ClassMembers
    """Every class has at least one."""

    def samples_at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        starts = self.members.starts
        blocks, slots = np.divmod(np.arange(first, first + count, dtype=np.int64), len(starts) - 1)
        classes = permute_each(
            slots,
            sizes=np.full(count, len(starts) - 1),
            keys=stream_keys(self.seed, Stream.BALANCED_BLOCKS, blocks),
        )
        sizes = starts[classes + 1] - starts[classes]
        cycles, within = np.divmod(blocks, sizes)
        keys = stream_keys(self.seed, Stream.BALANCED_MEMBERS, classes, cycles)
        places = starts[classes] + permute_each(within, sizes=sizes, keys=keys)
        return self.members.samples[places].astype(np.int64), cycles

    def most_shards_at_once(self) -> int:
        return len(self.shard_sizes)
