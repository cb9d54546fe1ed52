"""Stages on several processes: faults of one rank, and the same result at any number of them."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from faulty_run import Injected
from killed_runs import Exit, Fault, require_done, run_ranks
from safetensors.torch import load_file
from tiny_runs import make_dataset, results

from rtl_dist.model.divided import FrozenPart

pytestmark = pytest.mark.launch
SHORT = ("stages.0.steps=6", "stages.1.steps=4")
CACHED = ("stages.0.steps=15", "stages.1.steps=1")  # long enough to pay


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """Two stages, 20 steps of 32 images in 4 microbatches, in float64, with BatchNorm in training,
    dropout and mixup; the first trains from cached features."""
    folder = tmp_path_factory.mktemp("launch")
    content = {
        "seed": 4,
        "data": {"path": str(make_dataset(folder)), "image_size": 32, "crop_pct": 1.0, "workers": 0,
                 "test": None},
        "model": {"name": "test_resnet", "weights": "none", "dropout": 0.1},
        "stages": [
            {"name": "top", "steps": 16, "trainable": "layer4+", "lr": 1e-3, "views": 1,
             "batchnorm": "train"},
            {"name": "all", "steps": 4, "trainable": "all", "lr": 3e-3, "batchnorm": "train",
             "augment": {"mixup": 0.2}},
        ],
        "optim": {"ema": 0.9, "loss": "focal"},
        "batch": {"global": 32, "micro": 8},
        "precision": "fp64",
        "checkpoint": {"every": "1 step", "keep": 2},
        "eval": {"every": "10 steps"},
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
def runs(config, tmp_path_factory) -> Callable[[int], Path]:
    """The same job by the number of processes, each with a feature folder of its own."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run_of(world_size: int) -> Path:
        features = f"features.cache_dir={folder / f'features-{world_size}'}"
        run = folder / str(world_size)
        run_dir = f"run.dir={run}"
        exits = run_ranks(config, run_dir, features, world_size=world_size)
        require_done(exits)
        assert "on cached features from below layer4" in exits[0].output
        return run

    return run_of


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_any_number_of_processes_gives_the_same_weights(runs, world_size):
    for name in ("model", "ema"):
        one, other = tensors(runs(1), name), tensors(runs(world_size), name)
        assert largest_difference(one, other) < 1e-10  # BatchNorm's statistics, too


def test_processes_find_each_other_s_features(config, runs, tmp_path):
    features = f"features.cache_dir={runs(1).parent / 'features-1'}"
    exits = run_ranks(config, f"run.dir={tmp_path / 'run'}", features, *CACHED, world_size=2)
    require_done(exits)
    assert "cached features found in" in exits[0].output


def run_faulty(config: str, run: Path, fault: str, world_size: int, rank: int) -> list[Exit]:
    kind, step, microbatch = fault.split(":")
    injected = Injected(kind=kind, step=int(step), microbatch=int(microbatch), rank=rank)
    exits = run_ranks(config, f"run.dir={run}", *SHORT, world_size=world_size, fault=injected)
    assert exits[rank].fired
    return exits


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Fault):
    """A rank whose user folder is one of its own, as on another machine."""

    folder: str

    def install(self, mark: int) -> None:
        os.environ["XDG_CACHE_HOME"] = self.folder
        os.write(mark, b"it is elsewhere")


def test_processes_that_do_not_see_each_other_s_folder_train_without(config, tmp_path):
    fault = Elsewhere(rank=1, folder=str(tmp_path / "of rank 1"))
    env = {"XDG_CACHE_HOME": str(tmp_path / "of rank 0")}
    run = f"run.dir={tmp_path / 'run'}"
    exits = run_ranks(config, run, *CACHED, world_size=2, fault=fault, env=env)
    require_done(exits)
    assert exits[1].fired
    assert "no cached features of train: " in exits[0].output


@pytest.mark.parametrize("fault", ["nan:7:2", "oom:7:2", "oom:7:3"])
def test_a_fault_of_one_rank_is_everybody_s(config, tmp_path, fault):
    """Rank 1 has microbatches 2 and 3; at 3 the other rank already waits for its gradients."""
    require_done(run_faulty(config, tmp_path / "two", fault, world_size=2, rank=1))
    require_done(run_faulty(config, tmp_path / "one", fault, world_size=1, rank=0))
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
    two = run_faulty(config, tmp_path / "two", "oom-backward:7:3", world_size=2, rank=1)
    assert [one.code for one in two] == [1, 1], two
    said = "out of memory in step 7, while the ranks exchanged gradients; start the same command"
    assert f"{said} again with batch.micro=4" in two[1].output
    run = f"run.dir={tmp_path / 'two'}"
    require_done(run_ranks(config, run, *SHORT, "batch.micro=4", world_size=2))
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["microbatch_halvings"] == [{"from_step": 7, "micro": 4}]


@dataclass(frozen=True, kw_only=True)
class LittleMemory(Fault):
    """A rank whose device holds no more than ``most`` images outside of training steps."""

    most: int

    def install(self, mark: int) -> None:
        forward, most = FrozenPart.forward, self.most

        def limited(self, images):
            if len(images) > most and not torch.is_grad_enabled():
                os.write(mark, b"fired")
                raise torch.OutOfMemoryError("injected")
            return forward(self, images)

        FrozenPart.forward = limited


@pytest.mark.parametrize("most", [0, 5])
def test_a_rank_of_little_memory_evaluates_in_parts_or_ends_all_alike(tmp_path, config, most):
    rank = 1 if most else 0  # which has the one block of validation images
    features = f"features.cache_dir={tmp_path / 'features'}"  # what others have kept is not found
    exits = run_ranks(
        config, f"run.dir={tmp_path / 'run'}", features, *SHORT,
        f"stages.0.views={1 if most else 'null'}",
        world_size=2, fault=LittleMemory(rank=rank, most=most),
    )  # fmt: skip
    assert exits[rank].fired
    if most:
        require_done(exits)
        # in computing the views, by all ranks
        assert results(tmp_path / "run")["microbatch_halvings"] == [{"from_step": 0, "micro": 4}]
    else:
        assert [one.code for one in exits] == [1, 1]
        assert all("one image at a time; use a smaller model" in one.last_line for one in exits)
