"""Whether cached activations pay is decided by time, by a try of both, once a stage."""

import dataclasses
import json
import types

import pytest
import torch
from tiny_runs import killed_after, make_dataset, newest_checkpoint, same, train, weights

from rtl_dist.features import maker, trial
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.trial import ImageTimes, is_in_doubt
from rtl_dist.features.view import ViewShape

TOP = {"name": "top", "trainable": "layer3+", "lr": 1e-2, "epochs": 4, "views": 2}
CHANGES = {"stages": [TOP], "checkpoint": {"every": "2 steps", "keep": 9}}
TIMES = ImageTimes(load_s=1e-3, frozen_s=2e-3, train_s=4e-3, write_s=3e-3, read_s=1e-4)
SLOW = dataclasses.replace(TIMES, read_s=1.0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def measured(monkeypatch):
    """Any activations are in doubt; sets what is measured, and counts how often."""
    monkeypatch.setattr(trial, "LEAST_BYTES", 0)
    found = types.SimpleNamespace(times=TIMES, count=0)

    def measure(*_, **__):
        found.count += 1
        return found.times

    monkeypatch.setattr(maker, "measure", measure)
    return found


def is_cached(run) -> bool | None:
    state = json.loads((newest_checkpoint(run) / "state.json").read_text())["state"]
    return state["is_cached"]


def test_what_overlaps_takes_as_long_as_the_slower():
    assert TIMES.afresh_s(100, overlap=True) == pytest.approx(0.6)
    assert TIMES.afresh_s(100, overlap=False) == pytest.approx(0.7)
    assert TIMES.cached_s(100, to_compute=10, overlap=True) == pytest.approx(0.03 + 0.4)
    assert TIMES.cached_s(100, to_compute=10, overlap=False) == pytest.approx(0.06 + 0.41)


@pytest.mark.parametrize(
    ("row", "num_samples", "expected"),
    [((2048,), 10**6, False), ((1024, 14, 14), 10**4, True), ((1024, 14, 14), 600, False)],
    ids=["pooled", "activations", "of few images"],
)
def test_only_activations_of_many_images_are_in_doubt(row, num_samples, expected):
    shape = ViewShape(num_samples=num_samples, row=row, dtype=torch.bfloat16, block_size=64)
    transform = types.SimpleNamespace(channels=3, image_size=224)
    assert is_in_doubt(types.SimpleNamespace(shape=shape, transform=transform)) is expected


@pytest.mark.usefixtures("undrawn", "own_features")
def test_a_stage_is_not_made_slower_and_a_resumed_run_does_as_before(
    tmp_path, dataset, measured, computed, monkeypatch, capsys
):
    cached = train(tmp_path, dataset, "cached", **CHANGES)
    assert (measured.count, is_cached(cached)) == (1, True)
    assert computed == ["train", "train", "val"]
    computed.clear()
    measured.times = SLOW
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with killed_after(5, monkeypatch):
        train(tmp_path, dataset, "afresh", **CHANGES)
    run = tmp_path / "afresh"
    assert (measured.count, is_cached(run)) == (2, False)
    assert "no cached features of train: the stage takes about" in capsys.readouterr().err
    measured.times = TIMES
    train(tmp_path, dataset, "afresh", **CHANGES)
    assert measured.count == 2, "decided once"
    assert computed == []
    assert same(weights(cached), weights(run))


@pytest.mark.usefixtures("undrawn", "own_features")
def test_views_found_are_left_where_reading_them_is_slower(tmp_path, dataset, measured, computed):
    one = train(tmp_path, dataset, "one", **CHANGES)
    computed.clear()
    measured.times = SLOW
    two = train(tmp_path, dataset, "two", **CHANGES)
    assert (measured.count, is_cached(two), computed) == (2, False, [])
    assert same(weights(one), weights(two))


@pytest.mark.usefixtures("undrawn", "own_features")
@pytest.mark.parametrize("memory", [2**40, 0], ids=["from memory", "from the disk"])
def test_all_is_measured_and_nothing_is_left(tmp_path, dataset, monkeypatch, memory):
    monkeypatch.setattr(trial, "LEAST_BYTES", 0)
    monkeypatch.setattr(trial, "available_memory", lambda: memory)
    measure, found = maker.measure, []
    monkeypatch.setattr(
        maker, "measure", lambda *a, **k: found.append(measure(*a, **k)) or found[0]
    )
    folder = tmp_path / "features"
    stages = [{**TOP, "epochs": 1, "views": 1}]
    train(tmp_path, dataset, stages=stages, features={"cache_dir": str(folder)})
    (times,) = found
    assert all(0 < value < 1 for value in dataclasses.astuple(times)), times
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("undrawn", "own_features")
def test_a_try_in_a_full_store_gives_up_none_of_the_stages_views(
    tmp_path, dataset, monkeypatch, computed
):
    monkeypatch.setattr(trial, "LEAST_BYTES", 0)
    measure = maker.measure
    monkeypatch.setattr(maker, "measure", lambda *a, **k: measure(*a, **k) and TIMES)
    folder = tmp_path / "features"
    train(tmp_path, dataset, "one", **CHANGES, features={"cache_dir": str(folder)})
    held = sum(path.stat().st_size for path in folder.glob("*/*"))
    computed.clear()
    full = {"cache_dir": str(folder), "cache_gb": (held + 100) / 1e9}
    two = train(tmp_path, dataset, "two", **CHANGES, features=full)
    assert is_cached(two) is True
    assert "train" not in computed


@pytest.mark.usefixtures("undrawn", "own_features")
def test_a_disk_that_cannot_be_tried_is_not_relied_on(tmp_path, dataset, monkeypatch, capsys):
    monkeypatch.setattr(trial, "LEAST_BYTES", 0)

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FeatureStore, "reserve", fail)
    run = train(tmp_path, dataset, stages=[{**TOP, "epochs": 1, "views": 1}])
    assert is_cached(run) is False
    assert "cannot be written by every process" in capsys.readouterr().err
