"""Stages on several processes: faults of one rank, and the same result at 1, 2 and 4."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from launched_runs import ROOT, environment, finish, start, start_ranks
from safetensors.torch import load_file

from rtl_dist.data.pack import pack

pytestmark = pytest.mark.launch
FAULTY = (str(ROOT / "tests" / "faulty_run.py"),)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """Two stages, 50 steps of 32 images in 4 microbatches, in float64, with BatchNorm in training,
    dropout and mixup; the first trains from cached features and finds its own rate."""
    folder = tmp_path_factory.mktemp("launch")
    pack("digits", folder / "digits", workers=1, show_progress=False)
    content = {
        "seed": 4,
        "data": {"path": str(folder / "digits"), "image_size": 32, "crop_pct": 1.0, "workers": 0,
                 "test": None},
        "model": {"name": "test_resnet", "weights": "none", "dropout": 0.1},
        "stages": [
            {"name": "top", "steps": 42, "trainable": "layer4+", "lr": "auto", "views": 1,
             "batchnorm": "train"},
            {"name": "all", "steps": 8, "trainable": "all", "lr": 3e-3, "batchnorm": "train",
             "augment": {"mixup": 0.2}},
        ],
        "optim": {"ema": 0.9, "loss": "focal"},
        "batch": {"global": 32, "micro": 8},
        "precision": "fp64",
        "checkpoint": {"every": "1 step", "keep": 2},
        "eval": {"every": "25 steps"},
        "track": {"wandb": "off"},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def tensors(run: Path, name: str = "model") -> dict:
    newest = max((run / "checkpoints").glob("step-*"))
    return load_file(newest / f"{name}.safetensors")


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


@pytest.fixture(scope="module")
def runs(config, tmp_path_factory) -> dict[int, Path]:
    """The same job on 1, 2 and 4 processes, each with a feature folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for world_size in (1, 2, 4):
        found[world_size] = folder / str(world_size)
        arguments = ["--config", config, f"run.dir={found[world_size]}"]
        arguments += [f"features.cache_dir={folder / f'features-{world_size}'}"]
        outcomes = [finish(process) for process in start_ranks(arguments, world_size)]
        assert [code for code, _ in outcomes] == [0] * world_size, outcomes
        assert "on cached features from below layer4" in outcomes[0][1]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_processes_gives_the_same_weights(runs, world_size):
    for name in ("model", "ema"):
        one, other = tensors(runs[1], name), tensors(runs[world_size], name)
        assert largest_difference(one, other) < 1e-10  # BatchNorm's statistics, too
    before = [json.loads((runs[n] / "lr_finder" / "top.json").read_text()) for n in (1, world_size)]
    assert before[0]["lr"] == before[1]["lr"]
    assert before[0]["losses"] == pytest.approx(before[1]["losses"], rel=1e-5)


def test_processes_find_each_other_s_features(config, runs, tmp_path):
    features = f"features.cache_dir={runs[1].parent / 'features-1'}"
    arguments = ["--config", config, f"run.dir={tmp_path / 'run'}", features, "stages.1.steps=1",
                 "stages.0.steps=41", "stages.0.lr=1e-3"]  # fmt: skip
    outcomes = [finish(process) for process in start_ranks(arguments, 2)]
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert "cached features found in" in outcomes[0][1]


SHORT = ["stages.0.steps=6", "stages.0.lr=1e-3", "stages.1.steps=4"]


def run_faulty(config: str, run: Path, fault: str, world_size: int) -> list[tuple[int, str]]:
    arguments = [fault, "--config", config, f"run.dir={run}", *SHORT]
    return [finish(process) for process in start_ranks(arguments, world_size, program=FAULTY)]


def test_processes_that_do_not_see_each_other_s_folder_train_without(config, runs, tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from rtl_dist.train import main;"
        " store = os.environ['STORE'] + os.environ['RANK'];"
        " sys.exit(main([*sys.argv[2:], f'features.cache_dir={store}']))"
    )
    arguments = [str(ROOT), "--config", config, f"run.dir={tmp_path / 'run'}", "stages.0.steps=41",
                 "stages.0.lr=1e-3", "stages.1.steps=1"]  # fmt: skip
    os.environ["STORE"] = str(tmp_path / "store")
    try:
        outcomes = [finish(p) for p in start_ranks(arguments, 2, program=("-c", code))]
    finally:
        del os.environ["STORE"]
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert "no cached features of train: " in outcomes[0][1]


@pytest.mark.parametrize("fault", ["nan:7:2", "oom:7:2", "oom:7:3"])
def test_a_fault_of_one_rank_is_everybody_s(config, tmp_path, fault):
    """Rank 1 has microbatches 2 and 3; at 3 the other rank already waits for its gradients."""
    two = run_faulty(config, tmp_path / "two", fault, 2)
    one = run_faulty(config, tmp_path / "one", fault, 1)
    assert [code for code, _ in two + one] == [0, 0, 0], two
    assert "fault fired" in two[1][1]
    assert "fault fired" not in two[0][1]
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    for name in ("skipped_steps", "microbatch_halvings", "samples_seen"):
        assert results[0][name] == results[1][name], name
    if fault.startswith("nan"):
        assert results[0]["skipped_steps"] == 1
    else:
        assert results[0]["microbatch_halvings"] == [{"from_step": 7, "micro": 4}]
    for name in ("model", "ema"):
        difference = largest_difference(tensors(tmp_path / "one", name),
                                        tensors(tmp_path / "two", name))  # fmt: skip
        assert difference < 1e-10


def test_no_memory_while_gradients_are_shared_ends_the_job(config, tmp_path):
    two = run_faulty(config, tmp_path / "two", "oom-backward:7:3", 2)
    assert [code for code, _ in two] == [1, 1], two
    said = "out of memory in step 7, while the ranks exchanged gradients; start the same command"
    assert f"{said} again with batch.micro=4" in two[1][1]
    arguments = ["--config", config, f"run.dir={tmp_path / 'two'}", *SHORT, "batch.micro=4"]
    outcomes = [finish(process) for process in start_ranks(arguments, 2)]
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["microbatch_halvings"] == [{"from_step": 7, "micro": 4}]


def test_the_entry_is_the_same_through_torchrun(config, tmp_path):
    binary = str(Path(sys.executable).parent / "torchrun")
    command = [binary, "--standalone", "--nproc_per_node", "2", *FAULTY, "oom:7:2",
               "--config", config, f"run.dir={tmp_path / 'run'}", *SHORT]  # fmt: skip
    code, output = finish(start(command, environment()))
    assert code == 0, output
    assert "from step 7 on the canonical microbatch is 4" in output
