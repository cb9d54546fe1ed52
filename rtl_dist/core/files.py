"""Files that are whole or not there: written beside their place, flushed to disk, moved over it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtl_dist.core.csv_cells import csv_text

if TYPE_CHECKING:
    import torch

_UMASK = os.umask(0o077)  # it can only be read by setting it, which other threads must not meet
os.umask(_UMASK)


@contextmanager
def replacing(path: Path, *, within: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path; unless the block raises, what is there then replaces ``path`` in one
    step, flushed to disk. On an error the old file is untouched and the temporary one removed.

    Args:
        within: the folder of the temporary file, on the same disk; None: that of ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (within or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        with naming(path):
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, path)
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block says which file it is about: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def clear_left_over(folder: Path, names: Iterable[str]) -> None:
    """Deletes what writes of these files that were killed left beside them: the temporary files of
    ``replacing``, and those of safetensors where one of the names is of such a file. Whatever else
    is there may be the user's."""
    names = list(names)
    ours = [rf"\.{re.escape(name)}\.\d+\.tmp" for name in names]
    if any(name.endswith(".safetensors") for name in names):
        ours.append(r"\.tmp[0-9A-Za-z]{6}")
    pattern = re.compile("|".join(ours))
    with suppress(FileNotFoundError, NotADirectoryError):  # nothing was written there yet
        for entry in list(os.scandir(folder)):
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or damaged, or holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """One safetensors file, tensors copied to contiguous CPU memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(on_cpu, path, metadata=metadata)
    except SafetensorError as error:  # a full disk, in its own words
        raise OSError(errno.EIO, str(error), str(path)) from error
    with suppress(OSError):  # not every disk knows permissions
        path.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read


def user_cache_folder() -> Path:
    """Where what can be had again is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtl_dist"


def is_no_file(path: Path) -> bool:
    """Whether there is something that is no file: to open a named pipe would wait for ever, and a
    device need not end."""
    return path.exists() and not path.is_file()


def flush_to_disk(path: Path) -> None:
    """fsync of a file or folder; of a folder only where the disk can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table as ``csv_text`` makes it, UTF-8."""
    write_text(path, csv_text(header, rows))
