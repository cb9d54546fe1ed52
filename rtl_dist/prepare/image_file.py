"""An image file read, and no more of what is none: any format that can be made readable."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.foreign import MAX_FILE_BYTES, suffix_of
from rtl_dist.prepare.conversion import converted, kind_to_convert


def read_image_file(path: Path, *, convert: bool) -> bytes:
    """The bytes of a JPEG, PNG or WebP file.

    Args:
        convert: whether files of other formats are converted.

    Raises:
        DataError: it is unreadable, no image by its first bytes, or too large; to be put behind its
            name.
    """
    try:
        # without O_NONBLOCK a named pipe would be waited for, for ever
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError("is not a plain file")
            head = file.read(16)
            kind = kind_to_convert(head) if convert else None
            if kind is None:
                suffix_of(head)
            if status.st_size > MAX_FILE_BYTES:
                raise DataError(f"is larger than the {MAX_FILE_BYTES >> 20} MiB allowed")
            content = head + file.read()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    return content if kind is None else converted(content, kind)


def may_be_image(path: Path) -> bool:
    """Whether its first bytes are those of a format that can be read, or made readable."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            head = file.read(16)
        return kind_to_convert(head) is not None or bool(suffix_of(head))
    except (OSError, DataError):
        return False
