"""Checkpoints: whole or not there.

A checkpoint is a folder ``checkpoints/step-00001234`` of safetensors and JSON. It is written under
a temporary name, every file is flushed to disk, ``manifest.json`` with all checksums comes last,
and only then is the folder renamed; so what bears a step's name is whole, and there is never a
moment without a valid newest one. Loading verifies the checksums and falls back to the next older.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from rtl_dist.core.errors import RtlDistError, UserError, disk_refused
from rtl_dist.core.files import save_tensors, sha256_of
from rtl_dist.core.whole_folder import (
    clear_incomplete,
    delete_folder,
    discard_folder,
    incomplete_folder,
    publish_folder,
)
from rtl_dist.records.state import TrainState

LOG = logging.getLogger("rtl_dist")
SCHEMA = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step-\d{8,}")  # others may be a user's own
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TENSORS = ("model", "optimizer", "ema", "stage_best")
_DAMAGED = (OSError, ValueError, KeyError, TypeError, SafetensorError)
_CHANGING = ("model", "optimizer", "ema")  # stage_best is a copy itself, and replaced as a whole


@dataclass(kw_only=True)
class Snapshot:
    """All of a run at one step."""

    state: TrainState
    """How far the run has come."""
    model: dict[str, torch.Tensor]
    """Weights and buffers, by the classifier's own names."""
    optimizer: dict[str, torch.Tensor]
    """Named ``<state>/<parameter>``; see ``optim.named_state``."""
    ema: dict[str, torch.Tensor]
    """The averaged model, by the same names as ``model``; empty without an average."""
    stage_best: dict[str, torch.Tensor]
    """``model/...`` and ``ema/...`` at the best evaluation of the current stage; empty unless the
    stage has patience."""
    scaler: dict[str, Any]
    """The loss scaler's state; empty unless training is in fp16."""
    identity: dict[str, Any]
    """What must be equal when resuming; see ``run_identity``."""

    def on_host(self) -> Snapshot:
        """A copy that training does not change any more."""
        copies = {name: _copy(getattr(self, name)) for name in _CHANGING}
        return replace(self, state=copy.deepcopy(self.state), **copies)


def save_checkpoint(run: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Publishes a checkpoint and then deletes all but the ``keep`` newest.

    Raises:
        RtlDistError: it cannot be written (full disk, no permission); older ones are untouched.
    """
    final = run / FOLDER / _name(snapshot.state.step)
    temporary = incomplete_folder(final)
    try:
        clear_incomplete(final.parent, _NAME)
        temporary.mkdir(parents=True)
        for name in _TENSORS:
            save_tensors(getattr(snapshot, name), temporary / f"{name}.safetensors")
        state = {
            "schema": SCHEMA,
            "state": snapshot.state.to_dict(),
            "scaler": snapshot.scaler,
            "identity": snapshot.identity,
        }
        (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        names = sorted(path.name for path in temporary.iterdir())
        manifest = {name: sha256_of(temporary / name) for name in names}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        # over a damaged one of the same step, passed over when resuming
        publish_folder(temporary, final, replace=True)
    except OSError as error:
        discard_folder(temporary)
        raise disk_refused(error, f"checkpoint {final}") from error
    everything = _checkpoints(run)
    # newer ones were damaged and passed over when this run resumed: they must not crowd it out
    damaged = [path for path in everything if path.name > final.name]
    for old in damaged + everything[len(damaged) :][keep:]:
        with contextlib.suppress(OSError):
            delete_folder(old)
    return final


def clear_unfinished(run: Path) -> None:
    """Deletes what saves that were killed left, in the middle of writing or of deleting."""
    clear_incomplete(run / FOLDER, _NAME)


def load_newest_checkpoint(run: Path) -> Snapshot | None:
    """The newest whole checkpoint; a damaged one is passed over with a warning.

    Raises:
        UserError: none is whole. RtlDistError: one cannot be read, which says nothing about it.
    """
    folders = _checkpoints(run)
    for folder in folders:
        try:
            return load_checkpoint(folder)
        except OSError as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
                raise RtlDistError(
                    f"cannot read checkpoint {folder}: {error.strerror or error}; start the same"
                    " command again once the disk can be read"
                ) from error
            LOG.warning(
                "checkpoint %s is incomplete (%s); falling back to an older one", folder, error
            )
        except _DAMAGED as error:
            LOG.warning(
                "checkpoint %s is damaged (%s); falling back to an older one", folder, error
            )
    if folders:
        raise UserError(
            f"no checkpoint in {run / FOLDER} is whole; delete that folder to start over from the"
            " beginning"
        )
    return None


def load_checkpoint_of(run: Path, step: int, *, patience_s: float = 60.0) -> Snapshot:
    """The checkpoint that another rank found, once this machine sees it whole, too.

    Raises:
        RtlDistError: it does not within ``patience_s``.
    """
    folder = run / FOLDER / _name(step)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return load_checkpoint(folder)
        except _DAMAGED as error:
            if time.monotonic() > deadline:
                raise RtlDistError(
                    f"cannot go on from {folder}, as rank 0 does ({error}); is run.dir on a disk"
                    " that all hosts see alike?"
                ) from error
        time.sleep(min(1.0, patience_s))


def load_checkpoint(folder: Path) -> Snapshot:
    """Reads one checkpoint, every file checked against the manifest.

    Raises:
        OSError, ValueError, KeyError: it is damaged. UserError: it is of another version.
    """
    manifest = _read_json(folder / _MANIFEST)
    for name, expected in manifest.items():
        if sha256_of(folder / name) != expected:
            raise ValueError(f"{name} fails its checksum")
    content = _read_json(folder / _STATE)
    if content["schema"] != SCHEMA:
        raise UserError(f"{folder} is of schema {content['schema']}, this version reads {SCHEMA}")
    tensors = {
        # Read, not mapped: the file is deleted while its tensors are in use. An earlier version
        # wrote no stage_best.
        name: load((folder / file).read_bytes())
        if (file := f"{name}.safetensors") in manifest
        else {}
        for name in _TENSORS
    }
    return Snapshot(
        state=TrainState.from_dict(content["state"]),
        scaler=content["scaler"],
        identity=content["identity"],
        **tensors,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    return content


def has_checkpoint(run: Path) -> bool:
    return bool(_checkpoints(run))


def has_manifest(run: Path) -> bool:
    """Whether any checkpoint has come to its end, which other programs' folders have not."""
    return any((folder / _MANIFEST).is_file() for folder in _checkpoints(run))


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _checkpoints(run: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)
