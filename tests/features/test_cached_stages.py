"""Stages that train on cached features: found, made, shared, and done without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched_runs import SCRIPT, environment
from tiny_runs import (
    make_dataset,
    metric_rows,
    same,
    tiny_config,
    train,
    weights,
    write_config,
)

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
ALL = {"name": "all", "trainable": "all", "lr": 1e-2, "batchnorm": "train"}
HEAD = {"name": "head", "trainable": "head", "lr": 1e-2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


CACHED = {"stages": [{**HEAD, "epochs": 4, "views": 2}]}


def test_damaged_features_are_computed_again(tmp_path, dataset, computed, capsys):
    folder = tmp_path / "features"
    one = train(tmp_path, dataset, "one", **CACHED, features={"cache_dir": str(folder)})
    assert len(computed) == 3
    for file in folder.glob("*/features.bin"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    two = train(tmp_path, dataset, "two", **CACHED, features={"cache_dir": str(folder)})
    assert len(computed) == 6
    assert "are damaged; computing them again" in capsys.readouterr().err
    assert same(weights(one), weights(two))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_features_of_another_user_of_the_folder_are_left_alone(tmp_path, dataset, capsys):
    folder = tmp_path / "features"
    settings = {"features": {"cache_dir": str(folder)}, **CACHED}
    one = train(tmp_path, dataset, "one", **settings)
    folder.chmod(0o775)
    for view in folder.iterdir():
        description = json.loads((view / "description.json").read_text())
        (view / "description.json").write_text(json.dumps(description | {"seal": "his"}))
        os.chown(view, 65534, 65534)
    before = sorted(folder.rglob("*"))
    two = train(tmp_path, dataset, "two", **settings)
    assert "is another user's" in (told := capsys.readouterr().err)
    assert "set features.cache_dir to a folder of your own" in told
    assert sorted(folder.rglob("*")) == before
    assert same(weights(one), weights(two))


@pytest.mark.parametrize("change", ["weights", "augment", "seed", "image_size", "data"])
def test_features_of_something_else_are_not_taken(tmp_path, dataset, computed, change):
    train(tmp_path, dataset, "one", **CACHED)
    assert len(computed) == 3
    other = {
        "weights": {"model": {"name": "basic_cnn", "weights": str(tmp_path / "one")}},
        "augment": {"augment": {"hflip": 0.0}},
        "seed": {"seed": 6},
        "image_size": {"stages": [{**CACHED["stages"][0], "image_size": 8}]},
        "data": {},
    }[change]
    data = dataset if change != "data" else make_dataset_of_another_seed(tmp_path)
    if change == "weights":  # the trunk of another seed, but the run's own seed for the views
        train(tmp_path, dataset, "one", seed=6, run__dir=str(tmp_path / "other"), **CACHED)
        other["model"]["weights"] = str(tmp_path / "other")
    computed.clear()
    train(tmp_path, data, "two", **(CACHED | other))
    # a change of the training's looks leaves the validation images as they were; those of the
    # other weights were met when these were trained
    seen = ("augment", "image_size", "weights")
    expected = ["train", "train"] + ([] if change in seen else ["val"])
    assert sorted(computed) == expected


def make_dataset_of_another_seed(tmp_path: Path) -> Path:
    from tiny_runs import write_images

    from rtl_dist.prepare.packing.pack import pack

    images = write_images(tmp_path / "images", {"train": 19, "val": 7, "test": 5}, seed=1)
    pack(str(images), tmp_path / "packed", shard_size=20, workers=1, show_progress=False)
    return tmp_path / "packed"


def test_networks_with_the_same_weights_have_features_of_their_own(tmp_path, dataset, computed):
    """resnetaa50 is a resnet50 with blurred strides: the same names and shapes, other features."""
    from rtl_dist.config import DataConfig, ModelConfig
    from rtl_dist.core.files import save_tensors
    from rtl_dist.model.build import make_classifier

    model = make_classifier(
        ModelConfig(name="resnet50", weights="none"), DataConfig(path=""), num_classes=3, seed=0
    )
    save_tensors(model.native_state_dict(), tmp_path / "w.safetensors")
    for name in ("resnet50", "resnetaa50"):
        computed.clear()
        config = {"name": name, "weights": str(tmp_path / "w.safetensors")}
        train(tmp_path, dataset, name, model=config, stages=[{**HEAD, "epochs": 1, "views": 1}],
              data__image_size=32)  # fmt: skip
        assert sorted(computed) == ["train", "val"], name


def test_a_ledger_of_cached_activations(tmp_path, dataset):
    stage = {**ALL, "trainable": "layer2+", "epochs": 4, "views": 1}
    run = train(tmp_path, dataset, stages=[stage], run__ledger=True, precision="bf16")
    lines = [json.loads(x) for x in (run / "ledger/samples.jsonl").read_text().splitlines()]
    assert {line["pixels_crc32"] for line in lines} == {None}
    assert len(lines) == 4 * metric_rows(run)[-1]["step"]


def test_a_view_that_another_run_makes_meanwhile_is_taken(tmp_path, dataset, computed, monkeypatch):
    """The other run publishes both views while this one computes the first."""
    import rtl_dist.features.writing as room

    folder = str(tmp_path / "features")
    write, raced = room.write_block, []

    def race(*arguments):
        if not raced:
            raced.append(True)
            config = tiny_config(
                dataset, tmp_path / "other", **CACHED, features={"cache_dir": folder}
            )
            file = write_config(tmp_path / "other.yaml", config)
            done = subprocess.run([sys.executable, SCRIPT, "--config", file], env=environment())
            assert done.returncode == 0
        return write(*arguments)

    monkeypatch.setattr(room, "write_block", race)
    run = train(tmp_path, dataset, **CACHED, features={"cache_dir": folder})
    assert computed == ["train"]  # the other one was there by then, and the val split's
    assert same(weights(run), weights(tmp_path / "other"))
    names = [path.name for path in (tmp_path / "features").iterdir()]
    assert len(names) == 3
    assert not any(name.startswith(".") for name in names)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"cache_gb": 1e-6, "cache_dir": "features"}, "more than features.cache_gb allows"),
        ({"cache_dir": "/dev/null/x"}, "cannot be used"),
    ],
)
def test_without_room_the_head_is_trained_all_the_same(
    tmp_path, dataset, computed, capsys, monkeypatch, features, message
):
    monkeypatch.chdir(tmp_path)
    cached = train(tmp_path, dataset, "cached", **CACHED)
    computed.clear()
    run = train(tmp_path, dataset, **CACHED, features=features)
    assert computed == []
    assert message in capsys.readouterr().err
    assert same(weights(run), weights(cached))


def test_a_disk_that_fails_while_features_are_written(tmp_path, dataset, monkeypatch, capsys):
    import rtl_dist.features.writing as room

    cached = train(tmp_path, dataset, "cached", **CACHED)
    fired = []

    def fail(*_: object) -> int:
        fired.append(True)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(room, "write_block", fail)
    folder = tmp_path / "features"
    run = train(tmp_path, dataset, **CACHED, features={"cache_dir": str(folder)})
    assert fired
    assert "no cached features of train: " in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    assert same(weights(run), weights(cached))


def test_a_few_steps_are_not_worth_a_whole_view(tmp_path, dataset, computed):
    train(tmp_path, dataset, stages=[{**HEAD, "epochs": 0.5, "views": 1}])
    assert computed == ["val"]


def test_a_stop_while_features_are_computed_keeps_whole_views(
    tmp_path, dataset, computed, monkeypatch
):
    import os
    import signal

    import rtl_dist.features.writing as room

    write, blocks = room.write_block, []

    def ask_and_write(*arguments: object) -> int:
        blocks.append(True)
        if len(blocks) == 20:  # of 15 a view
            os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(room, "write_block", ask_and_write)
        train(tmp_path, dataset, code=75, **CACHED)
    assert computed == ["train", "train"]
    computed.clear()
    train(tmp_path, dataset, **CACHED)
    assert sorted(computed) == ["train", "val"]
