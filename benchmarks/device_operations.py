"""Counts what a call asks of the device: the operations that would each start a kernel on a GPU.

Time says little on a machine without the GPU in question; this count is exact anywhere. A GPU that
computes faster than the host can ask waits for the host, so that what a training loop adds to a
bare one is first of all a number of operations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# An operation on a list starts a kernel for so many tensors at most (torch 2.15,
# MultiTensorApply.cuh: 110 tensors of one list, 64 pairs, 48, 36 or 30 of more lists).
_TENSORS_A_KERNEL = {1: 110, 2: 64, 3: 48, 4: 36}
_FEWEST_A_KERNEL = 30
_LISTS = ("_foreach_", "_fused_", "_amp_foreach")
_ONLY_MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_ONLY_NAMES = ("detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "is_same_size")


def count_operations(call: Callable[[], Any]) -> Counter[str]:
    """How many kernels the operations of a call start, by the operation's name; on the CPU the same
    are counted, backward passes included."""
    with _Counting() as counting:
        call()
    return counting.counts


class _Counting(TorchDispatchMode):
    """counts: kernels by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] += _num_kernels(func, name, args)
        return func(*args, **(kwargs or {}))


def _num_kernels(func: Any, name: str, args: Iterable[Any]) -> int:
    if name in _ONLY_MEMORY or name in _ONLY_NAMES or _is_view(func):
        return 0
    if not name.startswith(_LISTS):
        return 1
    lists = [one for one in args if isinstance(one, (list, tuple)) and len(one)]
    tensors = [one for one in lists if isinstance(one[0], torch.Tensor)]
    if not tensors:
        return 1
    return math.ceil(len(tensors[0]) / _TENSORS_A_KERNEL.get(len(tensors), _FEWEST_A_KERNEL))


def _is_view(func: Any) -> bool:
    """It only looks at the memory of another tensor in another way."""
    aliases = [one.alias_info for one in func._schema.returns]
    return bool(aliases) and all(one is not None and not one.is_write for one in aliases)
