"""Files opened as nothing but files: no link is followed, no pipe or device waited for.

In a folder that others can write too, a name that we use may be theirs: a link to a file of the
user's, which would be overwritten; a pipe, at which opening waits for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

# what opening raises of a link; of a pipe, to write to it; of a folder, likewise; of a device
NOT_REGULAR = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EINVAL)


def open_regular(path: Path) -> BufferedReader:
    """Opens a file for reading.

    Raises:
        OSError: as ``regular_descriptor``.
    """
    return open(regular_descriptor(path, os.O_RDONLY), "rb")


def regular_descriptor(path: Path, flags: int, mode: int = 0o644) -> int:
    """``os.open`` of a regular file, which is made where ``flags`` say so.

    Raises:
        OSError: it cannot be opened; or what has the name is a link, pipe or folder.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor
