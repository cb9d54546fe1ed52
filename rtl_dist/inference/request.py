"""What ``rtl-dist predict`` was asked for, and whether that fits the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rtl_dist.config import Precision
from rtl_dist.core.errors import UserError
from rtl_dist.core.text import shown
from rtl_dist.core.urls import Redirects
from rtl_dist.inference.opening import Opened
from rtl_dist.inference.predictor import Flips
from rtl_dist.inference.results import Form, form_of

_READABLE_TOP = 3


@dataclass(frozen=True, kw_only=True)
class Request:
    """All that was asked for."""

    model: str
    """A run, checkpoint or model folder, or an exported file."""
    inputs: Sequence[str]
    """Files, folders, patterns, tables, tars, URLs, ``-``; with ``split``, data sets."""
    out: Path | None = None
    """The file of results; None: they are printed."""
    split: str | None = None
    """Of the data sets that the inputs are."""
    top: int | None = None
    """Classes that are told with their probabilities; None: as many as are usual."""
    threshold: float | None = None
    """Multi-label: from which probability on a label is given; None: the model's own."""
    tta: Flips | None = None
    """What an image is looked at besides; see ``Predictor``."""
    raw: bool = False
    """Whether the model's calibration is left out."""
    explain: Path | None = None
    """A folder for a heatmap of each input; None: there are none."""
    grid: Path | None = None
    """A PNG of the first inputs with what is said of them; None: there is none."""
    allow_errors: int = 0
    """Inputs that may be unreadable without the command failing."""
    workers: Literal["auto"] | int = "auto"
    """Processes of this rank that read and decode."""
    precision: Precision | None = None
    """None: that of the training."""
    file_column: str | None = None
    """Of tables; None: it is found."""
    overwrite: bool = False
    """Whether OUT is replaced whatever it is, and what another request began is given up."""
    as_json: bool = False
    """Whether what is printed is JSON."""
    cache_dir: str | None = None
    """Of remote data sets; see ``Cache``."""
    cache_gb: float | None = None
    """Of remote data sets; see ``Cache``."""
    redirects: Redirects = "origin"
    """Whether they are followed to other servers, too."""

    @property
    def form(self) -> Form | None:
        """What rows are written as; None: for reading."""
        if self.out is not None:
            return form_of(self.out)
        return ".jsonl" if self.as_json else None

    def check(self) -> None:
        """What can be seen without the model.

        Raises:
            UserError: an option has an impossible value.
        """
        if self.out is not None:
            form_of(self.out)
        if self.grid is not None and self.grid.suffix.lower() != ".png":
            raise UserError(f"--grid: {shown(str(self.grid))} must end in .png")
        if self.top is not None and self.top < 1:
            raise UserError(f"--top: {self.top} classes cannot be told; give 1 or more")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold: {self.threshold} is no probability; give 0 to 1")
        if self.allow_errors < 0:
            raise UserError(f"--allow-errors: {self.allow_errors} is no number of inputs")
        if self.workers != "auto" and self.workers < 0:
            raise UserError(f"--workers is {self.workers}: give 0 processes or more")
        if self.file_column is not None and self.split is not None:
            raise UserError("--file-column is for tables, --split for data sets: leave one out")

    def top_of(self, opened: Opened) -> int:
        """Classes that are told with their probabilities.

        Raises:
            UserError: the model has fewer, or an option is not for it.
        """
        if self.threshold is not None and not opened.is_multi_label:
            raise UserError(
                f"--threshold is for models of several labels an image, and {self.model} says one:"
                " leave it out"
            )
        if self.top is not None and self.top > opened.num_classes:
            raise UserError(
                f"--top: {self.top} classes are more than the {opened.num_classes} of {self.model}"
            )
        if self.top is not None:
            return self.top
        if opened.is_multi_label:
            return 0
        return min(_READABLE_TOP, opened.num_classes) if self.form is None else 1
