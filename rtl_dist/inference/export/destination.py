"""Where an export goes: a folder, or with the name of a file, that file and what lies beside it.

It is filled under a hidden name and bears its own once it was checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import flush_to_disk
from rtl_dist.core.whole_folder import (
    clear_incomplete,
    discard_folder,
    incomplete_folder,
    publish_folder,
)

FORMATS = ("onnx", "pt2", "timm", "hf")
_FILES = {"onnx": ".onnx", "pt2": ".pt2"}
EXAMPLE = "example.py"


class Destination:
    """Of an export in one format.

    Attributes:
        folder: to be filled, by the names that a folder's files have.
    """

    def __init__(self, out: Path, format: str) -> None:
        """
        Raises:
            UserError: something bears the name, or that of a file that comes beside it; or the name
                is of another format.
        """
        suffix = _FILES.get(format, "")
        if out.suffix in _FILES.values() and out.suffix != suffix:
            raise UserError(
                f"--out: {out} has the ending of another format than {format}; give a folder"
                + (f" or a name that ends in {suffix}" if suffix else "")
            )
        self.out, self.format = out, format
        self._is_file = bool(suffix) and out.suffix == suffix
        for path in (out, *self._beside().values()):
            if os.path.lexists(path) and path.name != EXAMPLE:
                raise UserError(f"--out: {path} exists; remove it, or choose another name")
        if not out.parent.is_dir():
            raise UserError(f"--out: there is no folder {out.parent}")
        self.folder = incomplete_folder(out)

    @property
    def image_file(self) -> Path:
        """In ``folder``: takes an image of any size."""
        return self.folder / f"model{_FILES[self.format]}"

    @property
    def batch_file(self) -> Path:
        """In ``folder``: ONNX's second entry."""
        return self.folder / f"batch{_FILES[self.format]}"

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Within the block ``folder`` is there; it is published unless the block raises."""
        clear_incomplete(self.out.parent, re.compile(re.escape(self.out.name)))
        try:
            self.folder.mkdir()
        except OSError as error:
            raise UserError(
                f"--out: cannot write into {self.out.parent}: {error.strerror}"
            ) from error
        try:
            yield
            self._publish()
        finally:
            discard_folder(self.folder)

    def _publish(self) -> None:
        if not self._is_file:
            publish_folder(self.folder, self.out)
            return
        for name, path in self._beside().items():  # the file that is asked for comes last
            if (made := self.folder / name).exists() and not (
                path.name == EXAMPLE and os.path.lexists(path)
            ):
                flush_to_disk(made)
                made.rename(path)
        flush_to_disk(self.image_file)
        self.image_file.rename(self.out)
        flush_to_disk(self.out.parent)

    def _beside(self) -> dict[str, Path]:
        """Where the files of a folder go, that come with a file."""
        if not self._is_file:
            return {}
        out = self.out
        return {
            self.batch_file_name: out.with_name(f"{out.stem}.batch{out.suffix}"),
            "export.json": out.with_name(f"{out.stem}.json"),
            EXAMPLE: out.with_name(EXAMPLE),
        }

    @property
    def batch_file_name(self) -> str:
        return f"batch{_FILES.get(self.format, '')}"
