"""Benchmarks run: those that can in seconds at their smallest, of the others the arguments."""

import re
import runpy
import subprocess
import sys

import pytest
from pack_images import class_folders
from tiny_runs import ROOT

BENCHMARKS = ROOT / "benchmarks"
SMALLEST = {
    "cached_activations.py": "--images 32 --batch 4 --row 8 4 4 --rounds 1 --use-ms 0",
    "checkpoint.py": "--rounds 1 --model test_resnet",
    "export_formats.py": "--rounds 1 --formats timm",
    "loader.py": "--images {images} --sides ours --repeats 1 --batches 1 --workers 1",
    "predict.py": "--images 64 --side 32 --repeats 1 --model basic_cnn --workers 0",
    "scale.py": "--shards 5000",
    "shuffle.py": "",
    "step_operations.py": "--network resnet18 --most 3",
}
SLOW = {"loader.py", "step_operations.py"}
# They start others, are of others, or train for minutes.
TOO_LONG = {
    "accuracy.py",
    "fastai_loop.py",
    "finetune_step.py",
    "frozen_loop.py",
    "gpu_acceptance.py",
    "head_stage.py",
    "hymenoptera.py",
    "lightning_loop.py",
    "logistic_regression.py",
    "practitioner_loop.py",
    "score_ours.py",
    "startup.py",
    "time_to_accuracy.py",
    "tutorial_loop.py",
}
IMPORTED = {
    "accuracy_figures.py",
    "accuracy_methods.py",
    "accuracy_sets.py",
    "accuracy_sources.py",
    "accuracy_table.py",
    "device_operations.py",
    "gpu_checks.py",
    "gpu_findings.py",
    "gpu_place.py",
    "gpu_ranks.py",
    "gpu_speed.py",
    "loop_data.py",
    "near_copies.py",
    "processes.py",
    "spread.py",
    "scores.py",
    "sides.py",
    "step_sides.py",
}
OF_OTHERS = {"fastai_loop.py": "fastai", "lightning_loop.py": "lightning"}


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


def test_each_benchmark_is_here():
    own_test = {"png_decoders.py", "png_files.py"}
    known = SMALLEST.keys() | TOO_LONG | IMPORTED | own_test
    assert known == {path.name for path in BENCHMARKS.glob("*.py")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive) if name in SLOW else name
        for name in SMALLEST
    ],
)
def test_it_runs(tmp_path, monkeypatch, capsys, name):
    class_folders(tmp_path / "images", {"ants": 4, "bees": 4}, "JPEG")
    run(name, monkeypatch, *SMALLEST[name].format(images=tmp_path / "images").split())
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(TOO_LONG))
def test_it_says_how_it_is_called(monkeypatch, capsys, name):
    if name in OF_OTHERS:
        pytest.importorskip(OF_OTHERS[name])
    with pytest.raises(SystemExit) as left:
        run(name, monkeypatch, "--help")
    assert left.value.code == 0
    assert "--" in capsys.readouterr().out


def test_png_decoders(tmp_path):
    images = class_folders(tmp_path / "images", {"a": 2})
    arguments = ["--small", images, "--photos", images, "--damages", "60", "--rounds", "1"]
    arguments += ["--images", "2", "--bomb-pixels", "10000"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "png_decoders.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pixels, 3 channel(s)" not in done.stdout, "as colour both decode alike"
    for side in ("checked", "pillow"):
        (line,) = re.findall(rf"^damage, {side} +of 60: (.*); slowest", done.stdout, re.MULTILINE)
        assert "CRASH" not in line
        assert "Error" not in line, "only a DataError may come out"
        counts = [int(count) for count in re.findall(r"(?:^|, )(\d+) ", line)]
        assert sum(counts) == 60
    assert len(re.findall(r"^    checked .* (?:decoded|refused)$", done.stdout, re.MULTILINE)) == 10
    assert len(re.findall(r"^cost, ", done.stdout, re.MULTILINE)) == 2 * 2 * 3
