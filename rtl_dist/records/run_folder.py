"""The run folder: one job owns it, and clears what an earlier one left half done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rtl_dist.config import RunConfig
from rtl_dist.core.errors import UserError
from rtl_dist.core.files import clear_left_over
from rtl_dist.core.lock import RunLock
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.watch import Watch, clear_heartbeats
from rtl_dist.records.checkpoint import (
    clear_unfinished,
    has_checkpoint,
)
from rtl_dist.records.results import read_results

WATCHED = timedelta(days=1)  # patience with ranks, where ``run.timeout`` ends what does not go on


@contextmanager
def owned_run_folder(config: RunConfig, runtime: Runtime) -> Iterator[Path]:
    """The run folder, made and locked by rank 0 for as long as the block lasts, and with the
    heartbeats of all ranks in it.

    Raises:
        UserError: on every rank; the folder belongs to another job, or ``run.resume`` forbids.
    """
    run = Path(config.dir)
    lock = RunLock(run)
    try:
        runtime.from_main(lambda: _claim(run, lock, config.resume))
        with Watch(
            run,
            runtime.heartbeat,
            rank=runtime.rank,
            world_size=runtime.world_size,
            timeout_s=config.timeout.seconds,
        ):
            yield run
    finally:
        lock.release()


def _claim(run: Path, lock: RunLock, resume: str) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {run}: {error.strerror}; choose another run.dir"
        ) from error
    if resume == "never" and (has_checkpoint(run) or read_results(run)):
        raise UserError(
            f"run.resume: never, but {run} already holds a run; choose another run.dir, or"
            " run.resume=auto to go on with it"
        )
    if not has_checkpoint(run) and read_results(run).get("status") == "done":
        raise UserError(
            f"{run} holds the results of a finished run but no checkpoint to go on from; choose"
            f" another run.dir, or delete {run / 'results.json'} to train anew"
        )
    if resume == "must" and not has_checkpoint(run):
        raise UserError(f"run.resume: must, but {run} holds no checkpoint to go on from")
    clear_heartbeats(run)
    for folder in (run, run / "best"):
        clear_left_over(folder)
    clear_unfinished(run)
