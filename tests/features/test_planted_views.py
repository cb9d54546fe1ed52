"""Views that somebody changed or planted: compared with what is expected, else computed anew."""

import json
import os
import stat
import zlib

import numpy as np
import pytest
import torch

from rtl_dist.features.seal import Seal, user_secret
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view import ViewShape
from rtl_dist.features.view_files import write_block
from rtl_dist.features.views import key_of

CONTENT = {"weights": "abc", "split": "train", "view": 0, "mean": [0.1, 1e-7]}
KEY = key_of(CONTENT)
ROWS = torch.arange(60, dtype=torch.float32).view(10, 6)
SHAPE = ViewShape(num_samples=10, row=(6,), dtype=torch.float32, block_size=4)
MINE, ANOTHER = Seal(b"m" * 32), Seal(b"a" * 32)


def add(store, rows=ROWS):
    folder = store.reserve(KEY, SHAPE, keep=set())
    sums = [write_block(folder, n, rows[n : n + 4], store.seal) for n in range(0, 10, 4)]
    used = np.arange(10)
    store.publish(folder, KEY, SHAPE, checksums=sums, used=used, bad=[], content=CONTENT)


@pytest.fixture
def store(tmp_path):
    store = FeatureStore(tmp_path / "store", 10**6, MINE)
    add(store)
    return store


def is_taken(store, shape=SHAPE, content=CONTENT):
    return store.believes(KEY, shape, content) and store.is_sound(KEY, rank=0, world_size=1)


def change(store, **changes):
    path = store.root / KEY / "description.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without_seal(store):
    """As an earlier version wrote it."""
    path = store.root / KEY / "description.json"
    content = json.loads(path.read_text())
    for name in ("seal", "sealed_by", "sealed_sums", "used_sealed"):
        del content[name]
    path.write_text(json.dumps(content))


def write_other_features(store):
    """With sums that fit."""
    other = (ROWS + 1).numpy()
    (store.root / KEY / "features.bin").write_bytes(other.tobytes())
    sums = [zlib.crc32(other[n : n + 4].tobytes()) for n in range(0, 10, 4)]
    change(store, checksums=sums)


def write_used(store, used):
    path = store.root / KEY / "used.npy"
    np.save(path, used)
    change(store, used_crc32=zlib.crc32(path.read_bytes()))


def test_what_is_expected_is_taken(store):
    assert is_taken(store)
    assert is_taken(FeatureStore(store.root, 10**6, ANOTHER))  # only this user can write there
    without_seal(store)
    assert is_taken(store)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 8},
        {"row": [3, 2]},
        {"row": [3]},
        {"dtype": "torch.bfloat16"},
        {"block_size": 5},
        {"key": CONTENT | {"weights": "abd"}},
        {"key": None},
        {"bad": ["x"] * 3, "num_samples": 1},
    ],
    ids=str,
)
def test_another_view_than_expected_is_not_taken(store, changes, sealed):
    if not sealed:
        without_seal(store)
    change(store, **changes)
    assert not is_taken(store)
    add_again = FeatureStore(store.root, 10**6, MINE)
    add_again.forget(KEY)
    add(add_again)
    assert is_taken(store)


@pytest.mark.parametrize(
    "used",
    [np.arange(10) + 1, np.arange(9), np.arange(10.0), np.arange(10).reshape(2, 5), -np.arange(10)],
    ids=["above", "fewer", "floats", "matrix", "below"],
)
def test_samples_that_there_are_not_are_not_taken(store, used):
    without_seal(store)
    write_used(store, used)
    assert not is_taken(store)


def test_other_features_with_sums_that_fit_are_noticed(store):
    write_other_features(store)
    assert not is_taken(store)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_where_others_can_write_only_what_this_user_sealed_is_taken(store, mode):
    store.root.chmod(mode)
    assert is_taken(store)
    assert not is_taken(FeatureStore(store.root, 10**6, ANOTHER))
    write_other_features(store)
    assert not is_taken(store)
    without_seal(store)
    assert not is_taken(store)


@pytest.mark.parametrize("name", ["description.json", "used.npy", "features.bin"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_and_pipes_are_not_followed(tmp_path, store, name, kind):
    path, elsewhere = store.root / KEY / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    {"link": lambda: path.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(path),
     "folder": path.mkdir}[kind]()  # fmt: skip
    assert not is_taken(store)


def test_a_link_to_a_view_is_none(tmp_path, store):
    (store.root / KEY).rename(tmp_path / "elsewhere")
    (store.root / KEY).symlink_to(tmp_path / "elsewhere")
    assert not store.has(KEY)
    store.forget(KEY)
    add(store)
    assert is_taken(store)
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == [
        "description.json",
        "features.bin",
        "used.npy",
    ]


def test_a_folder_of_the_users_that_is_called_alike_is_no_view_to_give_up(store):
    mine = store.root / ("0" * 32)
    mine.mkdir()
    (mine / "photo.jpg").write_bytes(b"x" * 1000)
    full = FeatureStore(store.root, SHAPE.num_bytes * 2, MINE)
    full.forget(KEY)
    add(full)
    assert (mine / "photo.jpg").exists()


def test_the_users_secret_is_his_alone_and_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = user_secret()
    assert first == user_secret()
    (path,) = (tmp_path / "rtl_dist").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert user_secret() != first
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert user_secret() != user_secret()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert user_secret() != user_secret()
