"""Checkpoints are written beside training, which learns of a failure at its next step."""

import errno
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from killed_runs import At, require_done, run_ranks
from tiny_runs import (
    make_dataset,
    metric_rows,
    newest_checkpoint,
    require_equal_runs,
    tiny_config,
    write_config,
)

import rtl_dist.records.checkpoint_writer as room
from rtl_dist.core.errors import RtlDistError
from rtl_dist.records.checkpoint import Snapshot, load_newest_checkpoint, save_checkpoint
from rtl_dist.records.checkpoint_writer import CheckpointWriter
from rtl_dist.records.state import TrainState


def snapshot(step: int, weights: torch.Tensor) -> Snapshot:
    return Snapshot(
        state=TrainState(step=step),
        model={"w": weights},
        optimizer={"exp_avg/w": weights},
        ema={"w": weights},
        stage_best={},
        scaler={},
        identity={},
    )


class Held:
    """``save_checkpoint`` that waits to be let go."""

    def __init__(self, monkeypatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        monkeypatch.setattr(room, "save_checkpoint", self._save)

    def _save(self, run, snapshot, *, keep):
        self.begun.set()
        assert self.go.wait(30)
        return save_checkpoint(run, snapshot, keep=keep)


def test_training_goes_on_meanwhile_and_changes_nothing_of_it(tmp_path, monkeypatch):
    held, writer = Held(monkeypatch), CheckpointWriter()
    weights = torch.ones(1000)
    taken = snapshot(1, weights)
    writer.write(tmp_path, taken, keep=1, before=lambda: None)
    assert held.begun.wait(30)
    with torch.no_grad():
        weights.fill_(2.0)  # the next step
    taken.state.step = 2
    assert load_newest_checkpoint(tmp_path) is None
    held.go.set()
    writer.wait()
    found = load_newest_checkpoint(tmp_path)
    assert found.state.step == 1
    for tensors in (found.model["w"], found.optimizer["exp_avg/w"], found.ema["w"]):
        assert torch.equal(tensors, torch.ones(1000))


def test_one_at_a_time_and_what_it_refers_to_first(tmp_path, monkeypatch):
    order = []

    def save(run, snapshot, *, keep):
        order.append(f"save {snapshot.state.step}")

    monkeypatch.setattr(room, "save_checkpoint", save)
    writer = CheckpointWriter()
    for step in (1, 2, 3):
        before = lambda step=step: order.append(f"metrics {step}")  # noqa: E731
        writer.write(tmp_path, snapshot(step, torch.ones(1)), keep=1, before=before)
    writer.wait()
    assert order == ["metrics 1", "save 1", "metrics 2", "save 2", "metrics 3", "save 3"]


def test_a_failure_is_told_when_it_is_known_and_to_whoever_waits(tmp_path):
    writer = CheckpointWriter()
    (tmp_path / "checkpoints").write_text("in the way")
    writer.write(tmp_path, snapshot(1, torch.ones(1)), keep=1, before=lambda: None)
    writer.join()
    assert "cannot write checkpoint" in str(writer.failure)
    with pytest.raises(RtlDistError, match="free space or correct the permissions"):
        writer.wait()
    with pytest.raises(RtlDistError):
        writer.write(tmp_path, snapshot(2, torch.ones(1)), keep=1, before=lambda: None)


def test_a_fault_of_ours_is_not_hidden(tmp_path):
    def broken():
        raise ZeroDivisionError

    writer = CheckpointWriter()
    writer.write(tmp_path, snapshot(1, torch.ones(1)), keep=1, before=broken)
    writer.join()
    assert "ZeroDivisionError" in str(writer.failure)
    with pytest.raises(RuntimeError, match="could not be written: ZeroDivisionError"):
        writer.wait()


def test_metrics_that_cannot_be_made_durable_are_a_failure_known_at_the_next_step(tmp_path):
    """Quotas and NFS tell of a full disk there."""

    def flush():
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    writer = CheckpointWriter()
    writer.write(tmp_path, snapshot(1, torch.ones(1)), keep=1, before=flush)
    writer.join()
    assert isinstance(writer.failure, RtlDistError)
    assert "Disk quota exceeded; free space" in str(writer.failure)
    assert load_newest_checkpoint(tmp_path) is None


# --- whole runs ---


@dataclass(frozen=True, kw_only=True)
class FullDisk(At):
    """The save meets a full disk."""

    def happen(self) -> None:
        raise RtlDistError("cannot write checkpoint: No space left on device; free space")


@dataclass(frozen=True, kw_only=True)
class SlowDisk(At):
    """The save waits until training is further, which it would never be if it waited too."""

    run: Path

    def happen(self) -> None:
        while metric_rows(self.run)[-1]["step"] == SAVED_AT:
            time.sleep(0.01)


pytestmark = pytest.mark.usefixtures("undrawn")
SAVED_AT = 3
SAVE = save_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.launch
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_that_fails_ends_all_ranks_soon_and_the_run_goes_on_later(
    tmp_path, dataset, world_size
):
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run"))
    exits = run_ranks(config, world_size=world_size, fault=FullDisk(place=SAVE, call=2))
    assert exits[0].fired
    for one in exits:
        assert one.code == 1
        assert "No space left on device; free space" in one.last_line
        assert "Traceback" not in one.output
    assert newest_checkpoint(tmp_path / "run").name == "step-00000004"
    require_done(run_ranks(config, world_size=world_size))
    alone = write_config(tmp_path / "a.yaml", tiny_config(dataset, tmp_path / "alone"))
    require_done(run_ranks(alone, world_size=world_size))
    require_equal_runs(tmp_path / "alone", tmp_path / "run")


@pytest.mark.launch
def test_steps_are_taken_while_a_checkpoint_is_written(tmp_path, dataset):
    run = tmp_path / "run"
    changes = {"run__log_every": "1 steps", "eval": {"every": "100 steps"}}
    tree = tiny_config(dataset, run, checkpoint={"every": f"{SAVED_AT} steps"}, **changes)
    fault = SlowDisk(place=SAVE, call=1, run=run)
    exits = run_ranks(write_config(tmp_path / "c.yaml", tree), fault=fault)
    assert exits[0].fired
    require_done(exits)
