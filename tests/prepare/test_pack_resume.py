"""A pack that is killed loses nothing but the shards in hand, and ends in the same bytes."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from pack_images import class_folders, files_of, image_bytes

from rtl_dist.core.errors import DataError, RtlDistError, UserError
from rtl_dist.prepare.packing.pack import pack


@pytest.fixture
def source(tmp_path):
    folder = class_folders(
        tmp_path / "source", {"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2}
    )
    (folder / "train" / "a" / "x.gif").write_bytes(image_bytes(1, kind="GIF"))
    return folder


@pytest.fixture
def no_fsync(monkeypatch):
    """These tests kill processes, not machines, and a real fsync takes most of their time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def shards_of(out):
    """path -> (inode, mtime) of the shards that have their final name."""
    return {
        path.relative_to(out).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in out.glob("*/*.tar")
    }


def pack_until_killed(source, out, at, **options):
    """Packs in another process that SIGKILLs itself just before its ``at``-th file operation.

    Returns:
        Whether it got that far.
    """

    def body():
        count = [0]

        def deadly(function):
            def call(*args, **kwargs):
                if count[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                return function(*args, **kwargs)

            return call

        # each of these is a moment at which what is on disk changes
        os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
        os.rmdir, os.unlink = deadly(os.rmdir), deadly(os.unlink)
        pack(str(source), out, shard_size=5, workers=1, show_progress=False, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # later Pythons warn of forks
        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


# a share each day, of a number that no shard's operations are a multiple of; the whole at night
EVERY = pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.exhaustive)])


@EVERY
def test_killed_before_any_file_operation_and_resumed(source, tmp_path, no_fsync, every):
    pack(str(source), tmp_path / "whole", shard_size=5)
    expected = files_of(tmp_path / "whole")
    out = tmp_path / "out"
    kills = 0
    while pack_until_killed(source, out, at=kills):
        kept = shards_of(out)
        # either the description is there and everything with it, or it is not
        if (out / "dataset.json").exists():
            assert files_of(out).items() >= expected.items()
            shutil.rmtree(out / ".pack", ignore_errors=True)
        else:
            report = pack(str(source), out, shard_size=5, workers=1)
            assert report.shards_kept == len(kept)
            assert shards_of(out).items() >= kept.items()
        assert files_of(out) == expected
        shutil.rmtree(out)
        kills += every
    assert kills > 20
    assert files_of(out) == expected


@EVERY
def test_replacing_a_data_set_survives_kills_too(source, tmp_path, no_fsync, every):
    old, out = tmp_path / "old", tmp_path / "out"
    pack(str(source), old, shard_size=2)
    pack(str(source), tmp_path / "whole", shard_size=5)
    kills = 0
    while True:
        shutil.copytree(old, out)
        if not pack_until_killed(source, out, at=kills, overwrite=True):
            break
        pack(str(source), out, shard_size=5, workers=1, overwrite=True)
        assert files_of(out) == files_of(tmp_path / "whole")
        shutil.rmtree(out)
        kills += every
    assert kills > 20


def test_other_options_start_clean(source, tmp_path):
    out = tmp_path / "out"
    assert pack_until_killed(source, out, at=13)
    assert shards_of(out)
    report = pack(str(source), out, shard_size=3)
    assert not report.resumed
    pack(str(source), tmp_path / "fresh", shard_size=3)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_changed_source_starts_clean(source, tmp_path):
    out = tmp_path / "out"
    assert pack_until_killed(source, out, at=13)
    (source / "train" / "a" / "000.jpeg").write_bytes(image_bytes(99))
    assert not pack(str(source), out, shard_size=5).resumed
    pack(str(source), tmp_path / "fresh", shard_size=5)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_shard_damaged_meanwhile_is_written_again(source, tmp_path):
    out = tmp_path / "out"
    assert pack_until_killed(source, out, at=16)
    kept = shards_of(out)
    damaged = out / min(kept)
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    assert pack(str(source), out, shard_size=5).shards_kept == len(kept) - 1
    pack(str(source), tmp_path / "fresh", shard_size=5)
    assert files_of(out) == files_of(tmp_path / "fresh")


def processes_with(text):
    """Ids of the processes whose environment holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if text.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
    return found


def test_parent_killed_with_its_workers_at_work(tmp_path):
    """The whole command, from outside: its workers must end with it and the rest be resumable."""
    source, out = tmp_path / "source", tmp_path / "out"
    for name in "ab":
        (source / name).mkdir(parents=True)
    (source / "a" / "000.jpg").write_bytes(image_bytes(1, (1500, 1500)))
    for i in range(1, 60):
        os.link(source / "a" / "000.jpg", source / "ab"[i % 2] / f"{i:03d}.jpg")
    script = tmp_path / "packing.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom rtl_dist.prepare.packing.pack import pack\n"
        "if __name__ == '__main__':\n"
        "    pack(sys.argv[1], Path(sys.argv[2]), shard_size=3, workers=2)\n"
    )
    mark = {"PACK_TEST": str(tmp_path)}  # which its workers inherit
    process = subprocess.Popen(
        [sys.executable, str(script), str(source), str(out)], env={**os.environ, **mark}
    )
    try:
        deadline = time.monotonic() + 120
        while len(shards_of(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert len(processes_with(str(tmp_path))) >= 3  # itself and its workers
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 20
    while processes_with(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(str(tmp_path)) == []
    kept = shards_of(out)
    assert 3 <= len(kept) < 20
    report = pack(str(source), out, shard_size=3, workers=1)
    assert report.shards_kept == len(kept)
    assert shards_of(out).items() >= kept.items()
    pack(str(source), tmp_path / "whole", shard_size=3, workers=1)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_two_packs_cannot_write_the_same_folder(source, tmp_path):
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    with open(tmp_path / "out" / ".pack" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another pack is writing"):
            pack(str(source), tmp_path / "out")


def test_full_disk_is_said_and_leaves_no_half_file(source, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    real = os.fsync
    count = iter(range(100))
    monkeypatch.setattr(os, "fsync", lambda fd: full(fd) if next(count) > 8 else real(fd))
    with pytest.raises(RtlDistError, match=r"cannot write into .*No space left"):
        pack(str(source), tmp_path / "out", shard_size=5)
    monkeypatch.undo()
    assert list((tmp_path / "out" / ".pack").glob("*.tmp")) == []
    assert pack(str(source), tmp_path / "out", shard_size=5).resumed


def test_unfinished_data_set_cannot_be_opened(source, tmp_path):
    from rtl_dist.data.format.dataset import open_dataset

    assert pack_until_killed(source, tmp_path / "out", at=16)
    with pytest.raises(DataError, match="no data set"):
        open_dataset(tmp_path / "out")


def test_a_folder_of_the_users_is_not_taken_for_the_work_folder(tmp_path, source):
    out = tmp_path / "out"
    (out / ".pack").mkdir(parents=True)
    (out / ".pack" / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(it holds .pack/mine\)"):
        pack(str(source), out, workers=1, show_progress=False)
    assert (out / ".pack" / "mine").read_text() == "mine"
