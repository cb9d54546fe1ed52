"""Real servers on loopback, as unreliable as a test wants them, with a log of what they were asked."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "no_ranges",  # the whole file, whatever was asked for
    "slow",  # ``number`` bytes a second
    "drop",  # the connection breaks after ``number`` bytes of the body
    "status",  # answers with the HTTP status ``number``
    "wrong_bytes",  # as many as asked for, but each another
    "truncated",  # the file has ``number`` bytes fewer
    "hang",  # the request is taken and never answered
    "hold",  # as hang, until ``release``
    "no_length",  # the size is not told
]
_MOST_S = 60  # that anything is held up, so that a failing test ends


@dataclass
class Fault:
    """What is wrong with the files whose path matches ``pattern``: after ``skip`` requests, the next
    ``times`` times."""

    pattern: str
    kind: Kind
    number: int = 0
    times: int = 10**9
    skip: int = 0
    heads: bool = False  # HEAD requests suffer too
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Request:
    """``range``: of bytes, end exclusive; None if all were asked for."""

    method: str
    path: str
    range: tuple[int, int] | None
    client: tuple[str, int]


class FileServer:
    """HTTP/1.1 with ranges over a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.fired: Counter[str] = Counter()  # faults by kind
        self.sent: Counter[str] = Counter()  # bytes of bodies by path
        self.lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        owner = self

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def get_request(self) -> Any:
                connection, address = super().get_request()
                with owner.lock:
                    owner._connections.add(connection)
                return connection, address

            def shutdown_request(self, request: Any) -> None:
                with owner.lock:
                    owner._connections.discard(request)
                super().shutdown_request(request)

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that went away

        class Handler(_Handler):
            files = self

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def fail(self, pattern: str, kind: Kind, number: int = 0, **more: Any) -> Fault:
        fault = Fault(pattern, kind, number, **more)
        self.faults.append(fault)
        return fault

    def mend(self) -> None:
        """Takes all faults away and lets go what is held."""
        faults, self.faults = self.faults, []
        for fault in faults:
            fault.over.set()

    def forget(self) -> None:
        """Empties the log."""
        with self.lock:
            self.requests.clear()
            self.fired.clear()
            self.sent.clear()

    def gets(self, pattern: str = "*") -> list[Request]:
        with self.lock:
            asked = list(self.requests)
        return [r for r in asked if r.method == "GET" and fnmatch(r.path, pattern)]

    def stop(self) -> None:
        """The server is gone: nobody listens, and connections break."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
        self.mend()
        with self.lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def take_fault(self, path: str, kinds: tuple[Kind, ...], *, head: bool) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                fits = fault.kind in kinds and fnmatch(path, fault.pattern) and fault.times > 0
                if not fits or (head and not fault.heads):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                self.fired[fault.kind] += 1
                return fault
        return None


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    try:
        yield server
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(head=False)

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def _fault(self, *kinds: Kind) -> Fault | None:
        return self.files.take_fault(self.path.lstrip("/"), kinds, head=self.command == "HEAD")

    def _answer(self, *, head: bool) -> None:
        path = self.path.lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        wanted = (int(asked[1]), int(asked[2]) + 1) if asked else None
        with self.files.lock:
            self.files.requests.append(Request(self.command, path, wanted, self.client_address))
        if waiting := self._fault("hang", "hold"):
            waiting.over.wait(_MOST_S)
            if waiting.kind == "hang":
                self.close_connection = True
                return
        if fault := self._fault("status"):
            self._refuse(fault.number)
            return
        try:
            content = (self.files.folder / path).read_bytes()
        except OSError:
            self._refuse(404)
            return
        if fault := self._fault("truncated"):
            content = content[: len(content) - fault.number]
        if wanted and not self._fault("no_ranges"):
            if wanted[0] >= len(content):
                self._refuse(416)
                return
            body = content[slice(*wanted)]
            self.send_response(206)
            last = wanted[0] + len(body) - 1
            self.send_header("Content-Range", f"bytes {wanted[0]}-{last}/{len(content)}")
        else:
            body = content
            self.send_response(200)
        if self._fault("no_length"):
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not head:
            if self._fault("wrong_bytes"):
                body = bytes(255 - byte for byte in body)
            self._send(path, body)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, path: str, body: bytes) -> None:
        drop, slow = self._fault("drop"), self._fault("slow")
        if drop:
            body = body[: drop.number]
        piece = max(1, slow.number // 50) if slow else 1 << 20
        for start in range(0, len(body), piece):
            part = body[start : start + piece]
            self.wfile.write(part)
            with self.files.lock:
                self.files.sent[path] += len(part)
            if slow:
                time.sleep(len(part) / slow.number)
        if drop:
            self.wfile.flush()
            self.close_connection = True


def no_double_downloads(server: FileServer, pattern: str) -> bool:
    """Whether each byte of each file was asked for once at most."""
    seen: dict[str, list[tuple[int, int]]] = {}
    for request in server.gets(pattern):
        size = (server.folder / request.path).stat().st_size
        seen.setdefault(request.path, []).append(request.range or (0, size))
    return all(
        earlier[1] <= later[0]
        for ranges in map(sorted, seen.values())
        for earlier, later in pairwise(ranges)
    )
