"""Plain tar files whose bytes depend on nothing but their members' names and contents.

No times, owners, modes or PAX records, so packing the same samples twice gives the same file; and
one ustar header directly before each member's bytes, so a name can be read back from an offset.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

BLOCK = 512
MAX_NAME_BYTES = 100  # what fits the header's name field without a prefix or an extension record


class TarWriter:
    """Streams members to a binary file, hashing what it writes.

    ``num_bytes`` is the file's size so far; ``sha256`` its digest in hex.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def add(self, name: str, content: bytes) -> int:
        """Appends one regular file.

        Returns:
            The offset in bytes of the content's first byte within the tar.

        Raises:
            ValueError: the name is longer than ``MAX_NAME_BYTES`` or the content than ustar allows.
        """
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"a member's name must have 1 to {MAX_NAME_BYTES} bytes: {name!r}")
        member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the mode 0644, the owner empty
        member.size = len(content)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(content)
        self._write(bytes(-len(content) % BLOCK))
        return offset

    def finish(self) -> None:
        """Writes the two zero blocks that end an archive."""
        self._write(bytes(2 * BLOCK))

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._hash.update(content)
        self.num_bytes += len(content)
