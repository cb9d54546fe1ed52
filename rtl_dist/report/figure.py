"""The look of every figure: colours, fonts, axes, and figures to PNG bytes.

Figures are made through matplotlib's object API and drawn by Agg, so no display, no pyplot and no
global state is involved, whatever the environment or a matplotlibrc of the user's says. Colours are
Okabe and Ito's, which stay apart for colour-blind readers; series differ by line style or marker as
well.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtl_dist.core.files import write_bytes
from rtl_dist.core.tolerated import tolerated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
INK = "#222222"
GREY = "#6E6E6E"
PALE = "#DDDDDD"
# The same hue, dark enough for small text on white.
GREEN_TEXT = "#00694C"

CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK, GREY)
LINE_STYLES = ("-", "--", "-.", ":")

_DPI = 120


def new_figure(width: float, height: float) -> Figure:
    """A white figure of that size in inches whose layout keeps labels from overlapping."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Title, axis labels, a light grid and no box."""
    axes.set_title(title, fontsize=12, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.grid(True, color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def outside_legend(axes: Axes, **options: Any) -> None:
    """A legend to the right of the axes, where it can cover nothing."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            fontsize=9,
            frameon=False,
            **options,
        )


def say(axes: Axes, message: str) -> None:
    """A message in the middle of axes that have nothing to show."""
    axes.text(0.5, 0.5, message, ha="center", va="center", transform=axes.transAxes, color=GREY)


def plain(text: str, length: int = 28) -> str:
    """Someone's text made safe to draw: one line, at most ``length`` characters, no formulas.

    ``$`` starts a formula in matplotlib and a leading underscore hides a legend's entry.
    """
    text = "".join(c if c.isprintable() else " " for c in text)
    if len(text) > length:
        text = text[: length - 1] + "…"
    if text.startswith("_"):
        text = " " + text
    return text.replace("$", r"\$")


def draw(path: Path, make: Callable[[], Figure | bytes]) -> bytes | None:
    """Writes a figure, or the PNG that a picture was made, as a file and returns its bytes; where
    that fails, for want of disk or by a fault in the drawing, it says so, and no older picture is
    left there."""
    with tolerated(f"{path.name} could not be drawn"), _matplotlib_as_it_comes():
        made = make()
        picture = made if isinstance(made, bytes) else png(made)
        write_bytes(path, picture)
        return picture
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return None


@contextmanager
def _matplotlib_as_it_comes() -> Iterator[None]:
    """Within the block matplotlib has its own defaults. A backend that the environment names, such
    as a notebook's, need not be there: it is not what is drawn with."""
    named = os.environ.get("MPLBACKEND")
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"
    try:
        import matplotlib
    finally:
        os.environ.pop("MPLBACKEND", None)
        if named is not None:
            os.environ["MPLBACKEND"] = named
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes: no reason to fail or to warn.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
