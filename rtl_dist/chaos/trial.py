"""Trainings that are killed at random moments and started again, each time by the same command."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from rtl_dist.chaos.process import Attempt, started
from rtl_dist.core.files import read_object
from rtl_dist.records.hashes import newest_checkpoint, rows_of
from rtl_dist.records.results import read_results

LOGS, FEATURES = "logs", "features"
START_UP_SHARE = 0.15  # of the kills; nothing is at stake there yet
ONE_RANK_SHARE = 0.5  # of the kills of several processes; the others are of all of them


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long an undisturbed run took, and for what."""

    start_s: float
    """From the start of the process until start-up was over."""
    work_s: float
    """From then until its results were written."""
    trained: list[tuple[int, float]]
    """(step, seconds of training up to it) of each row that it logged."""

    def left_s(self, step: int) -> float:
        """The work that remains from a step on."""
        return max(0.0, self.work_s - max((s for at, s in self.trained if at <= step), default=0.0))


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a run is to be killed."""

    in_start_up: bool
    """Whether ``after_s`` counts from the start of the process; else from the end of start-up."""
    after_s: float
    """Seconds."""

    def has_come(self, attempt: Attempt) -> bool:
        age_s = attempt.age_s if self.in_start_up else attempt.work_s
        return age_s is not None and age_s >= self.after_s


def draw_moment(
    pace: Pace, random: Random, *, step: int, kills_left: int, earlier: float = 1.0
) -> Moment:
    """When to kill next a run that goes on from a step: the first of ``kills_left`` moments spread
    evenly over what remains, now and then a moment of its start-up instead."""
    if random.random() < START_UP_SHARE:
        return Moment(in_start_up=True, after_s=random.uniform(0, pace.start_s))
    first = 1 - random.random() ** (1 / kills_left)
    return Moment(in_start_up=False, after_s=earlier * first * pace.left_s(step))


class Trial:
    """Trainings of one command in a folder; ``kills`` are those that found a run alive."""

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        *,
        processes: int,
        random: Random,
        bar: tqdm[Any],
    ) -> None:
        """arguments: of ``rtl-dist train``. bar: counts the kills."""
        self.folder = folder
        self.kills: list[dict[str, Any]] = []
        self._command, self._processes = _command(arguments, processes), processes
        self._random, self._bar = random, bar

    def undisturbed(self, name: str) -> Pace:
        """Trains.

        Raises:
            RtlDistError: it failed; with its exit code.
        """
        run = self.folder / name
        with self._start(run, 1) as attempt:
            attempt.wait(lambda: attempt.work_s is not None)
            start_s = attempt.age_s
            attempt.wait(lambda: _is_done(run))
            work_s = attempt.age_s - start_s
            attempt.require_success(f"the {name} run")
        trained = [(row["step"], row["elapsed_s"]) for row in rows_of(run)]
        return Pace(start_s=start_s, work_s=work_s, trained=trained)

    def killed(self, name: str, pace: Pace, kills: int, *, earlier: float) -> None:
        """Trains to the end, killed up to so many times on the way.

        Raises:
            RtlDistError: it failed without being killed; with its exit code.
        """
        run = self.folder / name
        for number in range(1, kills + 2):
            saved = _saved_step(run)
            with self._start(run, number) as attempt:
                if number <= kills:
                    moment = draw_moment(
                        pace,
                        self._random,
                        step=saved,
                        kills_left=kills + 1 - number,
                        earlier=earlier,
                    )
                    if found := self._kill(attempt, run, moment):
                        start = {"run": name, "start": number, "resumed_from": saved}
                        self.kills.append(start | {"moment": asdict(moment)} | found)
                        self._bar.update()
                        continue
                attempt.require_success(f"the {name} run, started for the {number}. time,")
                return

    def _kill(self, attempt: Attempt, run: Path, moment: Moment) -> dict[str, Any] | None:
        """What a kill at the moment found; None where nothing was left to be killed."""
        if not attempt.wait(lambda: moment.has_come(attempt)):
            return None
        age_s, work_s = attempt.age_s, attempt.work_s
        several = self._processes > 1 and work_s is not None
        one_rank = several and self._random.random() < ONE_RANK_SHARE
        if not (attempt.kill_rank(self._random) if one_rank else attempt.kill()):
            return None
        return {
            "killed": "one rank" if one_rank else "all",
            "age_s": round(age_s, 3),
            "work_s": None if work_s is None else round(work_s, 3),
            "saved": _saved_step(run),
            **_place(run, attempt),
        }

    def _start(self, run: Path, number: int) -> AbstractContextManager[Attempt]:
        self._bar.set_description(f"{run.name}, start {number}")
        logs = self.folder / LOGS
        logs.mkdir(exist_ok=True)
        ours = {
            "run.dir": str(run),
            "run.resume": "auto",
            "run.time_limit": None,
            "track.wandb": "off",
            "features.cache_dir": str(self.folder / FEATURES / run.name),
        }
        given = [word for word in self._command if word.partition("=")[0] not in ours]
        values = {key: json.dumps(value, ensure_ascii=False) for key, value in ours.items()}
        return started(
            [*given, *(f"{key}={value}" for key, value in values.items())],
            run=run,
            log=logs / f"{run.name}-{number:03d}.log",
            tick=lambda: self._bar.update(0),
        )


def _command(arguments: list[str], processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    program = ["-m", "rtl_dist", "train", *arguments]
    return [sys.executable, *(launcher if processes > 1 else []), *program]


def _is_done(run: Path) -> bool:
    """Whether all that is left to do is to draw the results."""
    return bool(read_results(run).get("status") == "done")


def _saved_step(run: Path) -> int:
    newest = newest_checkpoint(run)
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def _place(run: Path, attempt: Attempt) -> dict[str, Any]:
    """Where rank 0 was last, as far as this start told."""
    if attempt.work_s is None:
        return {"phase": "start-up", "stage": None, "step": None}
    logged: dict[str, Any] = {}
    if attempt.has_written(run / "metrics.jsonl") and (rows := rows_of(run)):
        logged = rows[-1]
    path = run / "heartbeats" / "rank-00000.json"
    told = read_object(path) if attempt.has_written(path) else {}
    latest = max(logged, told, key=lambda row: row.get("step") or 0)
    return {"phase": told.get("phase"), "stage": latest.get("stage"), "step": latest.get("step")}
