"""Runs ours and the loops of others as processes of their own, for benchmarks that compare them.

A run yields its best validation accuracy, the wall time and the CPU time of all its processes
(start-up included, on our side packing too), and when, from the start of the first process, each
validation was done.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from processes import BENCHMARKS, ROOT, Finished, run_python
from spread import spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """A loop of somebody else's.

    command: script in this folder and arguments; ``--data --weights --seed --epochs`` are added.
    needs: the module that must be installed for it.
    """

    command: tuple[str, ...]
    needs: str = "torch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one side did with one seed.

    history: (seconds since its first process began, validation top-1).
    """

    best: float
    wall_s: float
    cpu_s: float
    history: tuple[tuple[float, float], ...]

    def seconds_to(self, target: float) -> float | None:
        """When a validation first found this accuracy; None: never."""
        return next((at for at, top1 in self.history if top1 >= target), None)


def installed(peers: dict[str, Peer], wanted: Sequence[str]) -> dict[str, Peer]:
    """The wanted peers that can run; the others are named on stdout."""
    found = {}
    for name in wanted:
        if importlib.util.find_spec(peers[name].needs) is None:
            print(f"{name}: {peers[name].needs} is not installed, left out", flush=True)
        else:
            found[name] = peers[name]
    return found


def warm_up(peers: dict[str, Peer], *folders: Path) -> None:
    """Reads the data once and lets each side import what it needs, so that no side pays for files
    that are not in the page cache or modules that are not compiled yet."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        path.read_bytes()
    for peer in peers.values():
        run_python(str(BENCHMARKS / peer.command[0]), "--help")
    run_python(str(ROOT / "rtl_dist/train.py"), "--help")
    run_python("-m", "rtl_dist.cli", "--help")


def run_peer(
    peer: Peer, *, data: Path, weights: Path, seed: int, epochs: int | None = None
) -> Outcome:
    """One run of somebody else's loop."""
    arguments = ["--data", str(data), "--weights", str(weights), "--seed", str(seed)]
    if epochs is not None:
        arguments += ["--epochs", str(epochs)]
    script, *options = peer.command
    done = run_python(str(BENCHMARKS / script), *options, *arguments)
    result = json.loads(done.out)
    start_up_s = done.wall_s - result["seconds"]  # its end, well under a second, counts as start-up
    return Outcome(
        best=result["best_val_top1"],
        wall_s=done.wall_s,
        cpu_s=done.cpu_s,
        history=tuple((start_up_s + r["elapsed_s"], r["val_top1"]) for r in result["history"]),
    )


def run_ours(
    config: Path, *, data: Path, weights: Path, seed: int, folder: Path, overrides: Sequence[str]
) -> Outcome:
    """``rtl-dist pack`` and one job, in a new folder below ``folder``, removed afterwards. It holds
    the store of features too: the user's would have those of earlier runs on the same images."""
    work = folder / f"ours-{config.stem}-{seed}"
    packed, run_folder = work / "data", work / "run"
    pack = run_python("-m", "rtl_dist.cli", "pack", str(data), str(packed))
    train = run_python(
        str(ROOT / "rtl_dist/train.py"),
        *("--config", str(config), f"data.path={packed}", f"run.dir={run_folder}"),
        *(f"model.weights={weights}", f"seed={seed}", "track.wandb=off"),
        *(f"features.cache_dir={work / 'features'}", *overrides),
    )
    history = tuple(
        (pack.wall_s + at, top1) for at, top1 in evaluations_of(run_folder, train, "val/top1")
    )
    best = json.loads((run_folder / "results.json").read_text())["best"]["value"]
    shutil.rmtree(work)
    return Outcome(
        best=best,
        wall_s=pack.wall_s + train.wall_s,
        cpu_s=pack.cpu_s + train.cpu_s,
        history=history,
    )


def evaluations_of(run_folder: Path, train: Finished, metric: str) -> list[tuple[float, float]]:
    """(seconds since the job's process began, what the metric was) of each evaluation of a run."""
    metrics = run_folder / "metrics.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    # rows say how long the job has trained; when the last one was written says when that began
    start_up_s = metrics.stat().st_mtime - train.began_at - rows[-1]["elapsed_s"]
    return [(start_up_s + row["elapsed_s"], row[metric]) for row in rows if metric in row]


def take_turns(
    peers: dict[str, Peer],
    seeds: Sequence[int],
    *,
    peer_run: Callable[[Peer, int], Outcome],
    our_run: Callable[[int], Outcome],
) -> dict[str, list[Outcome]]:
    """All sides with each seed, the order reversed from one seed to the next; prints each run."""
    outcomes: dict[str, list[Outcome]] = {side: [] for side in ("rtl_dist", *peers)}
    for turn, seed in enumerate(seeds):
        for side in list(outcomes)[:: 1 if turn % 2 == 0 else -1]:
            outcome = our_run(seed) if side == "rtl_dist" else peer_run(peers[side], seed)
            outcomes[side].append(outcome)
            print(
                f"seed {seed} {side:18} {outcome.best:.4f} in {outcome.wall_s:6.1f} s,"
                f" {outcome.cpu_s:6.1f} CPU-s, {len(outcome.history)} validations",
                flush=True,
            )
    return outcomes


def print_summary(outcomes: dict[str, list[Outcome]]) -> None:
    """Means of accuracy and time, and what each side costs by what ours costs, seed by seed."""
    print(f"\n{'':18} {'top-1':>7} {'wall s':>8} {'CPU s':>8}   {'wall / ours':22} CPU / ours")
    for side, runs in outcomes.items():
        ours = outcomes["rtl_dist"]
        walls = [run.wall_s / base.wall_s for run, base in zip(runs, ours, strict=True)]
        cpus = [run.cpu_s / base.cpu_s for run, base in zip(runs, ours, strict=True)]
        print(
            f"{side:18} {statistics.mean(run.best for run in runs):7.4f}"
            f" {statistics.mean(run.wall_s for run in runs):8.1f}"
            f" {statistics.mean(run.cpu_s for run in runs):8.1f}   {spread(walls):22}"
            f" {spread(cpus)}"
        )


def print_times_to(outcomes: dict[str, list[Outcome]], targets: Sequence[float]) -> None:
    """When each side first reached an accuracy, and by what factor later than ours."""
    for target in targets:
        print(f"\nto {target:.3f}:")
        ours = [run.seconds_to(target) for run in outcomes["rtl_dist"]]
        for side, runs in outcomes.items():
            times = [run.seconds_to(target) for run in runs]
            shown = ", ".join("never" if at is None else f"{at:.1f} s" for at in times)
            ratios = [a / b for a, b in zip(times, ours, strict=True) if a and b]
            by_ours = f"   / ours {spread(ratios)}" if ratios and side != "rtl_dist" else ""
            reached = sum(at is not None for at in times)
            print(f"  {side:18} {reached} of {len(runs)} seeds: {shown}{by_ours}")
