"""The cache of remote files: bounded, shared, whole files only, whatever breaks in between."""

import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from remote_helpers import no_double_downloads, serving

from rtl_dist.core.errors import DataError, RemoteError, RtlDistError, ShardError, UserError
from rtl_dist.data.storage import remote
from rtl_dist.data.storage.cache import Cache, RemoteFile

SIZE = 20_000
NAMES = [f"{letter}.tar" for letter in "abcdefgh"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 4)
    monkeypatch.setattr(remote, "CHUNK", 4_000)
    monkeypatch.setattr(remote, "SMALLEST_CHUNK", 1_000)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "files").mkdir()
    for number, name in enumerate(NAMES):
        (tmp_path / "files" / name).write_bytes(content(number))
    with serving(tmp_path / "files") as server:
        yield server


@pytest.fixture
def files(server):
    return [described(server, name) for name in NAMES]


@pytest.fixture
def cache(tmp_path):
    return cache_of(tmp_path, 10)


def content(number):
    return hashlib.shake_128(bytes([number])).digest(SIZE)


def described(server, name):
    """The file as it is now on the server's disk."""
    raw = (server.folder / name).read_bytes()
    return RemoteFile(
        url=f"{server.url}/{name}", bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest()
    )


def cache_of(tmp_path, num_files, **more):
    return Cache(str(tmp_path / "cache"), gigabytes=num_files * SIZE / 1e9, **more)


def read(cache, file):
    return cache.read(file, 0, 2 * SIZE)


def part_of(cache, file):
    return cache.folder / f"{file.sha256}.{file.bytes}.part"


def is_here(cache, file):
    return (cache.folder / f"{file.sha256}.{file.bytes}").exists()


def names_in(cache, files):
    return "".join(NAMES[i][0] for i, file in enumerate(files) if is_here(cache, file))


@contextmanager
def watched(folder):
    """Yields a list of the folder's whole sizes, taken all the time."""
    sizes, over = [], threading.Event()

    def watch():
        while not over.is_set():
            total = 0
            for entry in os.scandir(folder):
                try:
                    total += entry.stat().st_size
                except FileNotFoundError:
                    continue
            sizes.append(total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


# --- a file comes once ---


def test_a_file_is_fetched_once(server, files, cache):
    assert read(cache, files[0]) == content(0)
    assert cache.path(files[0]).read_bytes() == content(0)
    assert pickle.loads(pickle.dumps(cache)).fetch(files[0])
    assert server.sent[NAMES[0]] == SIZE
    assert sorted(p.suffix for p in cache.folder.iterdir()) == [f".{SIZE}", ".lock"]


def test_equal_files_are_kept_once(server, files, cache):
    (server.folder / "copy.tar").write_bytes(content(0))
    cache.fetch(files[0])
    assert read(cache, described(server, "copy.tar")) == content(0)
    assert not server.gets("copy.tar")


def test_threads_of_a_process_share_a_download(server, files, cache):
    server.fail("*", "slow", 200_000)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(read(cache, files[0]))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [content(0)] * 8
    assert server.sent[NAMES[0]] == SIZE


def test_processes_share_a_download(server, files, cache):
    server.fail("*", "slow", 100_000)
    processes = [start_fetch(cache, files[0]) for _ in range(3)]
    assert [finish(p) for p in processes] == [(0, "True")] * 3
    assert no_double_downloads(server, NAMES[0])
    assert server.sent[NAMES[0]] == SIZE


def test_without_waiting_what_another_fetches_is_left_to_it(server, files, cache):
    held = server.fail(NAMES[0], "hold")
    thread = threading.Thread(target=cache.fetch, args=(files[0],))
    thread.start()
    wait_for(lambda: server.gets())
    assert cache.fetch(files[0], wait=False) is False
    held.over.set()
    thread.join()
    assert cache.fetch(files[0], wait=False) is True


def start_fetch(cache, file, wait_s=0.001):
    code = (
        "import sys; from rtl_dist.data.storage import remote; from rtl_dist.data.storage.cache import *\n"
        f"remote.CHUNK = 4000; remote.FIRST_WAIT_S = {wait_s}\n"
        f"print(Cache({str(cache.folder)!r}, {cache.limit / 1e9!r}).fetch({file!r}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output = process.communicate(timeout=60)[0]
    return process.returncode, output.strip()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- the limit ---


def test_what_was_used_least_recently_goes_first(server, files, tmp_path):
    cache = cache_of(tmp_path, 3)
    for number in (0, 1, 2):
        cache.fetch(files[number])
    assert cache.touch(files[0])  # now b is the oldest
    cache.fetch(files[3])
    assert names_in(cache, files) == "acd"
    read(cache, files[2])
    cache.fetch(files[4])
    assert names_in(cache, files) == "cde"
    assert not cache.touch(files[0])
    assert read(cache, files[0]) == content(0)


def test_the_limit_holds_at_every_moment(server, files, tmp_path):
    server.fail("*", "slow", 500_000)
    cache = cache_of(tmp_path, 3.5)
    failures = []

    def work(first):
        for turn in range(12):
            number = (first * 3 + turn * 5) % len(files)
            if read(cache, files[number]) != content(number):
                failures.append(number)

    with watched(cache.folder) as sizes:
        threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(sizes) > 20
    assert SIZE * 2 < max(sizes) <= cache.limit


def test_what_another_fetches_keeps_its_room(server, files, tmp_path):
    """There is room for two; while both are being fetched a third waits, or is left alone."""
    cache = cache_of(tmp_path, 2)
    held = [server.fail(name, "hold") for name in NAMES[:2]]
    threads = [threading.Thread(target=cache.fetch, args=(file,)) for file in files[:2]]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(server.gets()) == 2)
    assert cache.fetch(files[2], wait=False) is False
    threads.append(threading.Thread(target=cache.fetch, args=(files[2],)))
    threads[-1].start()
    time.sleep(0.2)
    assert not server.gets(NAMES[2])
    held[0].over.set()
    threads[2].join(20)
    assert names_in(cache, files) == "c"  # a made way for it, b is still coming
    held[1].over.set()
    for thread in threads:
        thread.join(20)
    assert names_in(cache, files) == "bc"


def test_a_file_deleted_while_it_is_read_is_read_to_its_end(server, files, tmp_path):
    cache = cache_of(tmp_path, 1)
    descriptor = os.open(cache.path(files[0]), os.O_RDONLY)
    cache.fetch(files[1])
    assert names_in(cache, files) == "b"
    assert os.read(descriptor, SIZE) == content(0)
    os.close(descriptor)


def test_a_file_deleted_between_fetch_and_open_is_fetched_again(server, files, cache, monkeypatch):
    fetch, deleted = Cache.fetch, []

    def fetch_and_lose(self, file, **how):
        fetch(self, file, **how)
        if not deleted:
            deleted.append(file)
            (self.folder / f"{file.sha256}.{file.bytes}").unlink()

    monkeypatch.setattr(Cache, "fetch", fetch_and_lose)
    assert read(cache, files[0]) == content(0)
    assert deleted
    assert server.sent[NAMES[0]] == 2 * SIZE


def test_a_file_that_can_never_fit_is_refused(server, files, tmp_path):
    with pytest.raises(RtlDistError, match=r"20,000 bytes, the cache .* 18,000; raise data\.cache"):
        cache_of(tmp_path, 0.9).fetch(files[0])
    assert not server.requests


def test_other_files_in_the_folder_are_left_alone(server, files, tmp_path):
    cache = cache_of(tmp_path, 1)
    others = [cache.folder / name for name in ("precious", "core.15000", "log.1", "a.20000.part")]
    for other in others:
        other.write_text("mine")
    for file in files:
        cache.fetch(file)
    assert [other.read_text() for other in others] == ["mine"] * 4


# --- breaks ---


def test_a_killed_download_is_taken_up_where_it_ended(server, files, cache):
    slow = server.fail("*", "slow", 20_000)
    process = start_fetch(cache, files[0])
    wait_for(lambda: server.sent[NAMES[0]] > 9_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    have = part_of(cache, files[0]).stat().st_size
    assert 4_000 <= have < SIZE
    server.faults.remove(slow)
    server.forget()
    assert read(cache, files[0]) == content(0)
    # not what was sent: the server may still be feeding the connection of the dead process
    assert server.gets()[0].range[0] == have


def test_a_broken_download_is_taken_up_where_it_ended(server, files, cache):
    server.fail("*", "drop", 500, skip=2, times=4)
    with pytest.raises(RemoteError):
        cache.fetch(files[0])
    assert server.fired["drop"] == 4
    assert part_of(cache, files[0]).stat().st_size == 8_000
    server.forget()
    assert read(cache, files[0]) == content(0)
    assert server.gets()[0].range[0] == 8_000


def test_what_was_left_behind_with_wrong_bytes_is_thrown_away(server, files, cache):
    part_of(cache, files[0]).write_bytes(bytes(7_000))
    assert read(cache, files[0]) == content(0)
    assert [server.gets()[i].range[0] for i in (0, 4)] == [7_000, 0]


def test_parts_that_were_left_behind_count_and_go_first(server, files, tmp_path):
    cache = cache_of(tmp_path, 2)
    part_of(cache, files[0]).write_bytes(content(0)[:5])
    cache.fetch(files[1])
    assert part_of(cache, files[0]).exists()
    cache.fetch(files[2])
    assert not part_of(cache, files[0]).exists()
    assert names_in(cache, files) == "bc"


def test_wrong_bytes_are_asked_for_once_more(server, files, cache):
    server.fail(NAMES[0], "wrong_bytes", times=1)
    assert read(cache, files[0]) == content(0)
    assert server.fired["wrong_bytes"] == 1
    server.forget()
    server.fail(NAMES[1], "wrong_bytes")
    with pytest.raises(ShardError, match=rf"{re.escape(files[1].url)} was altered: .* another sha"):
        cache.fetch(files[1])
    assert server.sent[NAMES[1]] == 2 * SIZE
    assert names_in(cache, files) == "a"
    assert not part_of(cache, files[1]).exists()


def test_who_waited_for_a_failure_fails_with_it(server, files, cache, monkeypatch):
    """Else a hundred processes would each find out for a minute that the server is gone."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.1)
    server.fail(NAMES[0], "status", 503)
    errors = []

    def fetch():
        try:
            cache.fetch(files[0])
        except RemoteError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 6
    assert len(set(errors)) == 1
    assert server.fired["status"] == 4
    server.mend()
    assert read(cache, files[0]) == content(0)  # an old failure is nobody else's


def test_a_waiting_process_takes_over_from_a_killed_one(server, files, cache):
    held = server.fail(NAMES[0], "hold", times=1)
    process = start_fetch(cache, files[0])
    wait_for(lambda: server.gets())
    results = []
    thread = threading.Thread(target=lambda: results.append(read(cache, files[0])))
    thread.start()
    time.sleep(0.1)
    assert not results
    process.kill()
    process.wait()
    process.stdout.close()
    thread.join(20)
    held.over.set()
    assert results == [content(0)]


# --- where it is kept ---


def test_a_full_disk_is_said_and_leaves_no_broken_file(server, files, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        cache = Cache(str(folder), gigabytes=1)
        with pytest.raises(RtlDistError, match=r"cannot keep http.*No space left.*data\.cache_gb"):
            cache.fetch(files[0])
        assert not [p for p in folder.iterdir() if p.suffix != ".lock"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache folder .*set data\.cache_dir"):
        Cache(str(tmp_path / "file" / "cache"))


def test_the_default_is_the_users_cache_folder_and_most_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = Cache()
    assert cache.folder == tmp_path / "rtl_dist"
    stat = os.statvfs(tmp_path)
    assert cache.limit == pytest.approx(0.8 * stat.f_bavail * stat.f_frsize, rel=0.05)


@pytest.mark.parametrize("more", [{"sha256": "../../" + "0" * 58}, {"sha256": "A" * 64}, {"bytes": "5/../x"}, {"bytes": 1.5}])  # fmt: skip
def test_a_description_cannot_choose_a_file_outside(more):
    with pytest.raises(DataError, match="no sound size and sha256"):
        RemoteFile(**({"url": "http://a/b", "bytes": 5, "sha256": "0" * 64} | more))


def test_nothing_is_left_open(server, files, tmp_path):
    cache = cache_of(tmp_path, 2)
    cache.fetch(files[0])
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    server.fail(NAMES[3], "wrong_bytes")
    for file in files[1:]:
        if file.url.endswith(NAMES[3]):
            with pytest.raises(ShardError):
                cache.fetch(file)
        else:
            read(cache, file)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # connections
