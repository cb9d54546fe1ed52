"""Remote shards come before they are needed, in the order in which the plan will need them.

Every loader process looks along the same order from where it is and fetches the shards that are
neither here nor being fetched: so the processes of a machine share the work without talking.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator

from rtl_dist.core.errors import RtlDistError
from rtl_dist.data.format.split import Split

LOG = logging.getLogger("rtl_dist")
_SHARE_OF_CACHE = 0.9  # what is looked ahead for must not push out itself
_LOOKS = 8  # in the time in which all that was looked ahead for is used
_BEHIND = 6  # microbatches that another loader process may be behind this one, and to spare


class Prefetcher:
    """Fetches in a thread of this process; ``advance`` tells how far the stream has come.

    Args:
        shards_ahead: the shards in the order in which the stream needs them from a position on.
    """

    def __init__(self, split: Split, shards_ahead: Callable[[int], Iterator[int]]) -> None:
        assert split.files.cache is not None
        self._files, self._shards = split.files, split.shards
        self._shards_ahead = shards_ahead
        self._budget = int(split.files.cache.limit * _SHARE_OF_CACHE)
        whole = max(1, sum(shard.bytes for shard in split.shards))
        self._stride = int(split.num_samples * min(1, self._budget / whole)) // _LOOKS
        self._recent: deque[int] = deque(maxlen=_BEHIND)
        self._looked_at: int | None = None
        self._thread: threading.Thread | None = None

    def advance(self, position: int) -> None:
        self._recent.append(position)
        is_running = self._thread is not None and self._thread.is_alive()
        if not is_running and self._has_moved():
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()

    def _has_moved(self) -> bool:
        return self._looked_at is None or self._recent[-1] - self._looked_at > self._stride

    def _run(self) -> None:
        try:
            while self._has_moved():
                self._looked_at = self._recent[-1]
                self._look_ahead()
        except RtlDistError as error:
            # whoever needs the shard will try again and end the run if it cannot be had
            LOG.debug("prefetch: %s", error)

    def _look_ahead(self) -> None:
        """Fetches what nobody has, until other shards come into view."""
        wanted = set(self._within_budget(self._recent[-1]))
        # what the slowest may still need keeps its place in the cache, but is its own to fetch
        for shard in self._within_budget(self._recent[0]):
            # looking counts as using, so that what is ahead outlives what is behind
            if not self._files.is_at_hand(shard) and shard in wanted:
                self._files.try_fetch(shard, wait=False)
                if self._has_moved():
                    return

    def _within_budget(self, position: int) -> Iterator[int]:
        ahead = 0
        for shard in self._shards_ahead(position):
            ahead += self._shards[shard].bytes
            if ahead > self._budget:
                return
            yield shard
