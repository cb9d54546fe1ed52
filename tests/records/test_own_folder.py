"""``run.dir`` at a folder that is no run, or with files of the user's in it: nothing of his is lost."""

import os

import pytest
from tiny_runs import make_dataset, tiny_config, train, write_config

from rtl_dist.train import main

SHORT = [{"name": "head", "steps": 1, "trainable": "head", "lr": 1e-2}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def contents(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [
        ".tmp_mine",
        ".notes.tmp",
        ".tmpdir/",
        "config.yaml",
        "results.json",
        "checkpoints/",
        "a.jpg",
        "labels/1.txt",
        "heartbeats/mine.json",
        "logs/a.jpg",
    ],
)
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, capsys, dataset, name):
    run = tmp_path / "mine"
    path = run / name
    if name.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    before = contents(run)
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, stages=SHORT))
    assert main(["--config", config]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"run.dir: {run} is no run and not empty (it holds {name.partition('/')[0]})" in line
    assert contents(run) == before


def test_a_data_set_is_no_run(tmp_path, capsys, dataset):
    before = contents(dataset)
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, dataset, stages=SHORT))
    assert main(["--config", config]) == 2
    assert "is no run and not empty" in capsys.readouterr().err
    assert contents(dataset) == before


def test_of_a_run_only_what_killed_writes_left_is_deleted(tmp_path, dataset):
    run = tmp_path / "run"
    of_launchers = ["train.log", "job.o4711", "id_7f/attempt_0/0/stdout.log"]
    of_refused_starts = [".lock", "heartbeats/rank-00001.json"]
    for name in of_launchers + of_refused_starts:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    (run / "logs").mkdir()
    train(tmp_path, dataset, stages=SHORT)
    checkpoints, best = run / "checkpoints", run / "best"
    left = [run / ".config.yaml.12.tmp", run / ".results.json.345.tmp", best / ".tmpAb3xYz"]
    left += [best / ".model.safetensors.12.tmp", run / "heartbeats" / "rank-00007.json"]
    mine = [run / ".tmp_mine", run / ".notes.12.tmp", run / ".config.yaml.old.tmp"]
    mine += [run / ".tmpAb3xYz", run / "heartbeats" / "mine.json", best / ".tmp_mine"]
    for path in left + mine:
        path.write_text("x")
    folders = [run / ".tmpdir", run / ".report.html.1.tmp", checkpoints / ".incomplete-mine"]
    left.append(checkpoints / ".incomplete-step-00000009")
    for folder in [*folders, left[-1]]:
        folder.mkdir()
    train(tmp_path, dataset, stages=SHORT)
    assert [path for path in left if path.exists()] == []
    assert [path for path in mine + folders if not path.exists()] == []


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, capsys, dataset, kind):
    run, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("process 1 on x")
    run.mkdir()
    {
        "link": lambda path: path.symlink_to(precious),
        "pipe": os.mkfifo,
        "folder": os.mkdir,
    }[kind](run / ".lock")
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, run, stages=SHORT))
    assert main(["--config", config]) == 2
    assert "run.dir" in capsys.readouterr().err
    assert precious.read_text() == "process 1 on x"


@pytest.mark.parametrize("name", ["link", "link/below", "file", "file/below", "n" * 300])
def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path, capsys, dataset, name):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / name, stages=SHORT))
    assert main(["--config", config]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run.dir" in line
    assert not (tmp_path / "nowhere").exists()
