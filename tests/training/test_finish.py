"""A run that came to its end is done, whatever fails in drawing it."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
from killed_runs import run_ranks
from tiny_runs import make_dataset, results, tiny_config, train, write_config

from rtl_dist.report import evaluation, figure, plots, run
from rtl_dist.train import main
from rtl_dist.training import finish

ONE_STAGE = [{"name": "head", "steps": 2, "trainable": "head", "lr": 1e-2}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def short_run(tmp_path, dataset):
    return train(tmp_path, dataset, stages=ONE_STAGE, data__test="test")


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def a_bug(*_, **__):
    raise ZeroDivisionError("by a bug")


def no_memory(*_, **__):
    raise MemoryError


def require_done(folder, capsys, *said):
    """The run is done, and said to be; returns its results."""
    told = capsys.readouterr()
    assert told.out.startswith("done: best val/top1")
    for words in said:
        assert words in told.err
    found = results(folder)
    assert found["status"] == "done"
    assert found["test"]["num_samples"] == 15
    return found


@pytest.mark.parametrize("fault", [no_space, no_memory])
def test_pictures_that_cannot_be_drawn_are_left_out(tmp_path, dataset, monkeypatch, capsys, fault):
    monkeypatch.setattr(figure, "write_bytes", fault)  # of plots, and of the mistakes
    folder = short_run(tmp_path, dataset)
    require_done(folder, capsys, "loss.png could not be drawn", "mistakes.png could not be drawn")
    assert not list(folder.rglob("*.png"))
    page = (folder / "report.html").read_text()
    assert "could not be drawn" in page
    assert "Evaluation on test" in page


def test_one_picture_costs_no_other(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setattr(plots, "loss_figure", a_bug)
    folder = short_run(tmp_path, dataset)
    require_done(folder, capsys, "loss.png could not be drawn (ZeroDivisionError: by a bug, test_")
    assert len(list((folder / "plots").glob("*.png"))) == 3


def test_a_report_that_cannot_be_written_is_drawn_at_the_next_start(
    tmp_path, dataset, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_text", no_space)
        patch.setattr(evaluation, "write_json", no_space)
        folder = short_run(tmp_path, dataset)
    again = f"`rtl-dist evaluate {folder} --data {dataset} --split test` tries again"
    require_done(folder, capsys, "No space left on device", "the run is done all the same", again)
    assert not (folder / "report.html").exists()
    short_run(tmp_path, dataset)
    assert "already done" in capsys.readouterr().out
    assert (folder / "report.html").exists()


def test_a_notebooks_backend_is_not_drawn_with(tmp_path):
    row = {"step": 8, "epoch": 1.0, "stage": "head", "elapsed_s": 2.0, "train/loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 9\nfont.size: 99\n")
    asked = [sys.executable, "-m", "rtl_dist", "report", str(tmp_path)]
    drawn = []
    for more in ({}, {"MPLBACKEND": "module://nowhere", "MATPLOTLIBRC": str(tmp_path)}):
        subprocess.run(asked, env=os.environ | more, check=True, capture_output=True)
        drawn.append((tmp_path / "plots" / "loss.png").read_bytes())
        shutil.rmtree(tmp_path / "plots")
    assert drawn[0] == drawn[1]


def test_a_run_in_a_notebook_ends_with_its_results_and_pictures(tmp_path, dataset):
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run"))
    env = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # which is not installed
    (one,) = run_ranks(config, env=env, draws=True)
    assert one.code == 0, one.output
    assert "could not be drawn" not in one.output
    assert results(tmp_path / "run")["status"] == "done"
    assert (tmp_path / "run" / "plots" / "loss.png").stat().st_size
    assert (tmp_path / "run" / "report.html").exists()


def test_a_finished_run_is_trained_longer_as_it_says(tmp_path, dataset, capsys):
    folder = short_run(tmp_path, dataset)
    cure = f"train on from its best weights in a new run: run.dir={folder}-more model.weights="
    short_run(tmp_path, dataset)
    assert "already done (best val/top1" in (told := capsys.readouterr().out)
    assert cure + str(folder) in told
    assert "calibrate" not in told
    short = {"stages": ONE_STAGE, "data__test": "test", "calibrate__coverage": 0.8}
    train(tmp_path, dataset, **short)
    words = f"rtl-dist calibrate {folder} --data {dataset} --split val --coverage 0.8"
    assert f"`{words}` calibrates it by this one" in capsys.readouterr().out
    longer = [ONE_STAGE[0] | {"steps": 4}]
    train(tmp_path, dataset, code=2, stages=longer, data__test="test")
    undo = f"undo that (--config {folder}/config.yaml has it as it was)"
    assert f"stages.0.steps was 2 and is 4; {undo}, or {cure}" in capsys.readouterr().err
    assert main(["--config", f"{folder}/config.yaml"]) == 0
    assert "already done" in capsys.readouterr().out
    config = {"run__dir": f"{folder}-more", "model__weights": str(folder)}
    train(tmp_path, dataset, stages=longer, **config)
    assert f"weights and head from {folder}/best" in capsys.readouterr().err
    assert results(tmp_path / "run-more")["steps"] == 4


def test_pictures_make_room_for_the_results(tmp_path, dataset, monkeypatch, capsys):
    write = finish.write_json

    def on_a_full_disk(path, content):
        if list(tmp_path.rglob("evaluation/test/*.png")):
            no_space()
        write(path, content)

    monkeypatch.setattr(finish, "write_json", on_a_full_disk)
    folder = short_run(tmp_path, dataset)
    require_done(folder, capsys, "the disk is full: 4 picture(s) make room for results.json")


def test_nothing_is_advised_to_train_on_from_where_nothing_was_reached(tmp_path, dataset, capsys):
    folder = short_run(tmp_path, dataset)
    shutil.rmtree(folder / "best")
    longer = [{"name": "head", "epochs": 3, "trainable": "head", "lr": 0.1}]
    train(tmp_path, dataset, code=2, stages=longer, data__test="test")
    told = capsys.readouterr().err
    assert "stages.0.epochs was None and is 3;" in told
    assert "choose another run.dir" in told
    assert "model.weights=" not in told
