"""A job within a process that is somebody else's: a notebook, a service, a test.

A command owns its process: it sets threads, seeds and logging, and ends it when asked to stop. As a
guest a job sets all of it back, hears Ctrl-C alone, and never ends the process.
"""

from __future__ import annotations

import gc
import logging
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

from rtl_dist.core.errors import UserError
from rtl_dist.core.open_files import raise_limit
from rtl_dist.distributed.launchers import launched_world_size
from rtl_dist.distributed.precision import kernels_set_back
from rtl_dist.distributed.stopping import IS_GUEST, was_launched

_ONE_AT_A_TIME = threading.Lock()  # of one process Accelerate and process groups have one state


@contextmanager
def as_guest() -> Iterator[None]:
    """Within the block jobs of this thread are guests; afterwards the process is as it was before:
    its signal handlers, logging, seeds, threads, cuDNN's choices and TF32, limits, collection of
    garbage.

    A process that a launcher started is there for the job: its signals and its end are the job's,
    as in a command, for the other processes wait for it.

    Raises:
        UserError: another thread is in such a block.
    """
    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise UserError(
            "another job of rtl_dist runs in this process: wait for it, or start this one in a"
            " process of its own"
        )
    with ExitStack() as restoring:
        restoring.callback(_ONE_AT_A_TIME.release)
        is_alone = not was_launched() and launched_world_size() == 1
        restoring.callback(IS_GUEST.reset, IS_GUEST.set(is_alone))
        restoring.callback(_logging_as_it_is(logging.getLogger("rtl_dist")))
        restoring.callback(torch.set_num_threads, torch.get_num_threads())
        restoring.enter_context(kernels_set_back())
        restoring.callback(_restore_limit, resource.getrlimit(resource.RLIMIT_NOFILE))
        restoring.callback(gc.enable if gc.isenabled() else gc.disable)
        restoring.enter_context(torch.random.fork_rng())
        raise_limit()
        yield


def _logging_as_it_is(log: logging.Logger) -> Callable[[], None]:
    level, propagate, handlers = log.level, log.propagate, list(log.handlers)

    def restore() -> None:
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate

    return restore


def _restore_limit(limit: tuple[int, int]) -> None:
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
