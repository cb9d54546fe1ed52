"""Remote data whose copies on this disk were damaged: fetched anew, and not called damaged."""

import json
import shutil

import numpy as np
import pytest
from remote_helpers import serving
from tiny_runs import make_dataset

from rtl_dist.core.errors import DataError
from rtl_dist.data.format.dataset import check_split, open_dataset
from rtl_dist.prepare.verifying.verify import verify


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def server(packed):
    with serving(packed) as server:
        yield server


def opened(server, tmp_path):
    dataset = open_dataset(server.url, cache_dir=str(tmp_path / "cache"), cache_gb=1)
    split = dataset.split("train")
    check_split(dataset, split)
    return split


def cached_index(server, tmp_path):
    entry = json.loads((server.folder / "dataset.json").read_text())["splits"]["train"]
    (path,) = (tmp_path / "cache").glob(f"{entry['index_sha256']}.*")
    return path


def damage(path, how):
    content = bytearray(path.read_bytes())
    match how:
        case "first bit":
            content[0] ^= 1
        case "header":
            content[20] ^= 0x80
        case "row":
            content[-30] ^= 1
        case "cut":
            del content[len(content) // 2 :]
        case "empty":
            content.clear()
        case "grown":
            content += b"x"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["first bit", "header", "row", "cut", "empty", "grown"])
def test_an_index_damaged_in_the_cache_is_fetched_anew(server, tmp_path, how):
    expected = np.array(opened(server, tmp_path).index)
    path = cached_index(server, tmp_path)
    damage(path, how)
    assert np.array_equal(opened(server, tmp_path).index, expected)
    server.forget()
    assert np.array_equal(opened(server, tmp_path).index, expected)
    assert not server.gets("index/*")  # it is there, and whole


@pytest.mark.parametrize("how", ["row", "cut"])
def test_verify_does_not_call_sound_data_damaged(server, packed, tmp_path, how):
    def found():
        at = str(tmp_path / "cache")
        return verify(server.url, workers=1, cache_dir=at, cache_gb=1, show_progress=False)

    assert not found().damage.total
    files = [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert len(files) == 9  # three indices and six shards
    for path in files:
        damage(path, how)
    assert not found().damage.total


def test_an_index_that_the_server_has_otherwise_is_told(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    damage(tmp_path / "copy" / "index" / "train.npy", "row")
    with serving(tmp_path / "copy") as server, pytest.raises(DataError, match="was altered"):
        opened(server, tmp_path)


def test_an_index_of_another_size_than_the_samples_need_is_not_fetched(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    with open(tmp_path / "copy" / "index" / "train.npy", "ab") as file:
        file.truncate(10**7)
    with serving(tmp_path / "copy") as server:
        with pytest.raises(DataError, match=r"index/train\.npy has 10,000,000 bytes, which do not"):
            opened(server, tmp_path)
        assert not server.gets("index/*")
