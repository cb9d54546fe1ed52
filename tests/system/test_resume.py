"""A run that is killed or stopped goes on from its newest whole checkpoint and ends the same."""

import errno
import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    ROOT,
    Killed,
    make_dataset,
    metric_rows,
    newest_checkpoint,
    require_equal_runs,
    tiny_config,
    train_process,
    write_config,
)

from rtl_dist.core.errors import StopRequested
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.records import checkpoint
from rtl_dist.train import main
from rtl_dist.training import saving
from rtl_dist.training.stage_evaluator import StageEvaluator
from rtl_dist.training.stage_trainer import StageTrainer
from rtl_dist.training.step_boundary import StepBoundary

pytestmark = pytest.mark.usefixtures("undrawn")
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
PER_START = (".lock", "heartbeats", "rank-00000.json")
CHANGES = {
    "run__ledger": True,
    "optim": {"ema": 0.9},
    "augment": {"mixup": 0.2},
    "stages__1__lr": 3e-2,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = tiny_config(dataset, folder / "run", **CHANGES)
    assert main(["--config", write_config(folder / "c.yaml", config)]) == 0
    return folder / "run"


def test_ended_between_saving_and_evaluating(tmp_path, dataset, undisturbed, monkeypatch):
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run", **CHANGES))
    evaluate = StageEvaluator.metrics

    def die(self, model):
        if self._run.state.step == 12:
            raise Killed
        return evaluate(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(StageEvaluator, "metrics", die)
        with pytest.raises(Killed):
            main(["--config", config])
    saved = json.loads((newest_checkpoint(tmp_path / "run") / "state.json").read_text())["state"]
    assert (saved["step"], saved["last_eval"]) == (12, 10)
    assert main(["--config", config]) == 0
    require_equal_runs(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("step", [12, 14, 20])
def test_asked_to_stop_at_any_step_it_goes_on_to_the_same_bytes(
    tmp_path, dataset, undisturbed, monkeypatch, step
):
    """Step 12 ends a stage; step 9, due for a row of metrics: ``test_stopping.py``."""
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run", **CHANGES))
    cross = StepBoundary.cross

    def ask_and_cross(self, outcome):
        if self._run.state.step == step - 1:  # the step counts once the ranks have agreed
            os.kill(os.getpid(), signal.SIGUSR1)
        cross(self, outcome)

    with monkeypatch.context() as patch:
        patch.setattr(StepBoundary, "cross", ask_and_cross)
        assert main(["--config", config]) == 75
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "stopped"
    assert results["steps"] == step
    assert main(["--config", config]) == 0
    require_equal_runs(undisturbed, tmp_path / "run")


def test_asked_to_stop_while_evaluating(tmp_path, dataset, undisturbed, monkeypatch):
    import rtl_dist.training.stage_evaluator as room

    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run", **CHANGES))
    evaluate = room.score_split
    asked = []

    def ask_and_evaluate(*arguments, **options):
        if (
            not asked
            and json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])[
                "step"
            ]
            == 9
        ):
            asked.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(room, "score_split", ask_and_evaluate)
        assert main(["--config", config]) == 75
    assert asked
    assert newest_checkpoint(tmp_path / "run").name == "step-00000010"
    assert main(["--config", config]) == 0
    require_equal_runs(undisturbed, tmp_path / "run")


@pytest.mark.launch
def test_a_stop_request_saves_and_leaves_with_75(tmp_path, dataset, undisturbed):
    """The same in a process of its own; other signals and moments: ``test_stopping.py``."""
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, **CHANGES))
    process = train_process(config, "data.workers=1")
    deadline = time.monotonic() + 120
    while not metrics.exists() or not metrics.stat().st_size:  # until then it has nothing to save
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "start the same command to go on" in errors.splitlines()[-1]
    assert main(["--config", config]) == 0
    require_equal_runs(undisturbed, run)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path, dataset, undisturbed, capsys
):
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, **CHANGES))
    assert main(["--config", config]) == 0
    newest = newest_checkpoint(run) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    (run / "results.json").unlink()
    capsys.readouterr()
    assert main(["--config", config]) == 0
    assert "falling back to an older one" in capsys.readouterr().err
    require_equal_runs(undisturbed, run)


def test_a_finished_run_is_left_as_it_is(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 2, "trainable": "head", "lr": 1e-2}]
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, stages=stages))
    assert main(["--config", config]) == 0
    before = {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name not in PER_START
    }
    capsys.readouterr()
    assert main(["--config", config]) == 0
    assert "is already done (best val/top1" in capsys.readouterr().out
    now = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name not in PER_START}
    assert {path for path in before if before[path] != now.get(path)} <= {run}
    assert before.keys() == now.keys()


@pytest.mark.launch
def test_a_run_whose_launcher_was_ended_saves_and_stops(tmp_path, dataset):
    """accelerate's single-process launcher dies of a SIGTERM and leaves its child running."""
    run = tmp_path / "run"
    stages = [
        {"name": "all", "steps": 100_000, "trainable": "all", "lr": 1e-3, "batchnorm": "train"}
    ]
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, stages=stages))
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            str(ROOT / "rtl_dist" / "train.py"),
            "--config",
            config,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launcher.terminate()
    launcher.wait(timeout=30)
    while not (run / "results.json").exists():
        assert time.monotonic() < deadline, "the orphaned run goes on"
        time.sleep(0.05)
    assert json.loads((run / "results.json").read_text())["status"] == "stopped"


def test_resume_never_and_must(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 2, "trainable": "head", "lr": 1e-2}]
    tree = tiny_config(dataset, tmp_path / "run", stages=stages)
    config = write_config(tmp_path / "c.yaml", tree)
    assert main(["--config", config, "run.resume=must"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main(["--config", config, "run.resume=never"]) == 0
    assert main(["--config", config, "run.resume=never"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["--config", config, "run.resume=must"]) == 0


def test_another_config_data_set_or_head_is_refused_and_nothing_is_lost(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 2, "trainable": "head", "lr": 1e-2}]
    run = tmp_path / "run"
    tree = tiny_config(dataset, run, stages=stages)
    config = write_config(tmp_path / "c.yaml", tree)
    assert main(["--config", config]) == 0
    before = (newest_checkpoint(run) / "manifest.json").read_bytes()
    capsys.readouterr()

    assert main(["--config", config, "stages.0.lr=0.5", "seed=6"]) == 2
    error = capsys.readouterr().err
    assert "seed was 5 and is 6" in error
    assert "stages.0.lr was 0.01 and is 0.5" in error

    other = tmp_path / "other"
    images = dataset.parent / "images"
    pack(str(images), other, val_fraction=0.0, shard_size=7, workers=1, show_progress=False)
    assert main(["--config", config, f"data.path={other}"]) == 2
    assert "the data set changed since the run" in capsys.readouterr().err

    fewer = tmp_path / "fewer"
    pack(str(images), fewer, labels=["red", "blue"], workers=1, show_progress=False)
    assert main(["--config", config, f"data.path={fewer}"]) == 2
    assert "is for 3 classes and the data now has 2" in capsys.readouterr().err
    assert (newest_checkpoint(run) / "manifest.json").read_bytes() == before

    assert main(["--config", config, "data.workers=1", "checkpoint.keep=5"]) == 0


def test_a_second_job_in_the_same_folder_leaves_and_names_the_owner(tmp_path, dataset, capsys):
    from rtl_dist.core.lock import RunLock

    run = tmp_path / "run"
    run.mkdir()
    lock = RunLock(run)
    lock.acquire()
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run))
    assert main(["--config", config]) == 2
    assert f"process {os.getpid()}" in capsys.readouterr().err
    lock.release()
    assert main(["--config", config]) == 0


def test_the_best_weights_are_those_that_count_whatever_is_evaluated_from_then_on(
    tmp_path, dataset, monkeypatch
):
    """Killed when best/ was just written, and started again to evaluate less often."""
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "c.yaml",
        tiny_config(dataset, run, eval={"every": "1 steps"}, checkpoint={"every": "100 steps"}),
    )
    steps = []
    write = saving.write_model_folder

    def write_and_die(folder, *arguments, **options):
        write(folder, *arguments, **options)
        steps.append(metric_rows(run)[-1]["step"])
        if len(steps) == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_model_folder", write_and_die)
        with pytest.raises(Killed):
            main(["--config", config])
    assert main(["--config", config, "eval.every=100 steps"]) == 0
    best = json.loads((run / "results.json").read_text())["best"]
    rows = {row["step"]: row for row in metric_rows(run) if "val/loss" in row}
    assert steps[-1] in rows, "what was being judged was judged again"
    assert rows[best["step"]]["val/loss"] == best["loss"]


def test_a_stop_while_waiting_for_data_leaves_the_loss_scale_alone(tmp_path, dataset, monkeypatch):
    """The step that is then spoiled on purpose would else count as one that overflowed."""
    stages = [{"name": "all", "steps": 12, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}]
    init, next_batch = Runtime.__init__, StageTrainer.next_batch

    def with_scaler(self, *arguments, **options):
        init(self, *arguments, **options)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=3)

    def asked(self):
        if self._run.state.step == 6:
            raise StopRequested("stopped while waiting for data")
        return next_batch(self)

    monkeypatch.setattr(Runtime, "__init__", with_scaler)
    configs = []
    for name in ("whole", "stopped"):
        config = tiny_config(dataset, tmp_path / name, stages=stages)
        configs.append(write_config(tmp_path / f"{name}.yaml", config))
    assert main(["--config", configs[0]]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "next_batch", asked)
        assert main(["--config", configs[1]]) == 75
    assert newest_checkpoint(tmp_path / "stopped").name == "step-00000006"
    assert main(["--config", configs[1]]) == 0
    states = []
    for name in ("whole", "stopped"):
        folder = newest_checkpoint(tmp_path / name)
        states.append(json.loads((folder / "state.json").read_text())["scaler"])
    assert states[0] == states[1]
    assert states[0]["scale"] == 1024 * 2**4
    for file in FILES[:2]:
        assert filecmp.cmp(*(newest_checkpoint(tmp_path / n) / file for n in ("whole", "stopped")))


def test_a_disk_that_cannot_be_read_for_a_moment_damages_nothing(tmp_path, dataset, monkeypatch):
    stages = [{"name": "head", "steps": 4, "trainable": "head", "lr": 1e-2}]
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, stages=stages))
    assert main(["--config", config]) == 0
    (run / "results.json").unlink()

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_of", stale)
        assert main(["--config", config]) == 1
    assert main(["--config", config, "run.resume=must"]) == 0
