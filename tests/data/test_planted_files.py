"""A cache folder in which others have put something under our names: nothing of it is followed."""

import hashlib
import os
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from remote_helpers import serving

from rtl_dist.core.errors import ShardError, UserError
from rtl_dist.data.storage.cache import Cache, RemoteFile

CONTENT = b"a shard" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.tar").write_bytes(CONTENT)
    with serving(tmp_path / "files") as server:
        yield RemoteFile(url=f"{server.url}/a.tar", bytes=len(CONTENT), sha256=SHA256)


@pytest.fixture
def cache(tmp_path):
    return Cache(str(tmp_path / "cache"), gigabytes=1)


def name_of(file, suffix):
    return f"{file.sha256}.{file.bytes}{suffix}"


def plant(kind, path, precious):
    match kind:
        case "link":
            path.symlink_to(precious)
        case "dangling link":
            path.symlink_to(precious.with_name("new"))
        case "second name":
            path.hardlink_to(precious)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()


@pytest.mark.parametrize("suffix", ["", ".part", ".failed"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_what_is_planted_is_not_followed(tmp_path, file, cache, kind, suffix):
    precious = tmp_path / "precious"
    precious.write_bytes(CONTENT)
    plant(kind, cache.folder / name_of(file, suffix), precious)
    with pytest.raises(UserError, match=r"data\.cache_dir: .*remove it, or set data.cache_dir"):
        cache.path(file)
    with pytest.raises(UserError):
        cache.read(file, 0, 10)
    assert precious.read_bytes() == CONTENT
    assert not precious.with_name("new").exists()


def test_a_second_name_of_another_file_is_not_written_to(tmp_path, file, cache):
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    plant("second name", cache.folder / name_of(file, ".part"), precious)
    with pytest.raises(UserError, match="another file's second name"):
        cache.fetch(file)
    assert precious.read_bytes() == b"mine"


def test_a_failure_is_not_told_through_a_link(tmp_path, file, cache):
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    wrong = RemoteFile(url=file.url, bytes=file.bytes, sha256="0" * 64)
    plant("second name", cache.folder / name_of(wrong, ".failed"), precious)
    with pytest.raises(ShardError, match="was altered"):
        cache.fetch(wrong)
    assert precious.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    (tmp_path / "cache").mkdir()
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    plant(kind, tmp_path / "cache" / "room.lock", precious)
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        Cache(str(tmp_path / "cache"))
    assert not precious.with_name("new").exists()


def test_room_is_not_made_of_what_is_planted(tmp_path, file):
    cache = Cache(str(tmp_path / "cache"), gigabytes=1.5 * len(CONTENT) / 1e9)
    for number, kind in enumerate(("link", "pipe", "folder")):
        for suffix in ("", ".part"):
            plant(kind, cache.folder / f"{str(number) * 64}.{len(CONTENT)}{suffix}", tmp_path)
    assert cache.read(file, 0, 10) == CONTENT[:10]
    assert len(list(cache.folder.iterdir())) == 6 + 2


def test_a_folder_where_everybody_may_replace_files_is_refused(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"data\.cache_dir: every user may .*chmod o-w"):
        Cache(str(folder))
    folder.chmod(0o775)  # of a group that works together
    Cache(str(folder))


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of another user's")
@pytest.mark.parametrize("suffix", ["", ".part"])
def test_where_everybody_may_add_files_those_of_others_are_not_read(tmp_path, file, suffix):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o1777)
    cache = Cache(str(folder), gigabytes=1)
    planted = folder / name_of(file, suffix)
    planted.write_bytes(b"x" * len(CONTENT))
    os.chown(planted, 65534, 65534)
    with pytest.raises(UserError, match="is another user's"):
        cache.read(file, 0, 10)
    planted.unlink()
    assert cache.read(file, 0, 10) == CONTENT[:10]


@contextmanager
def as_user(number):
    groups = os.getgroups()
    os.setgroups([2000])
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes the parts of two users")
@pytest.mark.parametrize("suffix", ["", ".part"])
def test_the_users_of_a_groups_folder_share_its_files(file, cache, suffix):
    cache.fetch(file)  # with all imports that it takes
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)  # what is served from here can be read by both
        folder = Path(place, "cache")
        folder.mkdir()
        os.chown(folder, 1001, 2000)
        os.chmod(folder, 0o2775)
        Path(place, "a.tar").write_bytes(CONTENT)
        with serving(Path(place)) as server:
            theirs = replace(file, url=f"{server.url}/a.tar")
            with as_user(1001):
                first = Cache(str(folder), gigabytes=1)
                if suffix:  # he was killed
                    (folder / name_of(file, suffix)).write_bytes(CONTENT[:10])
                else:
                    first.fetch(theirs)
            with as_user(1002):
                assert Cache(str(folder), gigabytes=1).read(theirs, 0, 10) == CONTENT[:10]


def test_a_folder_that_we_make_is_not_for_everybody(tmp_path):
    before = os.umask(0)
    try:
        cache = Cache(str(tmp_path / "cache"))
    finally:
        os.umask(before)
    assert not stat.S_IMODE(cache.folder.stat().st_mode) & stat.S_IWOTH
