"""An image as a caller in Python has it, made what a model is given: file bytes or pixels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.urls import is_url
from rtl_dist.data.images.foreign import MAX_FILE_BYTES
from rtl_dist.data.storage.remote import read_url
from rtl_dist.prepare.image_file import read_image_file

ImageLike: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor"
"""A path or URL, the bytes of an image file, a PIL image, an array uint8 (H, W, 3) or (H, W), or a
tensor uint8 (3 or 1, H, W)."""

_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_KINDS = (
    "a path, the bytes of an image file, a PIL image, a uint8 array (H, W, 3) or (H, W), a list of"
    " these, or an iterator"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """One image on its way to a model."""

    source: str
    """What it is called in the results: its path or URL, else ``image N``, from 0."""
    content: bytes | torch.Tensor | DataError
    """The bytes of its file, or pixels uint8 (C, H, W); or why there are none, to be put behind
    ``source``."""


def is_one_image(images: object) -> bool:
    """Whether this is an image, and not several."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor)
    return isinstance(images, one)


def given(image: object, number: int) -> Given:
    """What a caller gave, read.

    Args:
        image: an ``ImageLike``.
        number: of the image among those given, from 0.

    Raises:
        UserError: it is nothing that can be an image, or pixels of another kind; says the cure.
        RemoteError: the place of a URL cannot be reached.
    """
    if isinstance(image, str | os.PathLike):
        source = os.fspath(image)
        return Given(source=source, content=_read(source))
    source = f"image {number}"
    if isinstance(image, bytes | bytearray | memoryview):
        return Given(source=source, content=bytes(image))
    if isinstance(image, Image.Image):
        source = getattr(image, "filename", "") or source
        return Given(source=source, content=_of_pil(image, source))
    if isinstance(image, np.ndarray):
        return Given(source=source, content=_of_array(image, source))
    if isinstance(image, torch.Tensor):
        return Given(source=source, content=_of_tensor(image, source))
    raise UserError(f"{source}: a {type(image).__name__} is no image; give {_KINDS}")


def _read(source: str) -> bytes | DataError:
    try:
        if is_url(source):
            return read_url(source, MAX_FILE_BYTES)
        if os.path.isdir(source):
            raise UserError(
                f"{source} is a folder; rtl_dist.predict(model, {source!r}) takes folders, tables,"
                " patterns and tars"
            )
        return read_image_file(Path(source), convert=True)
    except DataError as error:
        return error


def _of_pil(image: Image.Image, source: str) -> torch.Tensor | DataError:
    """Turned as its file says, as files are."""
    if image.mode not in (*_GREY, *_COLOUR):
        raise UserError(
            f"{source}: a PIL image of mode {image.mode} has other than 8 bits a channel; choose"
            " which of them to see, and convert('L') or convert('RGB') it"
        )
    try:
        plain = ImageOps.exif_transpose(image).convert("L" if image.mode in _GREY else "RGB")
    except (OSError, ValueError, SyntaxError) as error:  # it is decoded only now
        return DataError(f"cannot be decoded: {error}")
    return _of_array(np.array(plain), source)


def _of_array(array: np.ndarray, source: str) -> torch.Tensor:
    """uint8 (H, W, 3), (H, W, 1) or (H, W)."""
    shape = array.shape
    if array.dtype != np.uint8:
        raise UserError(
            f"{source}: an array of {array.dtype}; pixels are uint8, 0 to 255: if they are shares"
            " of 1, give (255 * x).round().astype('uint8')"
        )
    if array.ndim == 4:
        raise UserError(f"{source}: an array {shape} is a batch; give a list of images: list(x)")
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size:
        raise UserError(f"{source}: an array {shape} is no image; give (H, W, 3) or (H, W)")
    first, _, last = array.shape
    if first in (1, 3) and last not in (1, 3):
        raise UserError(
            f"{source}: an array {shape} has its channels first; give x.transpose(1, 2, 0)"
        )
    if last == 4:
        raise UserError(
            f"{source}: an array {shape} has a fourth channel, of transparency; give x[..., :3]"
        )
    if last not in (1, 3):
        raise UserError(f"{source}: an array {shape} has {last} channels; give 3, or 1 of grey")
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))


def _of_tensor(tensor: torch.Tensor, source: str) -> torch.Tensor:
    """uint8 (3 or 1, H, W), as torchvision reads files."""
    shape = tuple(tensor.shape)
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or shape[0] not in (1, 3):
        raise UserError(
            f"{source}: a tensor {tensor.dtype} {shape} is no image; give uint8 (3, H, W) or"
            " (1, H, W)"
        )
    if not tensor.numel():
        raise UserError(f"{source}: a tensor {shape} has no pixels")
    return tensor.cpu()
