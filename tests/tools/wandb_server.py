"""A W&B server on loopback that keeps what it is sent, and one that never answers."""

from __future__ import annotations

import base64
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

HISTORY = "wandb-history.jsonl"


class HangingServer:
    """Takes connections and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._taken: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._socket.getsockname())

    @property
    def was_asked(self) -> bool:
        return bool(self._taken)

    def _take(self) -> None:
        while True:
            try:
                self._taken.append(self._socket.accept()[0])
            except OSError:  # closed
                return

    def __enter__(self) -> HangingServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for taken in self._taken:
            taken.close()


@dataclass
class StoredRun:
    """What W&B has of a run. files: their lines by number."""

    files: dict[str, dict[int, str]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def lines(self, name: str) -> list[str]:
        return [line for _, line in sorted(self.files.get(name, {}).items())]

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines(HISTORY)]


class WandbServer:
    """Answers what W&B's client asks about runs. keys: with which it was asked."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.keys: set[str] = set()
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                scheme, _, secret = self.headers.get("Authorization", "").partition(" ")
                with owner._lock:
                    if scheme == "Basic":
                        owner.keys.add(base64.b64decode(secret).decode().partition(":")[2])
                    content = json.dumps(owner._answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_PUT = do_POST
            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self._store(self.runs[path.split("/")[-2]], json.loads(body))
            return {}
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        answers = {
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._uploads,
        }
        answer = answers.get(asked.get("operationName"))
        return {"data": answer(asked["variables"]) if answer else {}}

    def _store(self, run: StoredRun, content: dict[str, Any]) -> None:
        for name, part in (content.get("files") or {}).items():
            lines = run.files.setdefault(name, {})
            lines |= dict(enumerate(part["content"], part["offset"]))

    def _resume_status(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(asked["name"])
        if run is None:
            return {"model": None}
        history = run.lines(HISTORY)
        return {
            "model": _PROJECT
            | {
                "bucket": {
                    "id": asked["name"],
                    "name": asked["name"],
                    "displayName": asked["name"],
                    "summaryMetrics": "{}",
                    "logLineCount": 0,
                    "historyLineCount": len(history),
                    "eventsLineCount": 0,
                    "historyTail": json.dumps(history[-1:]),
                    "eventsTail": "[]",
                    "config": "{}",
                    "tags": [],
                    "notes": "",
                    "wandbConfig": json.dumps({"t": 1}),
                }
            }
        }

    def _upsert(self, asked: dict[str, Any]) -> dict[str, Any]:
        is_new = asked["name"] not in self.runs
        run = self.runs.setdefault(asked["name"], StoredRun())
        config = json.loads(asked["config"] or "{}")
        run.config |= {key: value["value"] for key, value in config.items()}
        return {
            "upsertBucket": {
                "bucket": {
                    "id": asked["name"],
                    "name": asked["name"],
                    "displayName": asked["name"],
                    "description": None,
                    "config": None,
                    "sweepName": None,
                    "project": _PROJECT,
                    "historyLineCount": len(run.lines(HISTORY)),
                },
                "inserted": is_new,
            }
        }

    def _uploads(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "createRunFiles": {
                "runID": asked["run"],
                "uploadHeaders": [],
                "files": [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{name}"}
                    for name in asked["files"]
                ],
            }
        }


_PROJECT = {"id": "p", "name": "rtl_dist", "entity": {"id": "e", "name": "someone"}}
