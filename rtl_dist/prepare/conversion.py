"""Images of other formats made into ones that are read here, where ``pack --convert`` asks for it.

GIFs of one picture, BMPs and TIFFs of 8 bits become PNGs, HEIC and AVIF (of phones) JPEGs.
"""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Iterable

from PIL import Image, ImageOps

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.foreign import require_allowed, suffix_of

_BY_PILLOW = {"GIF": "GIF", "BMP": "BMP", "TIFF": "TIFF"}
_BY_HEIF = ("HEIC", "AVIF")
_KIND = re.compile(r"is an? ([\w ]+) file, not a")
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_JPEG_QUALITY = 95
_BITS_PER_SAMPLE = 258  # a TIFF's tag; Pillow would take the upper 8 of 16
_INSTALL = "pip install 'rtl_dist[heic]'"


def convertible(reason: str) -> str | None:
    """The format that a reason to leave a file out names, if files of it can be converted."""
    found = _KIND.search(reason)
    return found[1] if found and found[1] in (*_BY_PILLOW, *_BY_HEIF) else None


def cure_of(reasons: Iterable[str]) -> str:
    """How files that were left out for these reasons can be had; empty: there are none such."""
    kinds = sorted({kind for reason in reasons if (kind := convertible(reason))})
    if not kinds:
        return ""
    needs_more = set(kinds) & set(_BY_HEIF) and importlib.util.find_spec("pillow_heif") is None
    return f"{', '.join(kinds)} files can be converted: give --convert" + (
        f", after {_INSTALL}" if needs_more else ""
    )


def kind_to_convert(head: bytes) -> str | None:
    """What a file is, by its first 16 bytes, that must be converted; None: it need not be, or
    cannot."""
    try:
        suffix_of(head)
    except DataError as error:
        return convertible(str(error))
    return None


def as_readable(content: bytes) -> bytes:
    """An image file as it is, or converted where it must be. Raises as ``converted``."""
    kind = kind_to_convert(content[:16])
    return content if kind is None else converted(content, kind)


def converted(content: bytes, kind: str) -> bytes:
    """The file of an image of ``kind`` as a PNG or JPEG, upright.

    Raises:
        DataError: it cannot be decoded, is larger than allowed, or is more than one plain picture.
    """
    if kind in _BY_HEIF:
        _register_heif()
    formats = [_BY_PILLOW[kind]] if kind in _BY_PILLOW else ["HEIF", "AVIF"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes below our own bound, and of odd tags
            with Image.open(io.BytesIO(content), formats=formats) as image:
                require_allowed(*image.size)
                if kind in _BY_PILLOW and getattr(image, "n_frames", 1) > 1:
                    raise DataError(f"is a {kind} of several pictures: keep the one that is meant")
                bits = max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
                if image.mode not in (*_GREY, *_COLOUR) or bits > 8:
                    raise DataError(
                        f"is a {kind} of other than 8 bits a channel: choose which of them"
                        " to see, and save it as a PNG"
                    )
                upright = ImageOps.exif_transpose(image)
                plain = upright.convert("L" if image.mode in _GREY else "RGB")
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"is a {kind} that cannot be decoded: {error}") from error
    file = io.BytesIO()
    if kind in _BY_HEIF:
        plain.save(file, "JPEG", quality=_JPEG_QUALITY)
    else:
        plain.save(file, "PNG")
    return file.getvalue()


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise DataError(f"is converted by pillow-heif, which is not there: {_INSTALL}") from error
    pillow_heif.register_heif_opener()
    if hasattr(pillow_heif, "register_avif_opener"):
        pillow_heif.register_avif_opener()
