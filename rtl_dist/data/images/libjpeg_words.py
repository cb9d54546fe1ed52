"""What libjpeg says of a picture that it decodes none the less.

It warns on the process's stderr, without a name, and has no other way behind torchvision. So stderr
is another file for as long as a picture is decoded.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

_STDERR = 2
_MOST_BYTES = 1 << 16
# How its warnings begin. What another thread says meanwhile goes on to stderr.
_ITS = re.compile(
    "Corrupt JPEG data|Inconsistent progression|Premature end of JPEG|Invalid SOS parameters"
    "|Unknown Adobe color|Application transferred too few|Warning: unknown JFIF"
)
# A process has one stderr: two threads would each take the other's file for it, and a fork would
# begin with that.
_LISTENING = threading.Lock()
os.register_at_fork(
    before=_LISTENING.acquire,
    after_in_parent=_LISTENING.release,
    after_in_child=_LISTENING.release,
)


class Words:
    """What was said, once it was said."""

    def __init__(self) -> None:
        self.text = ""


@contextmanager
def heard() -> Iterator[Words]:
    """What the decoder says inside is kept from stderr and told afterwards. Threads take turns."""
    with _LISTENING:
        yield from _heard()


def _heard() -> Iterator[Words]:
    words = Words()
    try:
        file = _file(os.getpid())
        before = os.dup(_STDERR)
    except OSError:  # it is closed, or no more files may be open: then nothing is heard
        yield words
        return
    try:
        try:
            os.dup2(file, _STDERR)
            yield words
        finally:
            os.dup2(before, _STDERR)
        if os.fstat(file).st_size:
            lines = _taken(file).splitlines(keepends=True)
            words.text = " ".join(line.strip() for line in lines if _ITS.match(line))
            others = "".join(line for line in lines if not _ITS.match(line))
            with suppress(OSError):  # nobody reads it
                os.write(_STDERR, others.encode("utf-8", "surrogateescape"))
    finally:
        os.close(before)


def _taken(file: int) -> str:
    text = os.pread(file, _MOST_BYTES, 0).decode("utf-8", "surrogateescape")
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    return text


@lru_cache(maxsize=1)
def _file(pid: int) -> int:
    """One a process, open to its end: a fork would share its place in it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("libjpeg")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
