"""Sums that nobody without this user's secret can make, for views in folders others can write."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rtl_dist.core.files import user_cache_folder
from rtl_dist.core.regular_files import open_regular

_FILE, _BYTES = "features.key", 32


class Seal:
    """One user's, as long as his secret lies in his cache folder.

    name: tells his views from those of others, and gives nothing away.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.name = hashlib.sha256(b"name" + secret).hexdigest()[:16]

    def of_bytes(self, chunks: Iterable[Any]) -> str:
        """Of content in pieces, in hex."""
        mac = hmac.new(self._secret, digestmod="sha256")
        for chunk in chunks:
            mac.update(chunk)
        return mac.hexdigest()

    def of_object(self, content: dict[str, Any]) -> str:
        """Of what JSON can hold, in hex."""
        return self.of_bytes([json.dumps(content, sort_keys=True).encode()])


def user_secret() -> bytes:
    """Of a file in the user's cache folder, made where there is none; one that is of this process
    alone where no file can be kept, or others can read or write it."""
    path = user_cache_folder() / _FILE
    fresh = secrets.token_bytes(_BYTES)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _make(path, fresh)
        with open_regular(path) as file:
            found, content = os.fstat(file.fileno()), file.read(_BYTES + 1)
        is_private = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077
        if is_private and len(content) == _BYTES:
            return content
    return fresh


def _make(path: Path, secret: bytes) -> None:
    """Whole or not at all, and only the first of several processes."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
