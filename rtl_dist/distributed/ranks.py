"""What the processes of a job do together: ask, agree, tell, count.

These carry decisions and exact counts, on a gloo group beside the device's own, so they never wait
for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rtl_dist.core.errors import RtlDistError, StopRequested, disk_refused
from rtl_dist.distributed.heartbeat import Heartbeat
from rtl_dist.distributed.stopping import StopRequests

T = TypeVar("T")


class Ranks:
    """This process among the others. What exchanges something is called by all of them.

    rank, world_size: of all processes. heartbeat: knows when this one waits for the others. stops:
    of this process; None: it is never asked.
    """

    def __init__(self, *, rank: int, world_size: int, stops: StopRequests | None) -> None:
        self.rank, self.world_size, self.stops = rank, world_size, stops
        self.heartbeat = Heartbeat()
        self._group: dist.ProcessGroup | None = None  # of all on gloo, where there are others
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop. Act on it only where all ranks do."""
        return self._reason is not None

    def asked_to_stop(self) -> bool:
        """Whether some rank had been asked to stop when this was called the last time. Asks again,
        and waits for no rank that is no more than one call behind.
        """
        if self._group is None:
            return self.is_asked()
        agreed = False
        if self._asked is not None:
            answer, work = self._asked
            with self.heartbeat.waiting():
                work.wait()
            agreed = bool(answer.item())
        question = torch.tensor(int(self.is_asked()))
        self._asked = question, dist.all_reduce(question, group=self._group, async_op=True)
        return agreed

    def settle(self) -> None:
        """Takes part in what was asked last, so that no rank waits for this one."""
        if self._asked is not None:
            with suppress(RuntimeError):  # another rank may be gone by now
                self._asked[1].wait()

    @property
    def stop_reason(self) -> str:
        """What to say of a stop that was agreed."""
        return self._reason or "another process's request"

    @property
    def _reason(self) -> str | None:
        return self.stops.reason if self.stops is not None else None

    def agree(self, *, bad_samples: int, failure: Exception | None) -> tuple[bool, int]:
        """One exchange a step: (whether any rank was asked to stop, bad samples of all ranks).

        Raises:
            ``failure`` of the lowest rank that has one, on every rank.
        """
        mine = torch.tensor([int(self.is_asked()), bad_samples, int(failure is not None)])
        stop, bad, failed = self.sum_over_ranks(mine).tolist()
        if failed:
            raise next(error for error in self.gather(failure) if error is not None)
        return stop > 0, bad

    def in_rounds(self, items: Iterable[T], rounds: int, *, what: str) -> Iterator[T | None]:
        """This rank's items, one a round; None once there are no more.

        Raises:
            StopRequested: on every rank, if one was asked to stop while doing ``what``.
            RtlDistError: on every rank, that of the lowest rank whose items failed.
        """
        mine = iter(items)
        for _ in range(rounds):
            item, failure = None, None
            try:
                item = next(mine, None)
            except RtlDistError as error:
                failure = error
            if self.agree(bad_samples=0, failure=failure)[0]:
                raise StopRequested(f"stopped while {what}; start the same command again to go on")
            self.heartbeat.beat()
            yield item
        next(mine, None)  # lets it end

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor on the host, in place; of whole numbers it is exact."""
        if self._group is not None:
            with self.heartbeat.waiting():
                dist.all_reduce(values, group=self._group)
        return values

    def gather(self, item: Any) -> list[Any]:
        """``item`` of every rank, in order of rank, on every rank."""
        if self._group is None:
            return [item]
        items: list[Any] = [None] * self.world_size
        with self.heartbeat.waiting():
            dist.all_gather_object(items, item, group=self._group)
        return items

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, on every rank; if it fails there, every rank fails."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = make()
            except RtlDistError as error:
                result[1] = error
            except OSError as error:
                to = "read" if isinstance(error, FileNotFoundError) else "write"
                result[1] = disk_refused(error, error.filename or "a file", to=to)
            except Exception as error:
                self._broadcast([None, RuntimeError(f"rank 0 failed: {error!r}")])
                raise
        self._broadcast(result)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def on_every_rank(self, make: Callable[[], T]) -> T:
        """What ``make`` returns here; if it fails on any rank, every rank fails alike."""
        failure, made = None, []
        try:
            made.append(make())
        except RtlDistError as error:
            failure = error
        self.agree(bad_samples=0, failure=failure)
        return made[0]

    def _broadcast(self, objects: list[Any]) -> None:
        if self._group is not None:
            with self.heartbeat.waiting():
                dist.broadcast_object_list(objects, src=0, group=self._group)

    def gather_to_main(self, item: Any) -> list[Any] | None:
        """``item`` of every rank, in order of rank, on rank 0; None elsewhere."""
        if self._group is None:
            return [item]
        items: list[Any] | None = [None] * self.world_size if self.is_main else None
        with self.heartbeat.waiting():
            dist.gather_object(item, items, dst=0, group=self._group)
        return items

    def require_equal(self, what: str, value: str) -> None:
        """Fails on every rank if ``value`` differs between ranks."""
        values = self.gather(value)
        if len(set(values)) > 1:
            raise RuntimeError(f"ranks disagree on {what}: {dict(enumerate(values))}")
