"""Folders that others may write into too: whose file is believed there, and which are refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rtl_dist.core.errors import UserError


def refuse_if_anyone_may_replace(folder: Path, *, key: str) -> None:
    """
    Raises:
        UserError: everybody may delete and rename what lies there. OSError: there is no folder.
    """
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise UserError(
            f"{key}: every user may replace the files in {folder} (mode {mode & 0o7777:o}), so none"
            f" of them can be believed; chmod o-w {folder}, or name a folder of your own"
        )


def is_shared(folder: Path) -> bool:
    """Whether others than this user and root may write into it."""
    found = folder.stat()
    return bool(found.st_mode & 0o022) or found.st_uid not in (os.geteuid(), 0)


def may_be_believed(found: os.stat_result, folder: Path) -> bool:
    """Whether a file that lies in the folder is of somebody whom the folder's owner has let in: in
    one where everybody may add files (as in /tmp), only this user and root."""
    return not folder.stat().st_mode & stat.S_IWOTH or found.st_uid in (os.geteuid(), 0)
