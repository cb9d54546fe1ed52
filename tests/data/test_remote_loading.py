"""Microbatches of remote data: what is fetched when, and that no pixel depends on it."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from remote_helpers import no_double_downloads, serving
from small_sets import flip_byte, order_of, packed

from rtl_dist.config import AugmentConfig
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.format import dataset as dataset_module
from rtl_dist.data.format.dataset import check_split, open_dataset
from rtl_dist.data.format.description import DESCRIPTION, fingerprint_of
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.images.augment import TrainTransform
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import TrainingMicrobatches
from rtl_dist.data.storage import remote

MICRO, SEED, PER_SHARD = 4, 3, 30


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """360 training images in 12 shards."""
    counts = {"train/ants": 180, "train/bees": 180, "val/ants": 2, "val/bees": 2}
    return packed(tmp_path_factory.mktemp("data"), counts, shard_size=PER_SHARD)


@pytest.fixture
def server(local):
    with serving(Path(local.where)) as server:
        yield server


@pytest.fixture
def copy(local, tmp_path):
    """A server of a copy of the data that a test may damage."""
    shutil.copytree(Path(local.where), tmp_path / "copy")
    with serving(tmp_path / "copy") as server:
        yield server


def opened(server, tmp_path, **limits):
    return open_dataset(server.url, cache_dir=str(tmp_path / "cache"), **limits)


def room_for(dataset, shards):
    return shards * max(s["bytes"] for s in dataset.description["splits"]["train"]["shards"]) / 1e9


def batches_of(split, count, *, workers, window=None, size=MICRO):
    order = order_of(split, seed=SEED, window=window)
    transform = TrainTransform(AugmentConfig(), image_size=8, channels=3)
    source = TrainingMicrobatches(split, transform, order=order, size=size, views=None)
    positions = range(0, count * size, size)
    return make_loader(source, positions, workers=workers, device=torch.device("cpu"))


def pixels(batches):
    return [batch.inputs.clone() for batch in batches]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def first_asked(server):
    return list(dict.fromkeys(request.path for request in server.gets("*.tar")))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_batch_waits_for_its_own_shards_only(local, server, tmp_path, workers):
    split = opened(server, tmp_path).split("train")
    order = order_of(split, seed=SEED)
    needed = {split.shards[n].path for n in order.shards_of(order.samples_at(0, MICRO)[0])}
    assert len(needed) < 12
    for shard in split.shards:
        if shard.path not in needed:
            server.fail(shard.path, "hold")
    batches = iter(batches_of(split, 8, workers=workers))
    first = next(batches).inputs.clone()
    assert set(first_asked(server)) >= needed
    server.mend()
    got = [first, *pixels(batches)]
    assert same(got, pixels(batches_of(local.split("train"), 8, workers=0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_come_before_they_are_needed_in_the_order_of_the_plan(server, tmp_path, workers):
    """While the first is trained on."""
    split = opened(server, tmp_path).split("train")
    order = order_of(split, seed=SEED, window=1)
    assert len(set(order.shards_of(order.samples_at(0, 2 * MICRO)[0]).tolist())) == 1
    batches = iter(batches_of(split, 2, workers=workers, window=1))
    next(batches)
    deadline = time.monotonic() + 20
    while len(first_asked(server)) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert first_asked(server) == [split.shards[n].path for n in order.shards_ahead(0)]
    assert no_double_downloads(server, "*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_smaller_than_the_data_fetches_each_shard_once_an_epoch(
    local, server, tmp_path, workers
):
    split = opened(server, tmp_path, cache_gb=room_for(local, 6)).split("train")
    split.files.require_room(order_of(split, seed=SEED, window=3).most_shards_at_once())
    # microbatches of one, so that workers are not shards apart; two thirds of an epoch
    got = pixels(batches_of(split, 240, size=1, workers=workers, window=3))
    expected = pixels(batches_of(local.split("train"), 240, size=1, workers=0, window=3))
    assert same(got, expected)
    assert no_double_downloads(server, "*.tar")
    assert len(first_asked(server)) >= 8


def test_a_cache_too_small_for_the_order_is_refused(local, server, tmp_path):
    split = opened(server, tmp_path, cache_gb=room_for(local, 4)).split("train")
    with pytest.raises(
        UserError, match=r"data\.cache_gb: .* raise it, or set data\.shuffle=window"
    ):
        split.files.require_room(order_of(split, seed=SEED).most_shards_at_once())


def test_the_order_is_the_same_whatever_is_cached(local, server, tmp_path):
    split = opened(server, tmp_path).split("train")
    for number in (11, 2, 7):
        split.files.try_fetch(number, wait=True)
    expected = pixels(batches_of(local.split("train"), 30, workers=0, window=2))
    assert same(pixels(batches_of(split, 30, workers=2, window=2)), expected)
    server.forget()
    assert same(pixels(batches_of(split, 30, workers=2, window=2)), expected)


# --- what describes the data ---


def test_a_description_is_found_by_its_url_only(server):
    with pytest.raises(DataError, match=r"/nowhere/dataset\.json is not there"):
        open_dataset(f"{server.url}/nowhere")
    assert open_dataset(f"{server.url}/").num_classes == 2


def test_an_altered_index_is_refused(copy, tmp_path):
    path = copy.folder / "index" / "train.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"index/train\.npy was altered"):
        opened(copy, tmp_path).split("train")


@pytest.mark.parametrize("fault", ["truncated", "gone", "longer"])
def test_a_shard_of_another_size_is_found_before_it_is_read(copy, tmp_path, fault):
    dataset = opened(copy, tmp_path)
    path = copy.folder / dataset.split("train").shards[5].path
    if fault == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-512] if fault == "truncated" else content + bytes(512))
    says = {"gone": "is not there", "truncated": "was truncated", "longer": "was altered"}[fault]
    with pytest.raises(DataError, match=rf"{path.name}.* {says}"):
        check_split(dataset, dataset.split("train"))
    assert not [path for path in copy.sent if path.endswith(".tar") and copy.sent[path]]


@pytest.mark.parametrize("path", ["../x.tar", "/etc/passwd", "file:///etc/passwd", "a/../../x"])
def test_a_remote_description_cannot_ask_for_what_is_elsewhere(copy, tmp_path, path):
    change(copy, lambda d: d["splits"]["train"]["shards"][0].update(path=path))
    with pytest.raises(DataError, match="lies outside of the data set"):
        opened(copy, tmp_path).split("train")


@pytest.mark.parametrize("sha256", ["../../../victim", "zz", None, 5])
def test_a_remote_description_cannot_choose_a_files_name(copy, tmp_path, sha256):
    change(copy, lambda d: d["splits"]["train"].update(index_sha256=sha256))
    with pytest.raises(DataError, match=r"checksum|sha256"):
        opened(copy, tmp_path / "a" / "b").split("train")
    assert not list(tmp_path.glob("victim*"))


def change(server, how):
    path = server.folder / DESCRIPTION
    description = json.loads(path.read_text())
    how(description)
    description["fingerprint"] = fingerprint_of(description)
    path.write_text(json.dumps(description))


def test_an_index_deleted_by_another_process_is_fetched_again(server, tmp_path, monkeypatch):
    load, lost = dataset_module.np.load, []

    def load_late(path, **how):
        if not lost:
            lost.append(path)
            path.unlink()
        return load(path, **how)

    monkeypatch.setattr(dataset_module.np, "load", load_late)
    assert opened(server, tmp_path).split("train").num_samples == 360
    assert lost


def test_a_shard_damaged_in_the_cache_is_fetched_anew(server, tmp_path):
    split = opened(server, tmp_path).split("train")
    whole = SampleReader(split).read(7)
    flip_byte(split, 7)  # in its cached copy
    before = len(server.gets("*.tar"))
    assert SampleReader(split).read(7) == whole
    assert len(server.gets("*.tar")) == before + 1
