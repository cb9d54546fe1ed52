"""What the processes (ranks) of a job do together: agree on stopping, share failures, add counts.

All of it travels between the hosts' CPUs, in a gloo group of its own beside the one in which the
devices exchange gradients: a decision never waits until a GPU is done.
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
    """This process among the others.

    Every method that exchanges something must be called by all ranks, in the same order: one that
    leaves a call out makes the others wait. While this rank waits, its heartbeat says so.

    rank: of this process, from 0. world_size: the number of processes. stops: the requests to stop
    that reach this process. heartbeat: what this process is doing.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        stops: StopRequests | None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            stops: None: this process is never asked to stop.
            group: of all ranks, on gloo; None where there is only one.
        """
        self.rank, self.world_size, self.stops = rank, world_size, stops
        self.heartbeat = Heartbeat()
        self.group = group
        self._asked: tuple[torch.Tensor, dist.Work] | None = None  # see ``asked_to_stop``

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop. It does not know of the others: whoever acts on this
        alone leaves them waiting."""
        return self._reason is not None

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop, as it was at the call before this one.

        Each call starts a sum over all ranks in the background, and reads that of the call before,
        which is usually there by now. So a rank waits only for one that is more than a call behind,
        and all ranks get the same answer.

        Returns:
            False at the first call of several ranks.
        """
        if self.group is None:
            return self.is_asked()
        agreed = False
        if self._asked is not None:
            answer, work = self._asked
            with self.heartbeat.waiting():
                work.wait()
            agreed = bool(answer.item())
        question = torch.tensor(int(self.is_asked()))
        self._asked = question, dist.all_reduce(question, group=self.group, async_op=True)
        return agreed

    def settle(self) -> None:
        """Finishes the sum that the last ``asked_to_stop`` began, before the group is closed: a
        rank that needs it would else wait for this one."""
        if self._asked is not None:
            with suppress(RuntimeError):  # another rank may be gone by now
                self._asked[1].wait()

    @property
    def stop_reason(self) -> str:
        """Why the run stops, in words that follow "by": a signal's name, or another process."""
        return self._reason or "another process's request"

    @property
    def _reason(self) -> str | None:
        return self.stops.reason if self.stops is not None else None

    def agree(self, *, bad_samples: int, failure: Exception | None) -> tuple[bool, int]:
        """The one exchange of a step: all ranks stop, go on or fail together.

        Args:
            bad_samples: how many samples this rank could not read.
            failure: what went wrong on this rank; None: nothing.

        Returns:
            Whether any rank was asked to stop, and the bad samples of all ranks together.

        Raises:
            Exception: where any rank has a ``failure``, on every rank the lowest rank's.
        """
        mine = torch.tensor([int(self.is_asked()), bad_samples, int(failure is not None)])
        stop, bad, failed = self.sum_over_ranks(mine).tolist()
        if failed:
            raise next(error for error in self.gather(failure) if error is not None)
        return stop > 0, bad

    def in_rounds(self, items: Iterable[T], rounds: int, *, what: str) -> Iterator[T | None]:
        """Goes through this rank's items while the other ranks go through theirs, with an exchange
        before each, so that all stop or fail in the same round.

        Args:
            items: of this rank, at most ``rounds``.
            rounds: the most items that any rank has; the same number on all.
            what: what is done meanwhile, for the message of a stop, such as ``evaluating``.

        Yields:
            One item a round; None once this rank has no more.

        Raises:
            StopRequested: on every rank, if any was asked to stop.
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
        next(mine, None)  # a generator runs to its end, and cleans up

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Adds a tensor up over all ranks.

        Args:
            values: on the CPU, of the same shape and dtype on every rank; it is overwritten.
                Integers add up exactly.

        Returns:
            ``values``, now the same on every rank.
        """
        if self.group is not None:
            with self.heartbeat.waiting():
                dist.all_reduce(values, group=self.group)
        return values

    def gather(self, item: Any) -> list[Any]:
        """``item`` of every rank, in order of rank, on every rank. It is pickled on the way."""
        if self.group is None:
            return [item]
        items: list[Any] = [None] * self.world_size
        with self.heartbeat.waiting():
            dist.all_gather_object(items, item, group=self.group)
        return items

    def gather_to_main(self, item: Any) -> list[Any] | None:
        """``item`` of every rank, in order of rank, on rank 0; None elsewhere."""
        if self.group is None:
            return [item]
        items: list[Any] | None = [None] * self.world_size if self.is_main else None
        with self.heartbeat.waiting():
            dist.gather_object(item, items, dst=0, group=self.group)
        return items

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Calls ``make`` on rank 0 alone, and gives what it returns to every rank.

        Raises:
            RtlDistError: on every rank, what ``make`` raised on rank 0, or what its OSError means
                to a user.
            Exception: any other goes on as it is on rank 0; the others get a RuntimeError that
                quotes it.
        """
        result: list[Any] = [None, None]  # what was made, or what went wrong
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
        """Calls ``make`` on every rank, and returns on each what it returned there.

        Raises:
            RtlDistError: on every rank, if ``make`` raised one on any; that of the lowest rank.
        """
        failure, made = None, []
        try:
            made.append(make())
        except RtlDistError as error:
            failure = error
        self.agree(bad_samples=0, failure=failure)
        return made[0]

    def require_equal(self, what: str, value: str) -> None:
        """Makes sure that all ranks have the same value.

        Args:
            what: its name, for the message.

        Raises:
            RuntimeError: on every rank, if it differs between any two.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            raise RuntimeError(f"ranks disagree on {what}: {dict(enumerate(values))}")

    def _broadcast(self, objects: list[Any]) -> None:
        """Overwrites the list with rank 0's."""
        if self.group is not None:
            with self.heartbeat.waiting():
                dist.broadcast_object_list(objects, src=0, group=self.group)
