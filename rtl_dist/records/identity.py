"""What must be equal for a checkpoint to be continued, and what to say where it is not."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rtl_dist.config import Config, DataConfig, StageConfig, to_dict
from rtl_dist.core.errors import UserError
from rtl_dist.data.format.dataset import Dataset

# What may differ between a run and its continuation: where things are and what is reported.
_FREE = (
    *("run", "track", "checkpoint", "eval", "early_stop", "compile", "features", "recipe"),
    "calibrate",
)
_FREE_KEYS = {
    "data": (
        "path",
        "source",
        "val_fraction",
        "test",
        "workers",
        "cache_dir",
        "cache_gb",
        "redirects",
        "bad_samples",
    ),
    "model": ("weights", "head"),
}


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


def refuse_other_identity(run: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError: two identities differ, naming in what and what to do."""
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
            f"the config differs from that of the run in {run}: {'; '.join(different)}; undo that"
            f" (--config {run}/config.yaml has it as it was), or {how_to_train_on(run)}"
        )


def how_to_train_on(run: Path) -> str:
    """What to give for a new run, which begins with what this one reached, if anything."""
    if not (run / "best").exists():
        return "choose another run.dir"
    overrides = (f"run.dir={run}-more", f"model.weights={run}")
    return f"train on from its best weights in a new run: {shlex.join(overrides)}"


def _filled(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """An earlier version's config with the keys that it did not know, at their defaults: what it
    did is what they say."""
    some = Config(data=DataConfig(path=""), stages=[StageConfig(name="any", epochs=1, lr=1)])
    defaults = to_dict(some)
    filled = {
        section: {key: defaults[section].get(key) for key in now[section]} | value
        if isinstance(value, dict)
        else value
        for section, value in then.items()
    }
    unknown = {key: defaults[key] for key in now.keys() - then.keys()}
    stages = [_filled_stage(stage, defaults) for stage in then["stages"]]
    return unknown | filled | {"stages": stages}


def _filled_stage(stage: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The same for a stage, and for the sections that it has of its own."""
    own = {name: defaults[name] | value for name, value in stage.items() if isinstance(value, dict)}
    return defaults["stages"][0] | stage | own


def _differences(then: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            dotted = f"{path}.{key}" if path else key
            yield from _differences(then.get(key), now.get(key), dotted)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (one, other) in enumerate(zip(then, now, strict=True)):
            yield from _differences(one, other, f"{path}.{i}")
    elif then != now:
        yield f"{path} was {_as_typed(then)} and is {_as_typed(now)}"


def _as_typed(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and value in range(10**6) else repr(value)
