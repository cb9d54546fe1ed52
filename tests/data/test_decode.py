"""Images of every kind, decoded to what the config asks for; what is none is refused by name."""

import io
import struct

import numpy as np
import pytest
import torch
from pack_images import encoded, picture, png_16bit
from PIL import Image, ImageOps

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.data.images.decode import claimed_pixels, decode


def array(image):
    return image.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_colour_and_grey_are_what_the_config_asks_for(mode, kind, channels):
    source = Image.fromarray(picture()).convert(mode)
    image = decode(encoded(source, kind, **({} if kind == "PNG" else {"quality": 95})), channels)
    assert (image.dtype, image.shape) == (torch.uint8, (channels, 12, 16))
    expected = np.asarray(source.convert("L" if channels == 1 else "RGB")).astype(int)
    assert abs(array(image).squeeze() - expected).mean() < (1 if kind == "PNG" else 5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colour", [False, True])
def test_16_bit_png_keeps_its_upper_bits(colour, channels):
    values = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 341
    pixels = np.stack([values] * 3, 2) if colour else values
    image = decode(png_16bit(pixels), channels)
    assert (image.dtype, image.shape) == (torch.uint8, (channels, 12, 16))
    expected = np.repeat((values >> 8)[:, :, None], channels, 2).astype(int)
    assert abs(array(image) - expected).max() <= (1 if colour and channels == 1 else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    source = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(source, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    image = decode(content, 3)
    assert array(image).shape == np.asarray(upright).shape
    assert abs(array(image) - np.asarray(upright).astype(int)).mean() < 3


@pytest.mark.parametrize("channels", [1, 3])
def test_cmyk_jpeg_has_the_colours_it_was_made_of(channels):
    source = Image.fromarray(picture())
    image = decode(encoded(source.convert("CMYK"), "JPEG", quality=95), channels)
    expected = np.asarray(source.convert("L" if channels == 1 else "RGB")).astype(int)
    assert abs(array(image).squeeze() - expected).mean() < 5


def test_transparency_and_palettes_are_decoded():
    source = Image.fromarray(picture())
    assert decode(encoded(source.convert("RGBA"), "PNG"), 3).shape == (3, 12, 16)
    assert decode(encoded(source.convert("LA"), "PNG"), 1).shape == (1, 12, 16)
    assert decode(encoded(source.convert("P"), "PNG"), 3).shape == (3, 12, 16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xd8\xff",
        b"no image at all",
        b"GIF89a" + bytes(20),
        b"\x89PNG\r\n\x1a\n" + bytes(9),
    ],
    ids=["empty", "jpeg header", "text", "gif", "png header"],
)
def test_what_is_no_image_is_a_data_error(content):
    with pytest.raises(DataError, match=r"\Acannot be decoded: [^\n]+\Z"):
        decode(content, 3)


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 50_000, 40_000), 2 * 10**9),
        (
            b"\xff\xd8\xff\xe0\0\x04ab\xff\xff\xc2\0\x11\x08" + struct.pack(">HH", 65_500, 65_500),
            65_500**2,
        ),
        (b"\xff\xd8\xff\xd0\xff\x01\xff\xc0\0\x11\x08" + struct.pack(">HH", 3, 5) + bytes(9), 15),
        (b"\xff\xd8 no marker", 0),
        (b"\xff\xd8\xff\xe0\xff\xff", 0),
        (b"\x89PNG\r\n\x1a\n", 0),
        (b"", 0),
    ],
    ids=["png", "jpeg", "stand-alone markers", "no marker", "cut", "cut png", "nothing"],
)
def test_a_header_that_claims_too_much_is_refused_before_memory_is_asked_for(content, pixels):
    assert claimed_pixels(content) == pixels
    if pixels > 10**8:
        with pytest.raises(DataError, match="more than the 178,956,970 pixels"):
            decode(content, 3)


def test_an_image_too_elongated_to_be_resized_is_named():
    content = encoded(Image.new("RGB", (65_000, 1)), "JPEG")
    with pytest.raises(DataError, match="is too elongated: 65000 x 1 pixels"):
        EvalTransform(image_size=224, crop_pct=0.875, channels=3)(content, 0)
