"""How many files a process may have open at once, and what to say where that is too few."""

from __future__ import annotations

import errno
import resource
from contextlib import suppress

from rtl_dist.core.errors import RtlDistError

_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_ENOUGH = 65_536


def raise_limit() -> None:
    """Raises what this process, and those that it starts, may open to what the system lets a user
    set: shells begin with a fraction of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS promises more than it gives
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share_of_limit(parts: int, *, most: int) -> int:
    """One of so many equal parts of what may be open, at least a few files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(4, min(most, soft // parts))


def is_too_many(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _TOO_MANY


def too_many_open(where: object) -> RtlDistError:
    """What to say when ``where`` could not be opened for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = f"{soft:,}" if soft == hard else f"{soft:,} (or {hard:,} after ulimit -n {hard})"
    return RtlDistError(
        f"cannot open {where}: this process may have no more than {limit} files open at once; raise"
        " the limit (ulimit -n 4096, LimitNOFILE=, --ulimit nofile=), or lower data.workers"
    )
