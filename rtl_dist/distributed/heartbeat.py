"""What the main thread of a rank is doing, kept in memory for whoever wants to know.

The code that trains, evaluates or saves says here what it does (``phase``), that it got somewhere
(``beat``) and that it waits for other ranks (``waiting``). ``watch.py`` writes that into a file and
ends a job of which one rank has stopped going on.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rtl_dist.core.errors import RtlDistError

T = TypeVar("T")
_SAMPLE_NAMED_EVERY_S = 1.0  # naming a sample may read a disk


class Heartbeat:
    """Written by the main thread alone, read by the thread of ``Watch``.

    progress: grows whenever this rank got somewhere; the number itself means nothing.
    is_waiting: this rank is inside an exchange with other ranks and can do nothing else.
    is_open_ended: what it does may take any time without progress.
    """

    def __init__(self) -> None:
        self.progress = 0
        self.is_waiting = False
        self.is_open_ended = False
        self._phase = "starting"
        self._stage: str | None = None
        self._step: int | None = None
        self._sample: str | None = None
        self._sample_named_at = -math.inf  # monotonic, s

    def beat(
        self,
        *,
        stage: str | None = None,
        step: int | None = None,
        sample: Callable[[], str] | None = None,
    ) -> None:
        """Notes that this rank got somewhere.

        Args:
            stage: the stage it is in; None: as before.
            step: the optimizer step it is at; None: as before.
            sample: returns the name of the sample worked on last; called once a second at most.
        """
        self.progress += 1
        self._stage = stage or self._stage
        self._step = self._step if step is None else step
        now = time.monotonic()
        if sample is not None and now - self._sample_named_at >= _SAMPLE_NAMED_EVERY_S:
            self._sample_named_at = now
            self._sample = None
            with contextlib.suppress(RtlDistError, OSError):  # its shard may be out of reach
                self._sample = sample()

    @contextlib.contextmanager
    def phase(self, name: str, *, open_ended: bool = False) -> Iterator[None]:
        """Says what is done within the block; afterwards the phase is what it was before.

        Args:
            name: as the user will read it, such as ``evaluating``.
            open_ended: it may take any time without progress (saving to a slow disk, compiling):
                nobody ends the job for it, as long as the process lives.
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
        """Passes the items on, and says meanwhile that data is waited for.

        Args:
            items: whatever a loader yields.
            are_remote: they come over the network, which may take any time: retries have a limit of
                their own there. Of local ones nothing is said, so the usual time-out holds.
        """
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
        """Says that within the block this rank waits for the others."""
        self.is_waiting = True
        try:
            yield
        finally:
            self.is_waiting = False

    def describe(self) -> dict[str, Any]:
        """What ``Watch`` writes into the rank's file; None where a stage, step or sample is not
        known yet."""
        return {
            "phase": self._phase,
            "stage": self._stage,
            "step": self._step,
            "sample": self._sample,
            "progress": self.progress,
            "open_ended": self.is_open_ended,
            "waiting": self.is_waiting,
        }
