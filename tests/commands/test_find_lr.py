"""``rtl-dist find-lr``: a range test without training, and nothing else touched."""

import json
import re

import pytest
from killed_runs import require_done, run_command
from report_helpers import assert_drawn, assert_no_leftovers
from tiny_runs import make_dataset, tiny_config, write_config

from rtl_dist.cli import main


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path, dataset):
    return write_config(tmp_path / "tiny.yaml", tiny_config(dataset, tmp_path / "run"))


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr("rtl_dist.training.lr_finder.STEPS", 8)


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def found_in(folder, stage):
    return json.loads((folder / "lr_finder" / f"{stage}.json").read_text())


def test_it_says_what_it_found_and_draws_it(tmp_path, config, capsys):
    assert main(["find-lr", "--config", config]) == 0
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    folder = tmp_path / "run-find-lr"
    picture = folder / "plots" / "lr_finder_head.png"
    assert_drawn(picture)
    assert str(picture) in last_line
    assert not (tmp_path / "run").exists()

    found = found_in(folder, "head")
    told = float(re.search(r"holds up to (\S+),", last_line)[1])
    assert told == pytest.approx(found["holds_up_to"], rel=0.06)
    assert "solved" not in last_line


@pytest.mark.usefixtures("few_steps")
def test_a_stage_of_its_name_from_a_runs_weights_leaves_the_run_alone(tmp_path, config, capsys):
    run = tmp_path / "run"
    assert main(["train", "--config", config]) == 0
    before = content_of(run)
    arguments = ["find-lr", "--config", config, f"model.weights={run}", "--stage", "top"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1].startswith("stage top: as the rate grows")
    assert f"weights and head from {run}" in output.err
    assert content_of(run) == before
    assert found_in(tmp_path / "run-find-lr", "top")["stage"] == "top"
    assert not (tmp_path / "run-find-lr" / "checkpoints").exists()
    assert main(["train", "--config", config]) == 0
    assert "already done" in capsys.readouterr().out


@pytest.mark.usefixtures("few_steps")
def test_a_repeat_replaces_what_was_found(tmp_path, config):
    folder = tmp_path / "run-find-lr"
    assert main(["find-lr", "--config", config]) == 0
    first = found_in(folder, "head")
    assert main(["find-lr", "--config", config, "seed=6"]) == 0
    assert found_in(folder, "head") != first
    assert_no_leftovers(folder)


def test_a_loss_that_is_never_a_number_is_told(tmp_path, config, capsys, monkeypatch):
    monkeypatch.setattr("rtl_dist.training.lr_finder.non_finite", lambda counts: 1)
    assert main(["find-lr", "--config", config]) == 1
    assert "stage head: the loss is a number at no learning rate" in capsys.readouterr().err
    assert found_in(tmp_path / "run-find-lr", "head")["holds_up_to"] is None
    results = tmp_path / "run-find-lr" / "results.json"
    assert json.loads(results.read_text())["status"] == "failed"
    monkeypatch.undo()
    monkeypatch.setattr("rtl_dist.training.lr_finder.STEPS", 8)
    assert main(["find-lr", "--config", config, "run.resume=never"]) == 0
    assert not results.exists()


def test_a_stage_that_is_not_there_is_refused_before_anything_is_made(tmp_path, config, capsys):
    assert main(["find-lr", "--config", config, "--stage", "tpo"]) == 2
    error = capsys.readouterr().err
    assert "no stage 'tpo'; it has head, top, all" in error
    assert not list(tmp_path.glob("run*"))


@pytest.mark.usefixtures("few_steps")
def test_a_stage_without_steps_is_passed_over_or_refused(tmp_path, config, capsys):
    solved = ["stages.0.solve=true", "stages.0.steps=0"]
    assert main(["find-lr", "--config", config, *solved, "--stage", "head"]) == 2
    error = capsys.readouterr().err
    assert "--stage: stage head is solved and takes no steps" in error
    assert "those that take some: top, all" in error
    assert not list(tmp_path.glob("run*"))
    assert main(["find-lr", "--config", config, *solved]) == 0
    assert "stage top: as the rate grows" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("stage", ["head", "all"])
def test_a_head_that_is_solved_first_is_solved_first(tmp_path, dataset, stage, capsys):
    """Steps too small to matter, so all losses are of the model that they begin with."""
    ahead = {"name": "head", "trainable": "head", "solve": True}
    after = {"name": "all", "trainable": "all", "steps": 4, "lr": 1e-3}
    losses = {}
    for solve in (True, False):
        stages = [{**ahead, "solve": solve, "steps": 4, "lr": 1e-3}]
        if stage == "all":
            stages = [ahead, after] if solve else [after]
        run = tmp_path / f"{solve}"
        content = tiny_config(dataset, run, stages=stages, precision="no")
        config = write_config(tmp_path / "c.yaml", content)
        assert main(["find-lr", "--config", config, "--stage", stage]) == 0
        output = capsys.readouterr()
        assert ("head solved" in output.err) == solve
        assert ("from a solved head" in output.out) == solve
        losses[solve] = found_in(tmp_path / f"{solve}-find-lr", stage)["losses"]
    assert max(losses[True][:2]) < 0.7 * min(losses[False][:2])


def test_a_config_without_steps_has_no_rate_to_find(tmp_path, dataset, capsys):
    stages = [{"name": "head", "trainable": "head", "solve": True}]
    content = tiny_config(dataset, tmp_path / "run", stages=stages)
    config = write_config(tmp_path / "solved.yaml", content)
    assert main(["find-lr", "--config", config]) == 2
    assert "--stage: no stage of the config takes steps" in capsys.readouterr().err
    assert not list(tmp_path.glob("run*"))


def test_a_folder_of_a_training_is_refused(tmp_path, config, capsys):
    training = tmp_path / "run-find-lr" / "checkpoints" / "step-00000001"
    training.mkdir(parents=True)
    (training / "manifest.json").write_text("{}")
    assert main(["find-lr", "--config", config]) == 2
    assert "holds a training run; choose another run.dir" in capsys.readouterr().err


@pytest.mark.launch
def test_two_processes_find_the_rate_of_one(tmp_path, config, capsys):
    assert main(["find-lr", "--config", config, "precision=fp64"]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    arguments = ["find-lr", "--config", config, "precision=fp64", f"run.dir={tmp_path / 'two'}"]
    exits = run_command(arguments, world_size=2)
    require_done(exits)
    assert exits[0].last_line == line.replace(str(tmp_path / "run"), str(tmp_path / "two"))
    assert "as the rate grows" not in exits[1].output
    one, two = (found_in(tmp_path / f"{name}-find-lr", "head") for name in ("run", "two"))
    assert two["rates"] == one["rates"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
