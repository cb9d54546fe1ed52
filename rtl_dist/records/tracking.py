"""Where metrics go: ``metrics.jsonl``, and from there to W&B as a copy that cannot hurt."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from rtl_dist.config import Config
from rtl_dist.core.files import naming
from rtl_dist.core.tolerated import tolerated
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.records.state import TrainState
from rtl_dist.records.wandb_process import start_wandb

LOG = logging.getLogger("rtl_dist")
_ALL_THE_SAME = "metrics.jsonl has everything"


class Tracker:
    """The main process's tracker. ``NullTracker`` is every other process's."""

    def __init__(self, run: Path, config: Config, state: TrainState) -> None:
        """Opens the run's metrics file, cut back to what belongs to ``state``: rows written after
        the checkpoint that is resumed from would otherwise be there twice."""
        self._path = run / "metrics.jsonl"
        # unbuffered: what a full disk refused must not be tried again when the file is closed
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        if self._file.tell() < state.metrics_bytes:
            LOG.warning("metrics.jsonl is shorter than the checkpoint says; rows were lost")
        with naming(self._path):
            self._file.truncate(min(self._file.tell(), state.metrics_bytes))
        self._file.seek(0, os.SEEK_END)
        self._wandb = None
        with tolerated("W&B is not available", but=_ALL_THE_SAME):
            self._wandb = start_wandb(run, config, state)

    def log(self, row: dict[str, Any]) -> None:
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        line = json.dumps(clean).encode() + b"\n"
        with naming(self._path):
            while line:
                line = line[self._file.write(line) :]

    @property
    def num_bytes(self) -> int:
        """Of all rows so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Makes every row durable; from any thread."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with tolerated(f"{self._path} could not be closed"):
            self._file.close()
        if self._wandb is not None:
            with tolerated("W&B", but=_ALL_THE_SAME):
                self._wandb.close()


class NullTracker(Tracker):
    """Of the processes that do not write."""

    def __init__(self) -> None:
        return

    def log(self, row: dict[str, Any]) -> None:
        return

    @property
    def num_bytes(self) -> int:
        return 0

    def flush(self) -> None:
        return

    def close(self) -> None:
        return


def build_tracker(run: Path, config: Config, state: TrainState, runtime: Runtime) -> Tracker:
    opened: list[Tracker] = []
    runtime.from_main(lambda: opened.append(Tracker(run, config, state)))
    return opened[0] if opened else NullTracker()
