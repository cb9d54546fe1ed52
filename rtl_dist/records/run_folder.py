"""The run folder: one job owns it, and clears what an earlier one left half done."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rtl_dist.config import RunConfig
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.files import clear_left_over, read_object
from rtl_dist.core.lock import LOCK_NAME, RunLock, owner_of
from rtl_dist.core.text import and_more
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.watch import (
    HEARTBEAT_FILE,
    HEARTBEATS,
    Watch,
    clear_heartbeats,
)
from rtl_dist.model.folder import DESCRIPTION, WEIGHTS
from rtl_dist.records.checkpoint import (
    clear_unfinished,
    has_checkpoint,
    has_manifest,
)
from rtl_dist.records.results import read_results

_WRITTEN = ("config.yaml", "environment.json", "results.json", "report.html")
# of shells, SLURM, torchrun, PBS and SGE (.o and .e with the job's number)
_LOG = re.compile(r".*\.(log|out|err|[oe][0-9]+)|stdout|stderr")
_OF_SYSTEMS = re.compile(
    r".*\.txt|\.DS_Store|Thumbs\.db|desktop\.ini|\.gitignore|\.gitkeep|\.nfs[0-9a-f]+"
)
_LOG_FOLDERS = ("log", "logs")

PATIENCE_S = 60.0  # with disks on which a new file is not seen everywhere at once
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
    made = [folder for folder in (run, *run.parents) if not os.path.lexists(folder)]
    try:
        runtime.from_main(lambda: _claim(run, lock, config.resume))
        _require_one_folder(run, lock, runtime)
        with Watch(
            run,
            runtime.heartbeat,
            rank=runtime.rank,
            world_size=runtime.world_size,
            timeout_s=config.timeout.seconds,
        ):
            yield run
    except (UserError, DataError):
        if runtime.is_main:
            _leave_nothing(lock, made)
        raise
    finally:
        lock.release()


def _require_one_folder(run: Path, lock: RunLock, runtime: Runtime) -> None:
    """Fails now where a rank would find nothing of what rank 0 writes at the end of the training.

    Raises:
        UserError: on every rank, if not all of them see the same folder.
    """
    owner, where = runtime.from_main(lambda: (lock.owner, str(run.absolute())))
    until = time.monotonic() + PATIENCE_S
    while (is_seen := owner_of(run) == owner) is False and time.monotonic() < until:
        time.sleep(min(1.0, PATIENCE_S))
    hosts = runtime.gather((socket.gethostname(), is_seen))
    blind = sorted({host for host, sees in hosts if not sees})
    if blind:
        raise UserError(
            f"run.dir: {', '.join(blind[:3])}{and_more(len(blind) - 3)} cannot see what rank 0 on"
            f" {hosts[0][0]} writes into {where}: set run.dir to a folder on a disk that"
            " all nodes share"
        )


def _claim(run: Path, lock: RunLock, resume: str) -> None:
    try:
        _refuse_what_is_no_run(run)
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
    clear_left_over(run, _WRITTEN)
    clear_left_over(run / "best", (WEIGHTS, DESCRIPTION))
    clear_unfinished(run)


def _leave_nothing(lock: RunLock, made: list[Path]) -> None:
    """Removes the run folder of a start that was refused, and those above it that it made, unless
    more is there than what every start begins with."""
    if not made or not made[0].is_dir():  # it was there, or could not be made
        return
    if {entry.name for entry in os.scandir(made[0])} <= {LOCK_NAME, HEARTBEATS}:
        clear_heartbeats(made[0])
        with contextlib.suppress(OSError):  # another rank's last sign of life: the folder stays
            with contextlib.suppress(FileNotFoundError):
                (made[0] / HEARTBEATS).rmdir()
            lock.remove()
            for folder in made:
                folder.rmdir()


def _refuse_what_is_no_run(run: Path) -> None:
    """
    Raises:
        UserError: the folder holds something else, which a run would litter, overwrite or take for
            its own. OSError: it cannot be read.
    """
    if not run.exists() or _is_run(run):
        return
    strange = [entry.name for entry in os.scandir(run) if not _may_be_there(entry)]
    if strange:
        raise UserError(
            f"run.dir: {run} is no run and not empty (it holds {min(strange)}"
            f"{and_more(len(strange) - 1)}), so it is left alone; choose another run.dir"
        )


def _is_run(run: Path) -> bool:
    """Whether a start of ours was there; copies may lack the lock, old runs of a few steps all
    else."""
    return (
        owner_of(run) != ""
        or "rtl_dist" in read_object(run / "environment.json")
        or has_manifest(run)
    )


def _may_be_there(entry: os.DirEntry[str]) -> bool:
    """What is there before a run begins without being the user's: a lock not yet written, the logs
    of whoever starts the run, what systems leave in every folder, and the last sign of life of a
    start that was refused."""
    if entry.is_dir(follow_symlinks=False):
        if entry.name == HEARTBEATS:
            return _holds_only(entry, HEARTBEAT_FILE)
        is_of_logs = entry.name in _LOG_FOLDERS or any(files for _, _, files in os.walk(entry))
        return entry.name == "lost+found" or (is_of_logs and _holds_only(entry, _LOG))
    if not entry.is_file(follow_symlinks=False):
        return False
    if entry.name == LOCK_NAME:
        return entry.stat().st_size == 0
    return bool(_LOG.fullmatch(entry.name) or _OF_SYSTEMS.fullmatch(entry.name))


def _holds_only(folder: os.DirEntry[str], names: re.Pattern[str]) -> bool:
    return all(names.fullmatch(name) for _, _, files in os.walk(folder) for name in files)
