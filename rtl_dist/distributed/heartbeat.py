"""Signs of life: where every rank is, and an end to a job of which one does not go on.

Each rank writes ``heartbeats/rank-00000.json``. A rank that waits for another in vain finds there
which one does not answer, says so, and ends. Only times measured by a process itself are compared,
so clocks may jump, and be different on every host.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rtl_dist.core.errors import RtlDistError

LOG = logging.getLogger("rtl_dist")
T = TypeVar("T")
FOLDER = "heartbeats"
_NAMED_EVERY_S = 1.0


class Heartbeat:
    """What the main thread of a rank is doing; it calls ``beat`` whenever it got somewhere."""

    def __init__(self) -> None:
        self.progress = 0
        self.is_waiting = False
        self.is_open_ended = False
        self._phase = "starting"
        self._stage: str | None = None
        self._step: int | None = None
        self._sample: str | None = None
        self._named_at = -math.inf

    def beat(
        self,
        *,
        stage: str | None = None,
        step: int | None = None,
        sample: Callable[[], str] | None = None,
    ) -> None:
        """Notes progress.

        Args:
            sample: names the last sample that was worked on; called once a second at most.
        """
        self.progress += 1
        self._stage = stage or self._stage
        self._step = self._step if step is None else step
        now = time.monotonic()
        if sample is not None and now - self._named_at >= _NAMED_EVERY_S:
            self._named_at = now
            self._sample = None
            with contextlib.suppress(RtlDistError, OSError):  # its shard may be out of reach
                self._sample = sample()

    @contextlib.contextmanager
    def phase(self, name: str, *, open_ended: bool = False) -> Iterator[None]:
        """What is being done within the block.

        open_ended: it may take any time without a sign of progress, as long as the process lives.
        """
        before = self._phase, self.is_open_ended
        self._phase, self.is_open_ended = name, open_ended
        self.progress += 1
        try:
            yield
        finally:
            self._phase, self.is_open_ended = before
            self.progress += 1

    def while_fetching(self, items: Iterable[T], *, are_remote: bool) -> Iterator[T]:
        """The items; fetching remote ones may take any time, and has an end of its own."""
        if not are_remote:
            yield from items
            return
        ours = iter(items)
        while True:
            with self.phase("waiting for data", open_ended=True):
                found = list(itertools.islice(ours, 1))
            if not found:
                return
            yield found[0]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block the other ranks are waited for."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting = False

    def describe(self) -> dict[str, Any]:
        return {
            "phase": self._phase,
            "stage": self._stage,
            "step": self._step,
            "sample": self._sample,
            "progress": self.progress,
            "open_ended": self.is_open_ended,
            "waiting": self.is_waiting,
        }
