"""Worker processes: their number, their start, their end, and how their errors come back."""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Literal, TypeVar

import torch
from torch.utils.data import DataLoader

from rtl_dist.core.errors import RtlDistError, StopRequested, WorkerError

T = TypeVar("T")


def resolve_workers(workers: Literal["auto"] | int, *, cpus: int) -> int:
    """auto: as many as this rank has CPUs for."""
    return max(1, min(16, cpus)) if workers == "auto" else workers


def start_worker(worker: int) -> None:
    """A ``worker_init_fn``. A stop request is for the training process: it saves, then ends its
    workers itself."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)


class WorkerBatches(Iterable[T]):
    """A DataLoader whose workers end at their first error, raised here as it was there.

    Args:
        loader: with a timeout, after each of which ``give_up`` is asked, or without.
        give_up: if so, StopRequested is raised.
    """

    def __init__(self, loader: DataLoader[T], give_up: Callable[[], bool] = lambda: False) -> None:
        self._loader, self._give_up = loader, give_up

    def __iter__(self) -> Iterator[T]:
        if not self._loader.num_workers:
            return iter(self._loader)
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)
        with _untouched_sigchld():
            batches = iter(self._loader)
        return _from_workers(batches, self._give_up)


def _from_workers(batches: Iterator[T], give_up: Callable[[], bool]) -> Iterator[T]:
    # DataLoader raises a worker's error from frames that refer to each other and to the iterator.
    # Left to the garbage collector, that would fail to tell the workers to end (torch 2.15), so
    # the frames are let go here and the iterator with them.
    processes = list(batches._workers) if hasattr(batches, "_workers") else []
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RtlDistError as error:
            del batches
            kind = type(error)
            text = str(error.with_traceback(None)).strip()  # a traceback that ends in the message
            text = text.splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
            raise kind(text) from None
        except Exception as error:  # noqa: BLE001 - raised again, of whatever kind
            if "DataLoader timed out" in str(error):
                if not give_up():
                    continue
                _kill(processes)
                del batches
                raise StopRequested("stopped while waiting for data") from None
            del batches
            if "exited unexpectedly" in str(error):
                raise WorkerError(_how_it_died(str(error))) from None
            raise error.with_traceback(None) from None
        try:
            yield batch
        except GeneratorExit:
            _kill(processes)  # one that waits for a server would be waited for
            raise


def _kill(processes: Sequence[BaseProcess]) -> None:
    """Ends workers, and returns when they are gone. Whoever uses DataLoaders beside ours may have
    torch's handler of dead workers, which would raise for these wherever it is called."""
    with _untouched_sigchld() as is_main_thread:
        if is_main_thread:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _how_it_died(text: str) -> str:
    pids = re.findall(r"\d+", text.partition("pid")[2])
    return (
        f"loader process {', '.join(pids)} was killed, perhaps for want of memory; lower"
        " data.workers or batch.micro, and start the same command again"
    )


@contextmanager
def _untouched_sigchld() -> Iterator[bool]:
    """Within the block the handler of SIGCHLD may be changed; yields whether it can be.

    torch's own handler raises wherever the training process happens to be when a worker dies, in
    the middle of a collective too. A dead worker is noticed within seconds at the next batch."""
    is_main = threading.current_thread() is threading.main_thread()
    # at the interpreter's end no handler is called any more, nor can one be set
    if not hasattr(signal, "SIGCHLD") or not is_main or sys.is_finalizing():
        yield False
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield True
    finally:
        signal.signal(signal.SIGCHLD, before)


def _kill_workers() -> None:
    # A worker that was not told to end ignores SIGTERM too, and multiprocessing, which sends it at
    # exit, would wait for it for ever. Runs before that, since it is registered later.
    _kill([process for process in multiprocessing.active_children() if process.daemon])
