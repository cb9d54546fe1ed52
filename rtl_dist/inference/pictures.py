"""Pictures of what a model says: a heatmap laid over what the network saw, and a grid of many.

Drawn with Pillow alone, so that both are made in no time and anywhere; the letters are those of the
font that matplotlib brings, in which most scripts of Europe and its neighbours are.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MOST_CELLS = 64
"""That a grid shows; of more inputs it shows the first ones, and says so."""

# Okabe and Ito's, which colour-blind readers tell apart too; on white, as in the reports
FOR, AGAINST = (213, 94, 0), (0, 114, 178)
_PAPER, _INK, _SOFT, _EMPTY = (255, 255, 255), (34, 34, 34), (90, 98, 112), (238, 238, 238)
_WIDE = 1060  # pixels that pages give a picture; a sheet of many is wider
_STRONGEST = 0.8  # of a place's colour in the picture
_TINY = 128  # pixels; smaller pictures are enlarged without blur, so that their pixels are seen


def picture_of(image: torch.Tensor) -> Image.Image:
    """What a network saw, uint8 (C, S, S) with C 1 or 3, as an RGB picture."""
    pixels = image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def with_heatmap(picture: Image.Image, places: np.ndarray) -> Image.Image:
    """The picture in grey under the colours of a map: orange where it speaks for the class, blue
    where against it, as strong as that is of the map's strongest place.

    Args:
        picture: RGB, what the network saw.
        places: float (h, w), one map of ``Heatmaps``.
    """
    strongest = float(np.abs(places).max())
    share = places / strongest if strongest > 0 and math.isfinite(strongest) else 0 * places
    grown = Image.fromarray(share.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(grown), -1.0, 1.0)[..., None]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    colour = np.where(strength > 0, FOR, AGAINST)
    weight = _STRONGEST * np.abs(np.nan_to_num(strength))
    return Image.fromarray(np.rint(grey * (1 - weight) + colour * weight).astype(np.uint8))


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A picture and what is said of it."""

    picture: Image.Image | None
    """RGB, of any size; None: there is none, of what could not be read."""
    heatmap: Image.Image | None = None
    """Beside the picture, of its size; see ``with_heatmap``."""
    lines: Sequence[str] = ()
    """Below it, cut where they are wider; the first one in bold."""


def grid(cells: Sequence[Cell], *, title: str = "") -> Image.Image:
    """Up to 64 cells in rows, few of them large and many small; text stays as large as it is read.

    Args:
        cells: of none there is a page with the title.
        title: a line above them.
    """
    cells = cells[:MOST_CELLS]
    pairs = any(cell.heatmap is not None for cell in cells)
    columns = max(1, math.ceil(math.sqrt(len(cells) / (3 if pairs else 1))))
    side = max(152, min(320, _WIDE // columns // (2 if pairs else 1)))
    gap, size = 12, 14 if side < 200 else 16
    width, height = (2 * side + 4 if pairs else side), side + _height(cells, size)
    head = 2 * size + gap if title else 0
    rows = math.ceil(len(cells) / columns)
    font = _font(size, bold=True)
    across = max(
        columns * (width + gap) + gap, min(1280, math.ceil(font.getlength(title)) + 4 * gap)
    )
    sheet = Image.new("RGB", (across, max(head + rows * (height + gap) + gap, 120)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), _cut(title, font, across - 2 * gap), fill=_INK, font=font)
    for number, cell in enumerate(cells):
        x = gap + (number % columns) * (width + gap)
        y = head + gap + (number // columns) * (height + gap)
        for place, picture in enumerate((cell.picture, cell.heatmap)[: 2 if pairs else 1]):
            _paste(sheet, picture, (x + place * (side + 4), y), side)
        _write(draw, cell.lines, (x, y + side), width, size)
    return sheet


def png_of(picture: Image.Image) -> bytes:
    """The picture as a PNG file; equal pictures give equal bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def _height(cells: Sequence[Cell], size: int) -> int:
    return 6 + round(1.35 * size) * max((len(cell.lines) for cell in cells), default=0)


def _paste(sheet: Image.Image, picture: Image.Image | None, at: tuple[int, int], side: int) -> None:
    """The picture in the middle of a square, on grey."""
    x, y = at
    sheet.paste(_EMPTY, (x, y, x + side, y + side))
    if picture is None:
        return
    scale = side / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    tiny = max(picture.size) < _TINY
    how = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    shown = picture.resize((size[0], size[1]), how)
    sheet.paste(shown, (x + (side - size[0]) // 2, y + (side - size[1]) // 2))


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], width: int, size: int
) -> None:
    x, y = at[0], at[1] + 4
    for number, line in enumerate(lines):
        font = _font(size, bold=number == 0)
        draw.text((x, y), _cut(line, font, width), fill=_SOFT if number else _INK, font=font)
        y += round(1.35 * size)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """As much of a line as fits; what follows two spaces, and else half of its end, where a
    file's name is, stays."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if font.getlength(text) <= width:
        return text
    figure = len(text) - len(text.rpartition("  ")[0]) if "  " in text else 0
    for kept in range(min(len(text) - 1, 200), figure, -1):
        end = figure or kept // 2
        shorter = f"{text[: kept - end]}…{text[len(text) - end :]}"
        if font.getlength(shorter) <= width:
            return shorter
    return "…"


@functools.cache
def _font(size: int, *, bold: bool) -> ImageFont.FreeTypeFont:
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    folder = Path(os.path.dirname(found.origin), "mpl-data", "fonts", "ttf")
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)
