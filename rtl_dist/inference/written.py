"""What a predict writes, which is no input of it: found as one, a picture of its results would be
predicted, its next start would see other inputs than the first, and an input be lost under it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rtl_dist.core.errors import UserError
from rtl_dist.core.text import shown


class Written:
    """The files and folders that a predict writes."""

    def __init__(
        self,
        work: Path,
        *,
        out: Path | None = None,
        grid: Path | None = None,
        explain: Path | None = None,
    ) -> None:
        """
        Args:
            work: a folder for what is on its way.
            out, grid: files.
            explain: a folder.
        """
        given = {"--out": out, "--grid": grid, "--explain": explain}
        self._options = {
            path: option
            for option, place in given.items()
            if place is not None
            for path in _spellings(place)
        }
        self._folders = {path for place in (work, explain) if place for path in _spellings(place)}

    def has(self, path: str) -> bool:
        """Whether a file is one of them."""
        absolute = os.path.abspath(path)
        return absolute in self._options or os.path.dirname(absolute) in self._folders

    def refuse(self, word: str) -> None:
        """
        Raises:
            UserError: an input that was named is one of them.
        """
        for path in _spellings(Path(word)):
            if path in self._options:
                raise UserError(
                    f"{self._options[path]}: {shown(word)} is one of the inputs, which it would"
                    " replace; choose another place"
                )


def _spellings(place: Path) -> Iterator[str]:
    """Its path, links followed and not."""
    yield os.path.abspath(place)
    yield os.path.realpath(place)
