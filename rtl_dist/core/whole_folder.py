"""Folders that are whole or not there: filled under another name, flushed to disk, then renamed.

A folder that is not whole yet, or not any more, has a name of its own beside its place
(``INCOMPLETE``, ``GONE``), so what bears its proper name is whole whenever a process was killed.
Where several processes may make or delete the same folder, those names are ``shared``: each
process has its own.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

from rtl_dist.core.files import flush_to_disk

INCOMPLETE, GONE = ".incomplete-", ".gone-"


def incomplete_folder(final: Path, *, shared: bool = False) -> Path:
    """Where ``final`` is to be filled. Not made yet."""
    return _beside(final, INCOMPLETE, shared)


def publish_folder(filled: Path, final: Path, *, replace: bool = False) -> None:
    """Moves a folder of files to its name, once all of it is on the disk.

    Args:
        replace: whether a folder that bears the name goes first.

    Raises:
        OSError: the disk fails, or another folder bears the name; ``filled`` may be there still.
    """
    for path in (*filled.iterdir(), filled):
        flush_to_disk(path)
    if replace and final.exists():
        delete_folder(final)
    filled.rename(final)
    flush_to_disk(final.parent)


def discard_folder(filled: Path) -> None:
    """Deletes what is not to be published after all, as far as the disk lets it."""
    shutil.rmtree(filled, ignore_errors=True)


def delete_folder(final: Path, *, shared: bool = False) -> None:
    """Deletes a published folder; what is half deleted does not bear its name.

    Raises:
        OSError: it is not there, or the disk fails; it is whole then.
    """
    gone = _beside(final, GONE, shared)
    final.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_incomplete(parent: Path, names: re.Pattern[str]) -> None:
    """Deletes what killed processes left, in the middle of filling or of deleting folders that bear
    such ``names``; whatever else is there may be the user's."""
    for prefix in (INCOMPLETE, GONE):
        for folder in parent.glob(f"{prefix}*"):
            if names.fullmatch(folder.name.removeprefix(prefix)):
                shutil.rmtree(folder, ignore_errors=True)  # leaves alone what is a file or a link


def _beside(final: Path, prefix: str, shared: bool) -> Path:
    own = f".{os.getpid()}.{time.time_ns()}" if shared else ""
    return final.with_name(f"{prefix}{final.name}{own}")
