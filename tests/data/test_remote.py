"""Bytes behind a URL, from real servers: what heals by itself, and what is said of the rest."""

import base64
import http.server
import logging
import multiprocessing
import subprocess
import sys
import threading
import time

import fsspec
import pytest
from remote_helpers import serving

from rtl_dist.config import DataConfig
from rtl_dist.core.errors import RemoteError, ShardError, UserError
from rtl_dist.data.storage import remote
from rtl_dist.data.storage.remote import read_chunks, read_url, size_of, sizes_of

CONTENT = bytes(range(251)) * 400  # 100,400 bytes
SIZE = len(CONTENT)
NAME = "a.tar"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "CHUNK", 16_000)
    monkeypatch.setattr(remote, "SMALLEST_CHUNK", 1_000)
    monkeypatch.setattr(remote, "SILENCE_S", 0)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / NAME).write_bytes(CONTENT)
    with serving(tmp_path / "files") as server:
        yield server


@pytest.fixture
def url(server):
    return f"{server.url}/{NAME}"


def read(url, start=0, end=SIZE):
    return b"".join(read_chunks(url, start, end))


def small(url):
    return read_url(url, 10**6)


# --- what is there ---


def test_a_file_comes_in_ranges_none_of_them_twice(server, url):
    assert read(url) == CONTENT
    assert [r.range for r in server.gets()][:2] == [(0, 16_000), (16_000, 32_000)]
    assert server.sent[NAME] == len(CONTENT)
    assert read(url, 5_000, 40_001) == CONTENT[5_000:40_001]
    assert small(url) == CONTENT
    assert size_of(url) == len(CONTENT)
    assert sizes_of([url, f"{server.url}/b.tar", url]) == {
        url: len(CONTENT),
        f"{server.url}/b.tar": None,
    }


def test_a_server_without_ranges_serves_as_well(server, url):
    server.fail("*", "no_ranges")
    assert read(url) == CONTENT
    assert read(url, 20_000) == CONTENT[20_000:]
    assert server.fired["no_ranges"]


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_any_kind_of_url_that_fsspec_knows(scheme, tmp_path):
    root = f"memory://some{tmp_path}" if scheme == "memory" else f"file://{tmp_path}"
    with fsspec.open(f"{root}/{NAME}", "wb") as file:
        file.write(CONTENT)
    assert read(f"{root}/{NAME}") == CONTENT == small(f"{root}/{NAME}")
    assert sizes_of([f"{root}/{NAME}", f"{root}/b.tar", f"{root}/none/c.tar"]) == {
        f"{root}/{NAME}": len(CONTENT),
        f"{root}/b.tar": None,
        f"{root}/none/c.tar": None,
    }
    with pytest.raises(ShardError, match=r"b\.tar is not there"):
        small(f"{root}/b.tar")
    with pytest.raises(ShardError, match="truncated"):
        read(f"{root}/{NAME}", 0, len(CONTENT) + 1)


# --- what heals ---


def test_a_refusal_for_the_moment_is_asked_again(server, url, caplog):
    server.fail("*", "status", 503, times=3, heads=True)
    with caplog.at_level(logging.INFO, "rtl_dist"):
        assert read(url) == CONTENT
    assert server.fired["status"] == 3
    assert "503" in caplog.text
    assert "trying again" in caplog.text


def test_a_size_is_asked_again(server, url):
    server.fail("*", "status", 503, times=3, heads=True)  # HEAD, GET, HEAD
    assert sizes_of([url]) == {url: len(CONTENT)}
    assert server.fired["status"] == 3


def test_a_broken_connection_is_taken_up_where_it_broke(server, url):
    pieces = read_chunks(url, 0, len(CONTENT))
    got = next(pieces) + next(pieces)
    server.fail("*", "drop", 500, times=2)
    assert got + b"".join(pieces) == CONTENT
    assert server.fired["drop"] == 2
    asked = [r.range for r in server.gets()]
    assert asked[:5] == [
        (0, 16_000),
        (16_000, 32_000),
        (32_000, 48_000),  # broken; then less is asked for, and more again when that went well
        (32_000, 36_000),  # again
        (32_000, 33_000),
    ]
    assert asked[5] == (33_000, 35_000)
    assert not any(start < 32_000 for start, _ in asked[2:])


def test_a_slow_line_gets_smaller_pieces(server, url, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    server.fail("*", "slow", 50_000)  # 16,000 bytes take 0.32 s
    assert read(url, 0, 30_000) == CONTENT[:30_000]
    lengths = [end - start for start, end in (r.range for r in server.gets())]
    assert lengths[0] == 16_000
    assert lengths[1] == 4_000


def test_a_server_that_says_nothing_is_asked_again(server, url, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    server.fail("*", "hang", times=2)
    assert read(url) == CONTENT
    assert server.fired["hang"] == 2


# --- what does not ---


def test_a_server_that_is_gone_is_not_asked_for_ever(server, url, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    assert read(url) == CONTENT
    server.stop()
    for ask in (lambda: read(url), lambda: size_of(url), lambda: sizes_of([url])):
        with pytest.raises(RemoteError, match=r"cannot read http://.*\(3 attempts\); check the"):
            ask()


def test_waits_grow_and_end(server, url, monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    server.fail("*", "status", 503)
    with pytest.raises(RemoteError, match="503"):
        read(url)
    assert server.fired["status"] == 8
    assert all(least <= wait <= 2 * least for least, wait in zip([0.5, 1, 2], waits, strict=False))
    assert 60 < sum(waits) < 130


def test_a_missing_file_is_said_at_once(server):
    for ask in (read, small, size_of):
        server.forget()
        with pytest.raises(ShardError, match=r"b\.tar is not there; restore it or correct data"):
            ask(f"{server.url}/b.tar")
        assert len(server.requests) <= 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_forbidden_file_is_said_at_once(server, url, status):
    server.fail("*", "status", status, heads=True)
    for ask in (read, small, size_of, lambda url: sizes_of([url])):
        server.forget()
        with pytest.raises(ShardError, match=rf"may not be read: .*{status}.*credentials"):
            ask(url)
        assert len(server.requests) <= 2


def test_a_truncated_file_is_said_at_once(server, url):
    server.fail("*", "truncated", 10, heads=True)
    assert sizes_of([url]) == {url: len(CONTENT) - 10}
    for start in (0, len(CONTENT) - 16_000, len(CONTENT) - 5):
        with pytest.raises(ShardError, match="is truncated: it ends before byte 100400"):
            read(url, start)


def test_a_server_that_tells_no_sizes_is_said_at_once(server, url):
    server.fail("*", "no_length", heads=True)
    with pytest.raises(RemoteError, match="does not tell its size"):
        size_of(url)


@pytest.mark.parametrize("address", ["http://", "https:///x", "http://x:99999/y", "zip://x::{}"])
def test_what_is_no_address_is_said_at_once(address, tmp_path):
    (tmp_path / "no.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot read .*correct the URL"):
        read(address.format(tmp_path / "no.zip"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # importing it fails
    with pytest.raises(UserError, match=r"gcsfs.*pip install 'rtl_dist\[remote\]'"):
        small("gs://bucket/a.tar")
    with pytest.raises(UserError, match=r"cannot read nosuch://a: .*nosuch"):
        small("nosuch://a")


@pytest.mark.parametrize("url", ["https://me:secret@host/data", "s3://key:secret@bucket/data"])
def test_a_password_in_a_url_is_refused(url):
    with pytest.raises(ValueError, match="holds a password or token") as caught:
        DataConfig(path=url)
    assert "secret" not in str(caught.value)


# --- processes ---


def test_a_forked_process_reads_and_leaves_its_parents_connections_alone(server, url, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_S", 3)
    assert read(url) == CONTENT
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        child = context.Process(target=_read_in_child, args=(url,))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        server.forget()
        begun = time.monotonic()
        assert read(url) == CONTENT
        assert time.monotonic() - begun < 30  # half of the time-out of a read that hangs
        assert server.sent[NAME] == len(CONTENT)  # nothing was asked twice


def _read_in_child(url):
    import gc

    assert read(url) == CONTENT
    gc.collect()


def test_a_process_that_ends_while_it_reads_ends_quietly(server, url):
    server.fail("*", "slow", 10_000)
    code = (
        "import logging, sys, threading, time; logging.basicConfig(level='INFO')\n"
        "from rtl_dist.data.storage.remote import read_chunks\n"
        f"read = lambda: list(read_chunks({url!r}, 0, {len(CONTENT)}))\n"
        "threading.Thread(target=read, daemon=True).start(); time.sleep(5)"
    )
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout + done.stderr == ""
    assert server.sent[NAME]
    assert time.monotonic() - begun < 10


def test_credentials_come_from_netrc(tmp_path, monkeypatch):
    """Where curl finds them too; aiohttp would not look by itself."""

    class Guarded(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            said = self.headers.get("Authorization", "")
            allowed = said == "Basic " + base64.b64encode(b"bob:sEcret1").decode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", "2" if allowed else "0")
            self.end_headers()
            self.wfile.write(b"ok" if allowed else b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a"
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        with pytest.raises(ShardError, match="check the credentials"):
            small(url)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login bob password sEcret1\n")
        (tmp_path / "netrc").chmod(0o600)
        remote._SYSTEMS.clear()
        fsspec.filesystem("http").clear_instance_cache()
        assert small(url) == b"ok"
        server.shutdown()
