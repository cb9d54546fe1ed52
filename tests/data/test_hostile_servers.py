"""Servers that send without end, compressed, elsewhere or nonsense: a line, and bounded memory."""

import gzip
import hashlib
import http.server
import threading
from contextlib import contextmanager

import pytest

from rtl_dist.core.errors import DataError, RemoteError, ShardError, UserError
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.storage import remote
from rtl_dist.data.storage.cache import Cache, RemoteFile
from rtl_dist.data.storage.remote import read_chunks, read_url, size_of, sizes_of

MOST = 10**6
BOMB = gzip.compress(bytes(10**8))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


class Server(http.server.ThreadingHTTPServer):
    """Answers as ``answer(handler)`` does. asked: the headers of each request."""

    daemon_threads = True

    def __init__(self, answer):
        owner = self
        self.asked = []
        self.sent = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                owner.asked.append(dict(self.headers))
                answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

            def head(self, status, **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()

            def body(self, piece):
                if self.command == "GET":
                    owner.sent += len(piece)
                    self.wfile.write(piece)

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        pass  # a client that had enough


@contextmanager
def serving(answer):
    server = Server(answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def endless(handler):
    handler.head(200, Transfer_Encoding="chunked")
    while handler.command == "GET":
        handler.body(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")


def endless_range(handler):
    handler.head(206, Connection="close")
    while handler.command == "GET":
        handler.body(b"x" * 0x10000)
    handler.close_connection = True


def bomb(handler):
    handler.head(200, Content_Encoding="gzip", Content_Length=str(len(BOMB)))
    handler.body(BOMB)


def of_length(text):
    def answer(handler):
        handler.head(200, Content_Length=text)
        handler.body(b"{}")
        handler.close_connection = True

    return answer


def redirect(where):
    return lambda handler: handler.head(302, Location=where, Content_Length="0")


def content(handler):
    handler.head(200, Content_Length="2")
    handler.body(b"{}")


@pytest.mark.parametrize("answer", [endless, endless_range])
def test_a_small_file_without_end_is_refused(answer):
    with serving(answer) as server:
        with pytest.raises(ShardError, match=r"has more than 1,000,000 bytes: it is none of ours"):
            read_url(f"{server.url}/dataset.json", MOST)
        assert server.sent < 20 * MOST  # what was on its way


def test_a_description_without_end_is_refused():
    with serving(endless) as server, pytest.raises(DataError, match="more than 100,000,000 bytes"):
        open_dataset(server.url)


@pytest.mark.parametrize("answer", [endless, endless_range])
def test_of_a_range_without_end_what_was_asked_for_is_read(answer, tmp_path):
    with serving(answer) as server:
        (piece,) = read_chunks(f"{server.url}/a.tar", 5, 1000)
        assert piece == (b"x" * 995)
        sha256 = hashlib.sha256(b"another").hexdigest()
        file = RemoteFile(url=f"{server.url}/a.tar", bytes=5000, sha256=sha256)
        cache = Cache(str(tmp_path), gigabytes=1)
        with pytest.raises(ShardError, match="was altered"):
            cache.fetch(file)
        assert server.sent < 20 * MOST


def test_files_are_asked_for_as_they_are_and_refused_compressed():
    with serving(bomb) as server:
        for read in (
            lambda url: read_url(url, MOST),
            lambda url: list(read_chunks(url, 0, MOST)),
            size_of,
            lambda url: sizes_of([url]),
        ):
            with pytest.raises(RemoteError, match="the server sends it compressed"):
                read(f"{server.url}/dataset.json")
        assert {headers["Accept-Encoding"] for headers in server.asked} == {"identity"}


@pytest.mark.parametrize("length", [str(10**15), "-5", "x", "1" * 5000])
def test_lengths_that_are_none_are_told(length):
    with serving(of_length(length)) as server, pytest.raises((RemoteError, ShardError)):
        read_url(f"{server.url}/dataset.json", MOST)


def test_a_file_that_drips_is_given_up(monkeypatch):
    def drip(handler):
        handler.head(200, Content_Length="1000")
        while not over.wait(0.02):
            handler.body(b"x")

    over = threading.Event()
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    with serving(drip) as server:
        with pytest.raises(RemoteError, match=r"2 attempts"):
            read_url(f"{server.url}/dataset.json", MOST)
        over.set()


@pytest.mark.parametrize("scheme", ["http", "https", "file", "ftp", "data"])
def test_redirects_to_other_servers_are_not_followed(scheme):
    with serving(content) as other:
        where = {
            "http": f"{other.url}/dataset.json",
            "https": f"https://127.0.0.1:{other.server_port}/dataset.json",
            "file": "file:///etc/hostname",
            "ftp": "ftp://127.0.0.1/x",
            "data": "data:,{}",
        }[scheme]
        with serving(redirect(where)) as server:
            url = f"{server.url}/dataset.json"
            for read in (lambda: read_url(url, MOST), lambda: size_of(url)):
                with pytest.raises((UserError, RemoteError), match="redirects to") as raised:
                    read()
            if scheme.startswith("http"):
                assert "data.redirects=any" in str(raised.value)
        assert not other.asked


def test_another_name_of_the_same_host_is_another_server():
    with serving(content) as other:
        where = f"http://localhost:{other.server_port}/dataset.json"
        with serving(redirect(where)) as server, pytest.raises(UserError, match="localhost"):
            read_url(f"{server.url}/dataset.json", MOST)
        assert not other.asked


def test_redirects_to_other_servers_are_followed_where_they_are_allowed():
    with serving(content) as other, serving(redirect(f"{other.url}/b")) as server:
        url = f"{server.url}/dataset.json"
        assert read_url(url, MOST, "any") == b"{}"
        assert size_of(url, "any") == 2
        assert sizes_of([url], "any") == {url: 2}
        assert list(read_chunks(url, 0, 2, "any")) == [b"{}"]


def test_redirects_within_the_server_are_followed_and_end():
    def onward(handler):
        if handler.path == "/a/b":
            content(handler)
        else:
            handler.head(301, Location="/a/b", Content_Length="0")

    with serving(onward) as server:
        assert read_url(f"{server.url}/dataset.json", MOST) == b"{}"
    with serving(redirect("/a")) as server:
        with pytest.raises(RemoteError, match="its redirects do not end"):
            read_url(f"{server.url}/a", MOST)
        assert len(server.asked) < 20


def test_no_cookies_go_along():
    def with_cookie(handler):
        handler.head(200, Content_Length="2", Set_Cookie="a=b; Path=/")
        handler.body(b"{}")

    with serving(with_cookie) as server:
        for _ in range(2):
            read_url(f"{server.url}/dataset.json", MOST)
        assert not any("Cookie" in headers for headers in server.asked)
