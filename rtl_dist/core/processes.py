"""The same work on many things by several processes: results in order, and an end that is clean."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from itertools import islice
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any, TypeVar

from rtl_dist.core.cpus import available_cpus
from rtl_dist.core.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Advance = Callable[[int], Any]

_POLL_SECONDS = 0.2


def check_workers(asked: int | None) -> None:
    """Raises UserError: that many processes cannot be."""
    if asked is not None and asked < 1:
        raise UserError(f"--workers is {asked}: give 1 process or more")


def num_workers(asked: int | None, num_jobs: int, *, alone: bool) -> int:
    """How many processes ``map_in_order`` shall have: as many as were asked for, else one a CPU, or
    1 if so little is to do that it is sooner done ``alone``; never more than jobs."""
    if asked is None:
        asked = 1 if alone else available_cpus()
    return min(asked, num_jobs)


def map_in_order(
    work: Callable[[Job, Advance], Result], jobs: Iterable[Job], workers: int, advance: Advance
) -> Generator[Result, None, None]:
    """``work(job, advance)`` of each job, in the order of the jobs; with 1 worker in this process.

    ``work`` is a function of a module (it goes by name) or a ``partial`` of one, and tells
    ``advance(n)`` of n more steps done. Close the generator when leaving it early: then the
    processes end at once.

    Raises:
        BrokenProcessPool: a process was killed.
    """
    if workers <= 1:
        for job in jobs:
            yield work(job, advance)
        return
    # Not forked from this process: its threads (the caller's, OpenMP's) do not survive a fork.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        function = work.func if isinstance(work, partial) else work
        context.set_forkserver_preload([function.__module__])
        _start_forkserver(context)
    done = context.Value("q", 0)
    stop = context.RawValue("b", 0)  # without a lock, which an interrupt could leave held
    reported = 0
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (work, done, stop)) as pool,
        _stopping(stop),
    ):
        # Submitted as results are taken: few jobs and results are held at once.
        waiting = iter(jobs)
        running: deque[Future[Result]] = deque(
            pool.submit(_work, job) for job in islice(waiting, 4 * workers)
        )
        while running:
            finished, _ = wait([running[0]], _POLL_SECONDS)
            now = done.value
            advance(now - reported)
            reported = now
            if finished:
                result = running.popleft().result()
                running.extend(pool.submit(_work, job) for job in islice(waiting, 1))
                yield result


def _start_forkserver(context: Any) -> None:
    """Its children, the workers, are deaf to Ctrl-C from their first moment, as it is. Returns once
    it has imported what they need, which takes seconds: whoever interrupts it meanwhile leaves no
    worker behind that is half begun."""
    resource_tracker.ensure_running()  # else it would be started within, and unblock it
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    first = context.Process(target=int, daemon=True)
    first.start()
    first.join()


@contextlib.contextmanager
def _stopping(stop: Any) -> Iterator[None]:
    """Has the workers end when the body fails or is left.

    The pool would wait for whole jobs, and after a second Ctrl-C for ever.
    """
    try:
        yield
    except BaseException:
        stop.value = 1
        raise


_worker: dict[str, Any] = {}


def _start_worker(work: Callable[..., Any], done: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_when_told, args=(stop,), daemon=True).start()
    _worker.update(work=work, done=done)


def _end_when_told(stop: Any) -> None:
    """Ends this worker, whatever it is at, when told to or when its parent was killed outright."""
    parent = multiprocessing.parent_process()
    sentinels = [] if parent is None else [parent.sentinel]
    while not stop.value:
        if connection.wait(sentinels, _POLL_SECONDS):
            break
    os._exit(1)


def _work(job: Any) -> Any:
    def advance(steps: int) -> None:
        with _worker["done"].get_lock():
            _worker["done"].value += steps

    return _worker["work"](job, advance)
