"""What is to be predicted, listed on disk: a row an input, so that any number takes no memory.

``index`` holds a ``_ROW`` an input and ``names`` their texts; rank 0 writes both, every rank maps
them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rtl_dist.core.errors import DataError, RemoteError, ShardError
from rtl_dist.core.urls import Redirects
from rtl_dist.data.images.foreign import MAX_FILE_BYTES
from rtl_dist.data.storage.remote import read_url
from rtl_dist.prepare.image_file import read_image_file

_ROW = np.dtype(
    [
        *(("at", "<u8"), ("name", "<u4"), ("more", "<u4")),  # bytes: where in ``names``, how many
        *(("kind", "u1"), ("tar", "<u4"), ("offset", "<u8"), ("size", "<u8")),
    ]
)
_FLUSHED_ROWS = 4096
_MOST_OPEN_TARS = 16
_FETCHED_AT_ONCE = 8


class _Kind(IntEnum):
    FILE = 0
    URL = 1
    MEMBER = 2
    FAULT = 3


class ListingWriter:
    """Writes a listing into a folder; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = open(folder / "index", "wb")  # noqa: SIM115 - closed on exit
        self._names = open(folder / "names", "wb")  # noqa: SIM115
        self._rows: list[tuple[int, ...]] = []
        self._hash = hashlib.sha256()
        self._tars: list[str] = []
        self._at = 0
        self.count = 0

    def add_file(self, path: str, name: str | None = None) -> None:
        """A local file, which need not be there.

        Args:
            name: what it is called in the results; None: its path.
        """
        try:
            status = os.stat(path)
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            stamp = ""
        self._add(_Kind.FILE, path if name is None else name, "" if name is None else path, stamp)

    def add_url(self, url: str) -> None:
        self._add(_Kind.URL, url, "", "")

    def add_fault(self, name: str, reason: str) -> None:
        """What is known not to be readable, and why, to be put behind its name."""
        self._add(_Kind.FAULT, name, reason, "")

    def add_tar(self, path: str, stamp: str) -> None:
        """The tar that the members added after it are in.

        Args:
            path: of a local file.
            stamp: changes when its content does.
        """
        self._tars.append(path)
        self._hash.update(f"tar {stamp}\0".encode())

    def add_member(self, name: str, offset: int, size: int) -> None:
        """Bytes of the last tar."""
        self._add(_Kind.MEMBER, name, "", "", offset=offset, size=size)

    def _add(
        self, kind: _Kind, name: str, more: str, stamp: str, *, offset: int = 0, size: int = 0
    ) -> None:
        first, second = (text.encode("utf-8", "surrogateescape") for text in (name, more))
        self._names.write(first + second)
        self._rows.append(
            (self._at, len(first), len(second), kind, max(0, len(self._tars) - 1), offset, size)
        )
        self._at += len(first) + len(second)
        self.count += 1
        head = f"{kind} {len(first)} {len(second)} {offset} {size} {stamp}\0".encode()
        self._hash.update(head + first + second)
        if len(self._rows) == _FLUSHED_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._index.write(np.array(self._rows, _ROW).tobytes())
        self._rows.clear()

    def __enter__(self) -> ListingWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._flush()
                about = {"fingerprint": self._hash.hexdigest(), "tars": self._tars}
                text = json.dumps(about)  # escapes what is no UTF-8
                (self._folder / "about.json").write_text(text, encoding="ascii")
        finally:
            self._index.close()
            self._names.close()


class Listing:
    """Inputs as ``ListingWriter`` wrote them; see ``Inputs``."""

    is_remote = False

    def __init__(self, folder: Path, redirects: Redirects) -> None:
        self._folder, self._redirects = folder, redirects
        about = json.loads((folder / "about.json").read_text(encoding="ascii"))
        self.fingerprint, self._tars = about["fingerprint"], about["tars"]
        self._names = open(folder / "names", "rb", buffering=0)  # noqa: SIM115 - to the end
        # mapped only where there is something: nothing cannot be
        has_rows = (folder / "index").stat().st_size > 0
        self._rows: np.ndarray = (
            np.memmap(folder / "index", _ROW, "r") if has_rows else np.zeros(0, _ROW)
        )
        self._open: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Listing, (self._folder, self._redirects)  # another process opens it again

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Closes all files."""
        self._names.close()
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def name(self, number: int) -> str:
        row = self._rows[number]
        return self._text(int(row["at"]), int(row["name"]))

    def read(self, numbers: range) -> Iterator[bytes | DataError]:
        """See ``Inputs``. Several URLs are fetched at once."""
        for first in range(numbers.start, numbers.stop, _FETCHED_AT_ONCE):
            some = range(first, min(first + _FETCHED_AT_ONCE, numbers.stop))
            if (self._rows["kind"][some.start : some.stop] == _Kind.URL).all():
                with ThreadPoolExecutor(_FETCHED_AT_ONCE, "rtl_dist fetch") as pool:
                    yield from pool.map(self._content, some)
            else:
                yield from map(self._content, some)

    def _content(self, number: int) -> bytes | DataError:
        row = self._rows[number]
        name, more = self.name(number), int(row["at"]) + int(row["name"])
        try:
            if row["kind"] == _Kind.FAULT:
                return DataError(self._text(more, int(row["more"])))
            if row["kind"] == _Kind.URL:
                return _fetched(name, self._redirects)
            if row["kind"] == _Kind.MEMBER:
                return self._member(int(row["tar"]), int(row["offset"]), int(row["size"]))
            path = self._text(more, int(row["more"])) or name
            return read_image_file(Path(path), convert=True)
        except DataError as error:
            return error

    def _member(self, tar: int, offset: int, size: int) -> bytes:
        if size > MAX_FILE_BYTES:
            raise DataError(f"is larger than the {MAX_FILE_BYTES >> 20} MiB allowed")
        try:
            return os.pread(self._descriptor(tar), size, offset)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error

    def _descriptor(self, tar: int) -> int:
        if tar not in self._open:
            while len(self._open) >= _MOST_OPEN_TARS:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = os.open(self._tars[tar], os.O_RDONLY)
        return self._open[tar]

    def _text(self, at: int, length: int) -> str:
        return os.pread(self._names.fileno(), length, at).decode("utf-8", "surrogateescape")


def _fetched(url: str, redirects: Redirects) -> bytes:
    """Raises DataError: it cannot be had, whyever: the next one may be elsewhere."""
    try:
        return read_url(url, MAX_FILE_BYTES, redirects)
    except (ShardError, RemoteError) as error:
        reason = str(error).removeprefix(f"cannot read {url}: ").removeprefix(f"{url} ")
        raise DataError(f"cannot be had: {reason.partition('; ')[0]}") from error
