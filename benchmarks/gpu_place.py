"""Where and how long the checks of a GPU run, and processes that they start."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from processes import ROOT

TRAIN = str(ROOT / "rtl_dist" / "train.py")
QUICKSTART = "configs/quickstart.yaml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """What every check is handed.

    device: cuda or cpu. folder: for all that is written. small: as little as shows that a check
    runs. ends_at: of the whole run, on ``time.monotonic()``.
    """

    device: str
    folder: Path
    small: bool
    ends_at: float

    def left_s(self) -> float:
        return self.ends_at - time.monotonic()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that ended, or was ended. code: None: it took too long."""

    code: int | None
    out: str
    err: str
    wall_s: float

    @property
    def is_well(self) -> bool:
        return self.code == 0

    @property
    def last_words(self) -> str:
        """Its last line that says something, with its code where that is none of success."""
        told, complained = (
            [line for line in text.splitlines() if line.strip()] for text in (self.out, self.err)
        )
        own = [line for line in complained if line.startswith("rtl-dist: ")]
        said = (own or (told if self.is_well else complained) or ["nothing"])[-1]
        said = said.partition(" See ")[0][:200]
        if self.code is None:
            return f"ended after {self.wall_s:.0f} s without an end; last: {said}"
        return said if self.is_well else f"code {self.code}: {said}"


class Process:
    """A process of this Python in a session of its own."""

    def __init__(self, *command: str, **environment: str) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        )

    def end(self, limit_s: float) -> Ended:
        """Waits for its end, at most so long; then all of its session is killed."""
        code: int | None = None
        try:
            out, err = self._process.communicate(timeout=max(1.0, limit_s))
            code = self._process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            out, err = self._process.communicate()
        wall_s = time.monotonic() - self._started_at
        return Ended(code=code, out=out, err=err, wall_s=wall_s)


def run(*command: str, limit_s: float, **environment: str) -> Ended:
    """A process from its start to its end."""
    return Process(*command, **environment).end(limit_s)


def in_run(place: Place, name: str, *overrides: str) -> list[str]:
    """Overrides of a config that have a run be in the place, and nowhere else."""
    return [
        f"run.dir={place.folder / name}",
        f"data.path={place.folder / 'digits'}",
        f"features.cache_dir={place.folder / 'features'}",
        "track.wandb=off",
        *overrides,
    ]


def few(place: Place, *overrides: str) -> Iterable[str]:
    """Overrides that make the quickstart's second stage short where all is to be small."""
    return (*overrides, "stages.1.epochs=null", "stages.1.steps=4") if place.small else overrides
