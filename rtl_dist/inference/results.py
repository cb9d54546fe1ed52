"""Where predictions go: a file that is there once it is whole, or the terminal as they come."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rtl_dist.core.errors import RtlDistError, UserError
from rtl_dist.core.text import shown
from rtl_dist.inference import parquet
from rtl_dist.inference.part import ROWS, Part, open_part
from rtl_dist.inference.prediction import Prediction
from rtl_dist.inference.rows import (
    Column,
    csv_header,
    csv_rows,
    json_lines,
    readable_lines,
    value_lines,
)

Form = Literal[".csv", ".jsonl", ".parquet"]
FORMS: tuple[Form, ...] = (".csv", ".jsonl", ".parquet")
_NAMED = 3  # of the inputs that could not be read


def form_of(out: Path) -> Form:
    """By the name's ending.

    Raises:
        UserError: it is none that is written, or needs what is not installed.
    """
    form = next((form for form in FORMS if out.name.lower().endswith(form)), None)
    if form is None:
        raise UserError(
            f"--out: {shown(str(out))} must end in {', '.join(FORMS[:-1])} or {FORMS[-1]}"
        )
    if form == ".parquet":
        parquet.require_pyarrow()
    return form


def text_of(
    predictions: Sequence[Prediction], columns: Sequence[Column], *, form: Form | None, top: int
) -> str:
    """The rows of predictions.

    Args:
        form: None: for reading.
        top: how many classes are told of each.
    """
    if form == ".csv":
        return csv_rows(columns, predictions)
    if form == ".jsonl":
        return json_lines(predictions, top=top)
    if form == ".parquet":
        return value_lines(columns, predictions)
    return readable_lines(predictions, top=top)


class Results(Protocol):
    """What rank 0 does with the rows of blocks, as they come in order."""

    folder: Path
    """Where files may lie meanwhile."""

    @property
    def blocks(self) -> int:
        """How many are done already."""

    @property
    def failed(self) -> int:
        """Inputs of these that could not be predicted."""

    @property
    def first_failed(self) -> list[str]:
        """The first of them, with their reasons."""

    def begin(self, asked: dict[str, Any], columns: Sequence[Column]) -> None:
        """Before the first block. Raises UserError: what was begun earlier is of something else."""

    def append(self, texts: Sequence[str], failed: Sequence[str]) -> None:
        """The rows of the next blocks, and the inputs among them that have no prediction."""

    def finish(self) -> None:
        """All blocks have come."""

    def close(self) -> None:
        """Whatever became of it."""


class FileResults:
    """A CSV, lines of JSON or Parquet at OUT; see ``Results``."""

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        """
        Raises:
            UserError: OUT cannot be written, or what is there is not of an earlier predict.
        """
        self._out, self._form, self._overwrite = out, form_of(out), overwrite
        if not overwrite:
            self._require_own()
        self._part: Part = open_part(out)
        self._columns: Sequence[Column] = ()
        self.folder = self._part.folder

    @property
    def blocks(self) -> int:
        return self._part.blocks

    @property
    def failed(self) -> int:
        return self._part.failed

    @property
    def first_failed(self) -> list[str]:
        return self._part.first_failed

    def begin(self, asked: dict[str, Any], columns: Sequence[Column]) -> None:
        """See ``Results``."""
        self._columns = columns
        header = csv_header(columns) if self._form == ".csv" else ""
        self._part.begin(asked | {"format": self._form}, header=header, overwrite=self._overwrite)

    def append(self, texts: Sequence[str], failed: Sequence[str]) -> None:
        """See ``Results``."""
        self._part.append(texts, failed)

    def finish(self) -> None:
        """See ``Results``."""
        self._part.record()
        file = self.folder / ROWS
        if self._form == ".parquet":
            file = self.folder / "table"
            parquet.write_parquet(self.folder / ROWS, self._columns, file)
        self._part.publish(file, self._out)

    def close(self) -> None:
        """See ``Results``."""
        self._part.close()

    def _require_own(self) -> None:
        if self._out.is_dir():
            raise UserError(f"--out: {self._out} is a folder; give a file in it")
        if not self._out.exists() or (self._out.is_file() and not self._out.stat().st_size):
            return
        if not self._out.is_file() or not _is_ours(self._out, self._form):
            raise UserError(
                f"--out: {self._out} is there and was not written by predict; choose another file,"
                " or give --overwrite to replace it"
            )


def _is_ours(out: Path, form: Form) -> bool:
    if form == ".parquet":
        return parquet.is_ours(out)
    beginning = b"input,label" if form == ".csv" else b'{"input": '
    try:
        with open(out, "rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


class PrintedResults:
    """Rows on stdout; see ``Results``. Nothing is kept, and nothing goes on."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rtl-dist-predict-"))
        self._blocks, self._failed = 0, 0
        self._first_failed: list[str] = []

    @property
    def blocks(self) -> int:
        return self._blocks

    @property
    def failed(self) -> int:
        return self._failed

    @property
    def first_failed(self) -> list[str]:
        return self._first_failed

    def begin(self, asked: dict[str, Any], columns: Sequence[Column]) -> None:
        """See ``Results``."""

    def append(self, texts: Sequence[str], failed: Sequence[str]) -> None:
        """See ``Results``. Raises RtlDistError: nobody reads them."""
        self._blocks += len(texts)
        self._failed += len(failed)
        self._first_failed = [*self._first_failed, *failed][:_NAMED]
        try:
            for text in texts:
                sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:  # a full disk, or a pipe whose reader has gone
            raise RtlDistError(f"the results cannot be printed: {error.strerror}") from error

    def finish(self) -> None:
        """See ``Results``."""

    def close(self) -> None:
        """See ``Results``."""
        shutil.rmtree(self.folder, ignore_errors=True)
