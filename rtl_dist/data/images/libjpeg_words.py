"""What libjpeg says of a picture that it decodes none the less.

It warns on the process's stderr, without a name, and has no other way behind torchvision. So stderr
is another file for as long as a picture is decoded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_STDERR = 2
_MOST_BYTES = 1 << 16


class Words:
    """What was said, once it was said."""

    def __init__(self) -> None:
        self.text = ""


@contextmanager
def heard() -> Iterator[Words]:
    """What the decoder says inside is kept from stderr and told afterwards."""
    words = Words()
    try:
        before = os.dup(_STDERR)
    except OSError:  # it is closed: nothing can be said
        yield words
        return
    try:
        file = _file(os.getpid())
        os.dup2(file, _STDERR)
        try:
            yield words
        finally:
            os.dup2(before, _STDERR)
        if os.fstat(file).st_size:
            words.text = " ".join(_taken(file).split())
    finally:
        os.close(before)


def _taken(file: int) -> str:
    text = os.pread(file, _MOST_BYTES, 0).decode("utf-8", "replace")
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    return text


@lru_cache(maxsize=1)
def _file(pid: int) -> int:
    """One a process, open to its end: a fork would share its place in it."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
