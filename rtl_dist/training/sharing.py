"""Whether processes can share the microbatches of a global batch, and what to type where not."""

from __future__ import annotations

import math

from rtl_dist.config import Config
from rtl_dist.core.errors import UserError

_MOST_SHOWN = 6  # numbers of processes that would do


def require_shareable(config: Config, world_size: int) -> None:
    """Fails where no step can be shared equally; the message has the override that mends it.

    Raises:
        UserError: the microbatches, or with ``batch.micro: auto`` the samples of a global batch,
            are no multiple of the processes.
    """
    total, micro = config.batch.total, config.batch.micro
    shared = total if micro == "auto" else total // micro
    if shared % world_size == 0:
        return
    what = f"batch.global: {total}"
    if micro != "auto":
        noun = "microbatch" if shared == 1 else "microbatches"
        what = f"batch: {shared} {noun} (global {total} / micro {micro})"
    raise UserError(
        f"{what} cannot be shared equally by {world_size} processes; add"
        f" {overrides_to_share(config, world_size)} to the command{_what_it_changes(config)}, or"
        f" start {_fewer(shared, world_size)}"
    )


def overrides_to_share(config: Config, world_size: int, *, least: int | None = None) -> str:
    """The overrides with which so many processes can train: the smallest global batch from the
    config's on, in the largest microbatches up to the config's.

    Args:
        least: images of a microbatch; None: 2 where BatchNorm may learn, since it cannot from one.
    """
    total, micro = config.batch.total, config.batch.micro
    if least is None:
        least = 2 if any(stage.batchnorm != "frozen" for stage in config.stages) else 1
    unit = world_size * least
    fitting = math.ceil(total / unit) * unit
    share = fitting // world_size
    changed = [f"batch.global={fitting}"] if fitting != total else []
    if micro != "auto":
        # a part of what it was, so that a run that was begun otherwise may go on
        smaller = math.gcd(share, micro)
        if smaller < least:
            smaller = max(n for n in range(1, share + 1) if share % n == 0 and n <= max(micro, 2))
        changed.append(f"batch.micro={smaller}")
    return " ".join(changed)


def _what_it_changes(config: Config) -> str:
    if config.batch.micro == "auto":
        return ""
    return " (of a result only BatchNorm that learns, mixup and dropout depend on batch.micro)"


def _fewer(shared: int, world_size: int) -> str:
    numbers = [n for n in range(1, world_size) if shared % n == 0][-_MOST_SHOWN:]
    if numbers == [1]:
        return "1 process"
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]} processes"
