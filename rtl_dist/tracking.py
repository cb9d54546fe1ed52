"""Where metrics go: ``metrics.jsonl`` first, the terminal, and W&B as a copy that cannot hurt."""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import uuid
from pathlib import Path
from typing import Any

from rtl_dist.config import Config, to_dict
from rtl_dist.runtime import Runtime
from rtl_dist.state import TrainState

LOG = logging.getLogger("rtl_dist")
_WANDB_INIT_TIMEOUT_S = 20


class Tracker:
    """The main process's tracker. ``NullTracker`` is every other process's."""

    def __init__(self, run: Path, config: Config, state: TrainState) -> None:
        """Opens the run's metrics file, cut back to what belongs to ``state``: rows written after
        the checkpoint that is resumed from would otherwise be there twice."""
        self._file = open(run / "metrics.jsonl", "ab")  # noqa: SIM115 - closed in close()
        if self._file.tell() < state.metrics_bytes:
            LOG.warning("metrics.jsonl is shorter than the checkpoint says; rows were lost")
        self._file.truncate(min(self._file.tell(), state.metrics_bytes))
        self._file.seek(0, os.SEEK_END)
        self._wandb = _start_wandb(run, config, state)

    def log(self, row: dict[str, Any]) -> None:
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()
        if self._wandb is not None:
            self._guard(lambda: self._wandb.log(clean, step=row["step"]))

    def flush(self) -> int:
        """Makes every row durable; returns the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def summarise(self, results: dict[str, Any]) -> None:
        if self._wandb is not None:
            self._guard(lambda: self._wandb.summary.update(results))

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._guard(self._wandb.finish)

    def _guard(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run goes on
            LOG.warning("W&B failed (%s); going on without it", error)
            self._wandb = None


class NullTracker(Tracker):
    """Of the processes that do not write."""

    def __init__(self) -> None:
        self._wandb = None

    def log(self, row: dict[str, Any]) -> None:
        return

    def flush(self) -> int:
        return 0

    def close(self) -> None:
        return


def build_tracker(run: Path, config: Config, state: TrainState, runtime: Runtime) -> Tracker:
    return Tracker(run, config, state) if runtime.is_main else NullTracker()


def wandb_mode(wanted: str) -> str:
    """auto: what WANDB_MODE says, else online when there is a key, else offline; never a prompt."""
    if wanted != "auto":
        return {"off": "disabled"}.get(wanted, wanted)
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_wandb(run: Path, config: Config, state: TrainState) -> Any:
    mode = wandb_mode(config.track.wandb)
    if mode == "disabled":
        return None
    try:
        import wandb

        if state.wandb_id is None:
            state.wandb_id = uuid.uuid4().hex[:8]
        return wandb.init(
            project=config.track.project,
            name=run.name,
            dir=str(run),
            id=state.wandb_id,
            resume="allow",
            mode=mode,
            config=to_dict(config),
            settings=wandb.Settings(
                init_timeout=_WANDB_INIT_TIMEOUT_S, console="off", silent=True, x_disable_stats=True
            ),
        )
    except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run goes on
        LOG.warning("W&B is not available (%s); metrics.jsonl has everything", error)
        return None
