"""Checks of a GPU by several processes: equal results on one, and an end when one is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_findings import Finding
from gpu_place import QUICKSTART, TRAIN, Ended, Place, Process, in_run
from safetensors.torch import load_file

SHARING_NCCL = (2, 30)  # from which on NCCL_MULTI_RANK_GPU_ENABLE=1 lets ranks share a GPU
STEPS = 12
# Of the quickstart: its second stage in float64, in eight microbatches.
IN_FP64 = (
    "precision=fp64", "batch.micro=4", "stages.1.epochs=null", f"stages.1.steps={STEPS}",
    "stages.1.batchnorm=train", "checkpoint.every=4 steps",
)  # fmt: skip
KILLED_AT = 3  # steps
TIMEOUT_S = 60


def launch(place: Place, count: int, name: str, *overrides: str) -> list[Process]:
    """A job of so many ranks on this machine, each of which sees one GPU: its own where there are
    as many, else the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = given.split(",")[: max(1, torch.cuda.device_count())]
    ranks = []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NCCL_MULTI_RANK_GPU_ENABLE": "1",
        }
        if place.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = gpus[rank if len(gpus) >= count else 0]
        else:
            environment["ACCELERATE_USE_CPU"] = "true"
        config = in_run(place, name, *overrides)
        ranks.append(Process(TRAIN, "--config", QUICKSTART, *config, **environment))
    return ranks


def why_not(place: Place, count: int) -> str | None:
    """Why so many ranks cannot share what there is; None if they can."""
    if place.device != "cuda" or torch.cuda.device_count() >= count:
        return None
    version = torch.cuda.nccl.version()
    if version >= SHARING_NCCL:
        return None
    return f"not run: NCCL {'.'.join(map(str, version))} puts no two ranks on one GPU, 2.30 does"


def equal_on_any_number(place: Place) -> Iterator[Finding]:
    """The same weights from one rank, two and four, in float64, each with one GPU to see."""
    alone = _ended(launch(place, 1, "alone", *IN_FP64), 90)
    if not alone.is_well:
        yield Finding(check="ranks", what="one, in float64", found=alone.last_words, ok=False)
        return
    expected = _weights(place.folder / "alone")
    for count in (2,) if place.small else (2, 4):
        what = f"{count} ranks against one, in float64, one visible device a process"
        if reason := why_not(place, count):
            yield Finding(check="ranks", what=what, found=reason)
            continue
        name = f"ranks-{count}"
        ended = _ended(launch(place, count, name, *IN_FP64), 90)
        if not ended.is_well:
            yield Finding(check="ranks", what=what, found=ended.last_words, ok=False)
            continue
        found = _weights(place.folder / name)
        off = max(
            (found[key].double() - expected[key].double()).abs().max().item() for key in found
        )
        yield Finding(
            check="ranks",
            what=what,
            found=f"weights differ by {off:.1e} at most, after {STEPS} steps; {ended.wall_s:.0f} s",
            goal="1e-10",
            ok=off <= 1e-10,
        )


def killed(place: Place) -> Iterator[Finding]:
    """One of two ranks is killed in mid-step: when the other ends, and what it says."""
    what = "a rank is killed in mid-step"
    if reason := why_not(place, 2):
        yield Finding(check="killed", what=what, found=reason)
        return
    steps = ("stages.1.epochs=null", "stages.1.steps=100000", "eval.every=100000 steps")
    ranks = launch(place, 2, "killed", "batch.micro=16", f"run.timeout={TIMEOUT_S}s", *steps)
    pid = _pid_at(place.folder / "killed" / "heartbeats" / "rank-00001.json", limit_s=90)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    ended = ranks[0].end(3 * TIMEOUT_S if pid is not None else 1)
    after_s = time.monotonic() - killed_at
    ranks[1].end(1)
    if pid is None:
        found, ok = f"step {KILLED_AT} was never reached; {ended.last_words}", False
    else:
        said = [line for line in ended.err.splitlines() if line.startswith("rtl-dist: ")]
        found = f"the other ended {after_s:.0f} s later, with {ended.last_words}"
        ok = ended.code == 1 and after_s <= TIMEOUT_S + 10 and bool(said)
    goal = f"code 1 within run.timeout ({TIMEOUT_S} s), and a line that says why"
    yield Finding(check="killed", what=what, found=found, goal=goal, ok=ok)


def _ended(ranks: list[Process], limit_s: float) -> Ended:
    """The first that did not end well, else the first."""
    until = time.monotonic() + limit_s
    ended = [rank.end(until - time.monotonic()) for rank in ranks]
    return next((one for one in ended if not one.is_well), ended[0])


def _weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "model.safetensors")


def _pid_at(heartbeat: Path, *, limit_s: float) -> int | None:
    """The process of a rank, once it has come to the step; None if it does not."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        try:
            content = json.loads(heartbeat.read_text())
        except (OSError, ValueError):
            content = {}
        if (content.get("step") or 0) >= KILLED_AT:
            return int(content["pid"])
        time.sleep(0.2)
    return None
