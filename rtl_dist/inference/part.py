"""``OUT.part``: results on their way, which a killed command's next start goes on with.

A folder beside OUT: ``rows`` (what is predicted so far), ``record.json`` (what was asked for, and
how many blocks and bytes of ``rows`` are sound), the listing of the inputs, and a lock.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import flush_to_disk, read_object, write_json
from rtl_dist.core.lock import try_lock
from rtl_dist.core.regular_files import regular_descriptor
from rtl_dist.core.text import brief

RECORD, ROWS, LOCK = "record.json", "rows", "lock"
LISTED = ("index", "names", "about.json")
_OURS = {RECORD, ROWS, LOCK, *LISTED, "table"}
RECORDED_EVERY_S = 2.0
_NAMED = 3  # of the inputs that have no prediction


class Part:
    """The part folder of one process, which has its lock; see ``open_part``.

    blocks: how many are in ``rows``. failed: inputs of these that have no prediction.
    first_failed: the first of them, with their reasons.
    """

    def __init__(self, folder: Path, lock: BinaryIO) -> None:
        self.folder, self._lock = folder, lock
        self._asked: dict[str, Any] = {}
        self._rows: BinaryIO | None = None
        self._recorded_at = 0.0
        self.blocks, self.failed = 0, 0
        self.first_failed: list[str] = []

    @property
    def rows(self) -> Path:
        return self.folder / ROWS

    def begin(self, asked: dict[str, Any], *, header: str, overwrite: bool) -> None:
        """Goes on with what is there, or begins.

        Args:
            asked: plain values by what they are called in a message; with others, nothing goes on.
            header: what ``rows`` begins with.
            overwrite: whether what was begun with something else is given up.

        Raises:
            UserError: what is there was begun with something else.
        """
        record = read_object(self.folder / RECORD)
        is_sound = record.keys() >= {"asked", "blocks", "bytes", "failed", "first_failed"}
        if not is_sound or (overwrite and record["asked"] != asked):
            record = {}
        self._asked = asked
        has_rows = self.rows.is_file() and self.rows.stat().st_size >= record.get("bytes", 0)
        if record and has_rows:
            self._require_same(record["asked"], asked)
            self.blocks, self.failed = record["blocks"], record["failed"]
            self.first_failed = record["first_failed"]
            self._rows = open(self.rows, "r+b")  # noqa: SIM115 - closed by ``close``
            self._rows.truncate(record["bytes"])
            self._rows.seek(0, os.SEEK_END)
        else:
            self._rows = open(self.rows, "wb")  # noqa: SIM115
            self._rows.write(header.encode())
        self.record()

    def append(self, texts: Sequence[str], failed: Sequence[str]) -> None:
        """The rows of the next blocks, and the inputs among them that have no prediction."""
        assert self._rows is not None
        for text in texts:
            self._rows.write(text.encode("utf-8", "backslashreplace"))
        self.blocks += len(texts)
        self.failed += len(failed)
        self.first_failed = [*self.first_failed, *failed][:_NAMED]
        if time.monotonic() - self._recorded_at >= RECORDED_EVERY_S:
            self.record()

    def record(self) -> None:
        """Makes what was appended so far what the next start goes on from."""
        if self._rows is None:
            return
        self._rows.flush()
        os.fsync(self._rows.fileno())  # before the record, which vouches for it
        content = {
            "asked": self._asked,
            "blocks": self.blocks,
            "bytes": self._rows.tell(),
            "failed": self.failed,
            "first_failed": self.first_failed,
        }
        write_json(self.folder / RECORD, content)
        self._recorded_at = time.monotonic()

    def publish(self, file: Path, out: Path) -> None:
        """Gives a file of the folder, whole by now, OUT's name; the folder goes."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None
        flush_to_disk(file)
        os.replace(file, out)
        flush_to_disk(out.absolute().parent)
        self.discard()

    def discard(self) -> None:
        """Removes the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Lets go of it; what was recorded stays, and where nothing was, nothing stays."""
        if self._rows is not None:
            with suppress(OSError):  # a full disk was told already
                self.record()
            with suppress(OSError):
                self._rows.close()
            self._rows = None
        self._lock.close()
        if not (self.folder / RECORD).exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _require_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name in now:
            if before.get(name) == now[name]:
                continue
            values = f" ({brief(before.get(name))} then, {brief(now[name])} now)"
            raise UserError(
                f"{self.folder} holds predictions that were begun with another {name}"
                f"{'' if _is_hash(now[name]) else values}: finish them by the command that began"
                " them, or give --overwrite to begin anew"
            )


def open_part(out: Path) -> Part:
    """The part folder beside OUT, made where it is not there, and its lock taken.

    Raises:
        UserError: it cannot be written, is not ours, or another process predicts into it.
    """
    folder = out.with_name(f"{out.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        foreign = sorted(
            name for name in os.listdir(folder) if name not in _OURS and not _may_stay(name)
        )
        if foreign or folder.is_symlink():
            what = f"holds {foreign[0]}" if foreign else "is a link"
            raise UserError(
                f"--out: {folder} is needed for what is on its way, but {what}, which is none of"
                " ours; move it, or choose another file"
            )
        descriptor = regular_descriptor(folder / LOCK, os.O_WRONLY | os.O_CREAT)
        lock = open(descriptor, "ab")  # noqa: SIM115 - held until the end
    except OSError as error:
        raise UserError(
            f"--out: cannot write into {folder.parent}: {error.strerror}; choose another file"
        ) from error
    try:
        is_free = try_lock(lock)
    except OSError:  # a disk without locks: nothing to be done
        is_free = True
    if not is_free:
        lock.close()
        raise UserError(f"another predict writes {out}: wait for it, or choose another --out")
    return Part(folder, lock)


def _may_stay(name: str) -> bool:
    """Of a killed process: tars that were fetched, files half written."""
    return name.endswith((".fetched", ".tar", ".tmp"))


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64
