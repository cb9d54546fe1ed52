"""Features on disk: whole or not there, found again, and never more than was allowed."""

import errno
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view import View, ViewShape
from rtl_dist.features.view_files import write_block
from rtl_dist.features.views import key_of

MB = 10**6
DAY = 24 * 3600.0
CONTENT = {"weights": "abc", "split": "train", "view": 0}


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    return FeatureStore(tmp_path / "store", 10 * MB)


def shape_of(rows: torch.Tensor, *, block_size: int = 4) -> ViewShape:
    return ViewShape(
        num_samples=len(rows), row=tuple(rows.shape[1:]), dtype=rows.dtype, block_size=block_size
    )


def features(num_samples: int = 10, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_samples)
    return torch.randn(num_samples, 3, 2, generator=generator).to(dtype)


def written(store: FeatureStore, key: str, rows: torch.Tensor, *, keep=frozenset()) -> Path:
    """A reserved folder with all rows in it, in blocks, the last one first."""
    folder = store.reserve(key, shape_of(rows), keep=set(keep))
    for first in reversed(range(0, len(rows), 4)):
        write_block(folder, first, rows[first : first + 4], store.seal)
    return folder


def publish(store: FeatureStore, folder: Path, key: str, rows: torch.Tensor, **changes) -> None:
    blocks = range(0, len(rows), 4)
    arguments = {
        "checksums": [
            write_block(folder, first, rows[first : first + 4], store.seal) for first in blocks
        ],
        "used": np.arange(len(rows), dtype=np.int64)[::-1].copy(),
        "bad": ["sample 3"],
        "content": CONTENT,
    }
    store.publish(folder, key, shape_of(rows), **(arguments | changes))


def add(store: FeatureStore, content=CONTENT, rows=None, *, keep=frozenset()) -> str:
    """A whole view; returns its key."""
    rows, key = features() if rows is None else rows, key_of(dict(content))
    publish(store, written(store, key, rows, keep=keep), key, rows)
    return key


def is_sound(store: FeatureStore, key: str) -> bool:
    return store.is_sound(key, rank=0, world_size=1)


def names_in(store: FeatureStore) -> set[str]:
    return {path.name for path in store.root.iterdir()}


# --- a round trip ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_samples", [1, 8, 10])
def test_what_was_put_in_comes_out(store, dtype, num_samples):
    rows = features(num_samples, dtype=dtype)
    key = add(store, rows=rows)
    assert is_sound(store, key)
    for found in (store, FeatureStore(store.root, 10 * MB)):  # and again by a later run
        assert found.has(key)
        view = found.open(key)
        assert isinstance(view, View)
        assert view.features.dtype == dtype
        assert torch.equal(view.features, rows)
        assert view.used.tolist() == list(reversed(range(num_samples)))
        assert view.bad == ["sample 3"]
    assert names_in(store) == {key}


def test_activations_that_lie_channels_last_come_out_as_they_are(store):
    rows = torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last)
    key = add(store, rows=rows)
    assert torch.equal(store.open(key).features, rows)


def test_what_a_reader_changes_stays_with_it(store):
    key = add(store)
    store.open(key).features.zero_()
    assert is_sound(store, key)
    assert torch.equal(store.open(key).features, features())


def test_any_difference_gives_another_key():
    keys = {key_of(CONTENT)}
    for change in ({"weights": "abd"}, {"view": 1}, {"view": None}, {"view": "0"}, {"more": 0},
                   {"split": {"train": 1}}):  # fmt: skip
        keys.add(key_of(CONTENT | change))
    assert len(keys) == 7
    assert key_of(dict(reversed(CONTENT.items()))) in keys  # their order is none


def test_it_is_not_there_before_it_is_whole(store):
    key = key_of(CONTENT)
    assert not store.has(key)
    folder = written(store, key, features())
    assert not store.has(key)
    publish(store, folder, key, features())
    assert store.has(key)
    store.forget(key)
    assert not store.has(key)
    assert names_in(store) == set()
    store.forget(key)  # twice is no harm
    add(store)


# --- damage ----------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x08
    path.write_bytes(content)


def test_any_damaged_byte_is_noticed(store):
    key = add(store)
    for name in ("features.bin", "used.npy"):
        path = store.root / key / name
        whole = path.read_bytes()
        for position in range(len(whole)):
            flip(path, position)
            assert not is_sound(store, key), (name, position)
            path.write_bytes(whole)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert not is_sound(store, key), (name, length)
            path.write_bytes(whole)
        path.unlink()
        assert not is_sound(store, key)
        path.write_bytes(whole)
    assert is_sound(store, key)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 9},
        {"num_samples": "10"},
        {"num_samples": 10**30},
        {"row": [3, 3]},
        {"row": None},
        {"dtype": "torch.float64"},
        {"dtype": "torch.int8"},
        {"block_size": 0},
        {"block_size": 5},
        {"checksums": []},
        {"checksums": None},
        {"used_crc32": 1},
    ],
    ids=str,
)
def test_a_description_that_is_wrong_is_noticed(store, change):
    key = add(store)
    path = store.root / key / "description.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert not is_sound(store, key)


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe"])
def test_a_description_that_is_none_is_noticed(store, content):
    key = add(store)
    (store.root / key / "description.json").write_bytes(content)
    assert not is_sound(store, key)


def test_each_rank_looks_at_blocks_of_its_own(store):
    key = add(store)  # blocks of 4, 4 and 2 rows of 24 bytes
    flip(store.root / key / "features.bin", 5 * 24)
    assert [store.is_sound(key, rank=rank, world_size=3) for rank in range(3)] == [
        True,
        False,
        True,
    ]
    assert [store.is_sound(key, rank=rank, world_size=2) for rank in range(2)] == [True, False]


def test_blocks_are_read_in_pieces(store, monkeypatch):
    key = add(store)
    monkeypatch.setattr("rtl_dist.features.view_files.CHUNK_BYTES", 7)
    assert is_sound(store, key)
    flip(store.root / key / "features.bin", -1)
    assert not is_sound(store, key)


# --- room ------------------------------------------------------------------------------------


def big(megabytes: float) -> torch.Tensor:
    return torch.zeros(int(megabytes * MB) // 1024, 254)  # 1016 bytes, and 8 of ``used``


def numbered(number: int) -> dict[str, int]:
    return {"view": number}


def age(store: FeatureStore, name: str, seconds: float) -> None:
    """Makes it look as if nobody had used it for so long."""
    then = time.time() - seconds
    for path in (*(store.root / name).iterdir(), store.root / name):
        os.utime(path, (then, then))


def test_the_least_recently_used_go_first(store):
    keys = [add(store, numbered(n), big(3)) for n in range(3)]
    for number, key in enumerate(keys):
        age(store, key, 100 - number)
    store.open(keys[0])  # used again
    new = add(store, numbered(3), big(3))
    assert names_in(store) == {keys[0], keys[2], new}
    assert sum(path.stat().st_size for path in store.root.rglob("*")) < 10 * MB


def test_no_more_go_than_need_to(store):
    keys = [add(store, numbered(n), big(3)) for n in range(3)]
    add(store, numbered(3), big(0.5))
    assert set(keys) < names_in(store)


def test_what_is_needed_now_stays(store):
    keys = [add(store, numbered(n), big(3)) for n in range(3)]
    for number, key in enumerate(keys):
        age(store, key, 100 - number)
    new = add(store, numbered(3), big(3), keep={keys[0], keys[1]})
    assert names_in(store) == {keys[0], keys[1], new}


def test_the_limit_holds_for_all_that_is_needed_together(store):
    first, other = (add(store, numbered(n), big(4)) for n in range(2))
    with pytest.raises(OSError, match="would be in use at once") as caught:
        store.reserve(key_of(numbered(2)), shape_of(big(7)), keep={first})
    assert caught.value.errno == errno.ENOSPC
    assert names_in(store) == {first, other}  # nothing was given up in vain


def test_folders_that_others_are_writing_stay_and_abandoned_ones_go(store):
    fresh, old = (written(store, key_of(numbered(n)), big(4)) for n in range(2))
    age(store, old.name, 2 * DAY)
    # only its files show that a long computation goes on
    os.utime(fresh, (time.time() - 2 * DAY,) * 2)
    new = add(store, numbered(2), big(6))
    assert names_in(store) == {fresh.name, new}
    with pytest.raises(OSError, match="would be in use at once"):  # what another run is writing
        store.reserve(key_of(numbered(3)), shape_of(big(7)), keep=set())
    assert names_in(store) == {fresh.name, new}


def test_what_a_run_killed_while_it_cleared_up_has_left_goes_later(store, monkeypatch):
    abandoned = written(store, key_of(numbered(0)), big(6))
    age(store, abandoned.name, 2 * DAY)
    with monkeypatch.context() as patch:
        patch.setattr("rtl_dist.core.whole_folder.shutil.rmtree", lambda *_, **__: None)
        add(store, numbered(1), big(6))
    left = names_in(store) - {key_of(numbered(1))}
    assert all(name.startswith(".gone-") for name in left)
    age(store, *left, 2 * DAY)
    new = add(store, numbered(2), big(6))
    assert names_in(store) == {new}


def test_what_is_not_the_store_s_is_left_alone(store):
    photos = store.root / "photos"
    photos.mkdir(parents=True)
    (photos / "1.jpg").write_bytes(bytes(9 * MB))
    (store.root / "notes.txt").write_text("mine")
    os.utime(photos, (0, 0))
    keys = [add(store, numbered(n), big(4)) for n in range(3)]
    assert (photos / "1.jpg").exists()
    assert names_in(store) == {"photos", "notes.txt", *keys[1:]}


def test_too_much_is_refused_with_the_reason(store, monkeypatch):
    assert store.why_no_room(keep=set(), num_bytes=10 * MB) is None
    assert store.why_no_room(keep=set(), num_bytes=10 * MB + 1) == (
        "10.0 MB are more than features.cache_gb allows (10.0 MB)"
    )
    usage = shutil._ntuple_diskusage(100 * MB, 95 * MB, 5 * MB)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert (
        store.why_no_room(keep=set(), num_bytes=4 * MB) is None
    )  # a tenth of what is free is left
    assert (
        store.why_no_room(keep=set(), num_bytes=6 * MB)
        == f"6.0 MB are more than {store.root} has room for"
    )
    add(store, rows=big(3))
    assert store.why_no_room(keep=set(), num_bytes=6 * MB) is None  # it would be given up


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root, to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_is_met_when_room_is_reserved(small_disk):
    store = FeatureStore(small_disk / "store", 100 * MB)
    assert "has room for" in store.why_no_room(keep=set(), num_bytes=2 * MB)
    with pytest.raises(OSError, match="No space left") as caught:
        store.reserve(key_of(CONTENT), shape_of(big(2)), keep=set())
    assert caught.value.errno == errno.ENOSPC
    assert names_in(store) == set()
    key = add(store, rows=big(0.5))
    assert is_sound(store, key)


def test_reserving_leaves_nothing_where_it_fails(store, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", fail)
    with pytest.raises(OSError, match="No space left"):
        store.reserve(key_of(CONTENT), shape_of(features()), keep=set())
    assert names_in(store) == set()


def test_a_reserved_folder_really_has_its_room(store):
    folder = store.reserve(key_of(CONTENT), shape_of(big(2)), keep=set())
    stat = (folder / "features.bin").stat()
    assert stat.st_blocks * 512 >= stat.st_size > 1.9 * MB


# --- publishing ------------------------------------------------------------------------------


def test_two_runs_may_make_the_same(store):
    key, rows = key_of(CONTENT), features()
    mine, theirs = written(store, key, rows), written(store, key, rows)
    publish(store, theirs, key, rows)
    publish(store, mine, key, rows, bad=["the second"])
    assert names_in(store) == {key}
    assert is_sound(store, key)
    assert store.open(key).bad == ["sample 3"]


@pytest.mark.parametrize("step", ["core.whole_folder.flush_to_disk", "features.store.np.save"])
def test_publishing_that_fails_leaves_nothing(store, monkeypatch, step):
    key, rows = key_of(CONTENT), features()
    folder = written(store, key, rows)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"rtl_dist.{step}", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(store, folder, key, rows)
    assert names_in(store) == set()


@pytest.mark.parametrize("how", ["given up", "forgotten"])
def test_half_a_view_never_stays_under_its_key(store, monkeypatch, how):
    """Killed while it deletes a view, a run leaves no folder that keeps a new one from its place."""
    key = add(store, rows=big(6))

    class Killed(BaseException):
        pass

    def kill(path, **_):
        os.unlink(path / "description.json")
        raise Killed

    deletions = {
        "forgotten": lambda: store.forget(key),
        "given up": lambda: store.reserve(key_of(numbered(1)), shape_of(big(6)), keep=set()),
    }
    with monkeypatch.context() as killing:
        killing.setattr("rtl_dist.core.whole_folder.shutil.rmtree", kill)
        with pytest.raises(Killed):
            deletions[how]()
    assert not (store.root / key).exists()
    assert add(store, rows=big(6)) == key
    assert is_sound(store, key)


# --- folders that cannot be used -------------------------------------------------------------


def test_a_file_in_the_folder_s_place_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        store = FeatureStore(root, 10 * MB)
        assert not store.has(key_of(CONTENT))
        assert not is_sound(store, key_of(CONTENT))
        why = store.why_no_room(keep=set(), num_bytes=1000)
        assert why in (f"{root} cannot be used (File exists)",
                       f"{root} cannot be used (Not a directory)")  # fmt: skip
        with pytest.raises(OSError):
            store.reserve(key_of(CONTENT), shape_of(features()), keep=set())


@pytest.mark.skipif(os.getuid() == 0, reason="root may do anything")
def test_a_folder_without_permission_is_told(store):
    key = add(store)
    store.root.chmod(0o000)
    try:
        assert not store.has(key)
        assert "cannot be used (Permission denied)" in store.why_no_room(keep=set(), num_bytes=1000)
    finally:
        store.root.chmod(0o700)
