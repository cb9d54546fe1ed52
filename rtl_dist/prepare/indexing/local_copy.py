"""A remote shard on the local disk, for as long as it is being read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rtl_dist.core.errors import RtlDistError
from rtl_dist.core.urls import Redirects
from rtl_dist.data.storage.remote import read_chunks, size_of


@contextmanager
def local_copy(url: str, folder: Path, redirects: Redirects) -> Iterator[Path]:
    """The file behind a URL as a temporary file in ``folder``.

    Raises:
        ShardError: it is not there, or may not be read.
        RemoteError: the place cannot be reached.
        RtlDistError: there is no room for it.
    """
    size = size_of(url, redirects)
    if size > shutil.disk_usage(folder).free:
        raise RtlDistError(
            f"{url} has {size:,} bytes, for which {folder} has no room: free some, or set TMPDIR"
            " to a larger disk"
        )
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tar") as file:
        for chunk in read_chunks(url, 0, size, redirects):
            file.write(chunk)
        file.flush()
        yield Path(file.name)
