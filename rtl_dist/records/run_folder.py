"""The run folder: who owns it, what was resolved when it began, and where a run goes on from."""

from __future__ import annotations

import copy
import json
import logging
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch

from rtl_dist import __version__
from rtl_dist.config import Config, Data, Stage, read_run_config, to_dict, to_yaml
from rtl_dist.core.errors import UserError
from rtl_dist.core.files import clear_left_over, write_json, write_text
from rtl_dist.core.lock import RunLock
from rtl_dist.core.processes import available_cpus
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.images import region
from rtl_dist.distributed.heartbeat import Watch, clear_heartbeats
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.records.checkpoint import (
    Snapshot,
    clear_unfinished,
    has_checkpoint,
    load_checkpoint_of,
    load_newest_checkpoint,
)

LOG = logging.getLogger("rtl_dist")

WATCHED = timedelta(days=1)  # patience with ranks, where ``run.timeout`` ends what does not go on

# What may differ between a run and its continuation: where things are and what is reported.
_FREE = ("run", "track", "checkpoint", "eval", "early_stop", "compile", "features")
_FREE_KEYS = {
    "data": (
        "path",
        "source",
        "val_fraction",
        "test",
        "workers",
        "cache_dir",
        "cache_gb",
        "bad_samples",
    ),
    "model": ("weights", "head"),
}


def keep_resolved(config: Config) -> Config:
    """The config with what an earlier start of this run resolved: the canonical microbatch and the
    precision are part of the run, whatever hardware it goes on with."""
    run = Path(config.run.dir)
    if not has_checkpoint(run):
        return config
    earlier = read_run_config(run)
    if config.batch.micro == "auto":
        config = replace(config, batch=replace(config.batch, micro=earlier.batch.micro))
    if config.precision == "auto":
        config = replace(config, precision=earlier.precision)
    return config


@contextmanager
def owned_run_folder(config: Config, runtime: Runtime) -> Iterator[Path]:
    """The run folder, made and locked by rank 0 for as long as the block lasts, and with the
    heartbeats of all ranks in it.

    Raises:
        UserError: on every rank; the folder belongs to another job, or ``run.resume`` forbids.
    """
    run = Path(config.run.dir)
    lock = RunLock(run)
    try:
        runtime.from_main(lambda: _claim(run, lock, config.run.resume))
        with Watch(
            run,
            runtime.heartbeat,
            rank=runtime.rank,
            world_size=runtime.world_size,
            timeout_s=config.run.timeout.seconds,
        ):
            yield run
    finally:
        lock.release()


def restore(run: Path, config: Config, dataset: Dataset, runtime: Runtime) -> Snapshot | None:
    """The newest whole checkpoint, the same on every rank, if it is of this data and config.

    ``batch.micro`` may be a part of what it was, where memory did not hold that: its state then
    says so, as after a halving within the run.

    Raises:
        UserError: on every rank, naming what differs.
    """
    identity = run_identity(config, dataset)
    micro = int(config.batch.micro)
    found: list[Snapshot] = []

    def find() -> int | None:
        snapshot = load_newest_checkpoint(run)
        if snapshot is None:
            return None
        found.append(snapshot)
        then = snapshot.identity
        if then["config"]["batch"]["micro"] % micro == 0:
            then = copy.deepcopy(then)
            then["config"]["batch"]["micro"] = micro
        _refuse_other_identity(run, then, identity)
        return snapshot.state.step

    step = runtime.from_main(find)
    if step is None:
        return None
    snapshot = runtime.on_every_rank(
        lambda: found[0] if found else load_checkpoint_of(run, cast(int, step))
    )
    _note_smaller_microbatch(snapshot, micro)
    return snapshot


def _note_smaller_microbatch(snapshot: Snapshot, micro: int) -> None:
    state = snapshot.state
    before = state.micro_batch_size or snapshot.identity["config"]["batch"]["micro"]
    if micro < before:
        state.micro_batch_size = micro
        state.halvings = [*state.halvings, [state.step, micro]]
        LOG.warning("from step %d on the canonical microbatch is %d", state.step, micro)


def describe_run(run: Path, config: Config, runtime: Runtime) -> None:
    """Writes ``config.yaml`` and ``environment.json``; what an earlier start said of its end is not
    true any more."""
    (run / "results.json").unlink(missing_ok=True)
    write_text(run / "config.yaml", to_yaml(config))
    write_json(run / "environment.json", _environment(runtime))


def run_identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    content = to_dict(config)
    for section in _FREE:
        content.pop(section)
    for section, keys in _FREE_KEYS.items():
        for key in keys:
            content[section].pop(key)
    if config.data.shuffle == "full":
        content["data"].pop("window")  # it says nothing then
    return {
        "config": content,
        "classes": list(dataset.classes),
        "task": dataset.task,
        "dataset_fingerprint": dataset.fingerprint,
    }


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


def read_results(run: Path) -> dict[str, Any]:
    """``results.json``, or {} where the run has none yet; ``status`` is done, stopped or failed."""
    try:
        results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results


def _refuse_other_identity(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if then["dataset_fingerprint"] != now["dataset_fingerprint"]:
        if then["classes"] != now["classes"]:
            raise UserError(
                f"the head in {run} is for {len(then['classes'])} classes and the data now has"
                f" {len(now['classes'])}; choose another run.dir, with model.weights={run} to start"
                " from its weights"
            )
        raise UserError(
            f"the data set changed since the run in {run} began (fingerprint"
            f" {then['dataset_fingerprint'][:12]} then, {now['dataset_fingerprint'][:12]} now);"
            " restore it, or choose another run.dir"
        )
    different = list(_differences(_filled(then["config"], now["config"]), now["config"], ""))
    if different:
        raise UserError(
            f"the config differs from that of the run in {run}: {'; '.join(different)}; undo that,"
            " or choose another run.dir"
        )


def _filled(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An earlier version's config with the keys that it did not know, at their defaults: what it
    did is what they say."""
    some = Config(data=Data(path=""), stages=[Stage(name="any", epochs=1, lr=1)])
    defaults = to_dict(some)
    filled = {
        section: {key: defaults[section].get(key) for key in now[section]} | value
        if isinstance(value, dict)
        else value
        for section, value in then.items()
    }
    return filled | {"stages": [defaults["stages"][0] | stage for stage in then["stages"]]}


def _differences(then: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            dotted = f"{path}.{key}" if path else key
            yield from _differences(then.get(key), now.get(key), dotted)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from _differences(one, other, f"{path}.{i}")
    elif then != now:
        yield f"{path} was {then!r} and is {now!r}"


def _environment(runtime: Runtime) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "accelerate", "timm", "webdataset", "wandb", "numpy")
    cuda = torch.cuda.is_available()
    return {
        "rtl_dist": __version__,
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "device": torch.cuda.get_device_name(runtime.device) if cuda else _cpu_name(),
        "cpus": available_cpus(),
        "precision": runtime.precision,
        "region_decoding": region.available(),
        "world_size": runtime.world_size,
        "git": _git_state(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), "CPU")


def _git_state() -> dict[str, Any] | None:
    """The commit of the code in use, and whether it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
