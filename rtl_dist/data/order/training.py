"""The training stream that a config asks for."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from rtl_dist.config import DataConfig
from rtl_dist.data.format.split import Split
from rtl_dist.data.order.balanced import BalancedOrder, ClassMembers, group_by_class
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.data.order.windows import WindowOrder

# All labels are read for it, so once a process for as long as the split is open.
_CLASS_MEMBERS: WeakKeyDictionary[Split, ClassMembers] = WeakKeyDictionary()


def training_order(split: Split, data: DataConfig, *, seed: int) -> TrainingStream:
    """The stream of a split's samples under ``data.sampling``, ``data.shuffle``, ``data.window``.

    Balanced sampling is only for single-label data of which every class has a sample.

    Raises:
        ShardError: a label is out of range, which only balanced sampling looks at.
    """
    shard_sizes = split.shards.sizes()
    if data.sampling == "balanced":
        return BalancedOrder(shard_sizes=shard_sizes, seed=seed, members=_class_members(split))
    if data.shuffle == "window":
        return WindowOrder(shard_sizes=shard_sizes, seed=seed, window=data.window)
    return EpochOrder(shard_sizes=shard_sizes, seed=seed)


def _class_members(split: Split) -> ClassMembers:
    if split not in _CLASS_MEMBERS:
        assert split.label_matrix is None
        labels = split.labels(np.arange(split.num_samples))
        _CLASS_MEMBERS[split] = group_by_class(labels, num_classes=len(split.class_counts))
    return _CLASS_MEMBERS[split]
