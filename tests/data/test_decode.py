"""Images of every kind, decoded to what the config asks for; what is none is refused by name."""

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pack_images import encoded, picture, png_16bit
from PIL import Image, ImageOps

from rtl_dist.config import AugmentConfig
from rtl_dist.core.errors import DataError
from rtl_dist.data.images import decode as decoder
from rtl_dist.data.images.augment import TrainTransform
from rtl_dist.data.images.decode import decode, decode_file


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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_is_applied_to_the_last_pixel(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(Image.fromarray(picture()), kind, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert (array(decode(content, 3)) == np.asarray(upright)).all()


def tiff(order, kind, value, count=1, at=8):
    """A TIFF with one tag, the orientation."""
    start = b"II" if order == "<" else b"MM"
    head = start + struct.pack(order + "HI", 42, at) + bytes(at - 8)
    return head + struct.pack(order + "HHHI", 1, 0x0112, kind, count) + value + bytes(4)


def with_app1(*bodies):
    content = encoded(Image.fromarray(picture()), "JPEG", quality=95)
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body for body in bodies)
    return content[:20] + segments + content[20:]


SIX = tiff("<", 3, struct.pack("<HH", 6, 0))
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"


@pytest.mark.parametrize(
    ("bodies", "turned"),
    [
        ((XMP, b"Exif\0\0" + SIX), True),
        ((b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 40, b"Exif\0\0" + SIX), True),
        ((b"FLIR\0\x01\0\0" + bytes(40), b"Exif\0\0" + SIX), True),
        ((b"", b"Exif\0\0" + SIX), True),
        ((b"Exif\0\0" + tiff(">", 4, struct.pack(">I", 6)),), True),
        ((b"Exif\0\0" + tiff("<", 4, struct.pack("<I", 6)),), True),
        ((b"Exif\0\0" + tiff(">", 1, b"\6\0\0\0"),), True),
        ((b"Exif\0\0" + tiff(">", 3, b"\0\6\0\0", at=200),), True),
        ((b"Exif\0\0" + tiff(">", 3, b"\0\0\0\0"),), False),
        ((b"Exif\0\0" + tiff(">", 3, b"\0\x09\0\0"),), False),
        ((b"Exif\0\0" + tiff(">", 2, b"6\0\0\0"),), False),
        ((b"Exif\0\0" + SIX[:14],), False),
        ((b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff",), False),
        ((b"Exif\0\0",), False),
        ((b"FLIR\0\0" + SIX,), False),
    ],
)
def test_a_jpegs_orientation_is_that_of_its_exif_segment_wherever_it_stands(bodies, turned):
    content = with_app1(*bodies)
    expected = (16, 12) if turned else (12, 16)
    assert decode(content, 3).shape[1:] == expected
    view = TrainTransform(AugmentConfig(crop_scale=(1, 1), hflip=0), image_size=16, channels=3)
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(with_app1(b"Exif\0\0" + SIX))))
    near = np.asarray(whole.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    # as trained on: some are decoded by region, without the rest
    assert (abs(array(view(content, 0)) - near).mean() < 12) == turned


def test_exif_in_a_png_behind_its_data():
    content = encoded(Image.fromarray(picture()), "PNG")
    chunk = b"eXIf" + SIX
    exif = struct.pack(">I", len(SIX)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert decode(content[:-12] + exif + content[-12:], 3).shape == (3, 16, 12)
    damaged = exif[:-1] + bytes([exif[-1] ^ 1])
    assert decode(content[:-12] + damaged + content[-12:], 3).shape == (3, 12, 16)


def test_what_a_decoder_warns_of_is_told_and_not_printed(capfd):
    whole = encoded(Image.fromarray(picture(128, 128)), "JPEG", quality=90)
    start = whole.index(b"\xff\xda") + 14
    half = whole[: start + (len(whole) - start) // 2] + b"\xff\xd9"
    for _ in range(2):
        assert "premature end of data" in decode_file(half, 3).warning
        assert decode_file(whole, 3).warning == ""
    assert capfd.readouterr().err == ""


def test_what_others_say_meanwhile_goes_on_to_stderr(capfd, monkeypatch):
    real = decoder.decode_jpeg

    def decode_jpeg(*args, **options):
        os.write(2, b"a thread's line, \xff\n")
        return real(*args, **options)

    monkeypatch.setattr(decoder, "decode_jpeg", decode_jpeg)
    assert decode_file(encoded(Image.fromarray(picture()), "JPEG"), 3).warning == ""
    monkeypatch.undo()
    assert capfd.readouterr().err == "a thread's line, \ufffd\n"


def test_the_rest_of_a_process_keeps_its_stderr(capfd):
    """Forked workers and closed files included."""
    content = encoded(Image.fromarray(picture()), "JPEG")
    decode(content, 3)
    child = os.fork()
    if not child:
        decode(content[:-40] + b"\xff\xd9", 3)
        os.write(2, b"child\n")
        os.close(2)
        decode(content, 3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert decode_file(content, 3).warning == ""
    os.write(2, b"parent\n")
    assert capfd.readouterr().err == "child\nparent\n"


def test_threads_that_decode_at_once_leave_stderr_where_it_was(capfd):
    content = encoded(Image.fromarray(picture(200, 200)), "JPEG")
    before = os.fstat(2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: decode(content, 3), range(200)))
    assert os.path.samestat(os.fstat(2), before)
    os.write(2, b"said\n")
    assert capfd.readouterr().err == "said\n"


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
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff", "cannot be decoded: a JPEG without a header"),
        (b"no image at all", "is not a JPEG, PNG or WebP"),
        (b"GIF89a" + bytes(20), "is a GIF file, not a JPEG, PNG or WebP"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "cannot be decoded: the PNG is cut short"),
        (b"RIFF\0\0\0\0WEBP", "cannot be decoded: a WebP without a header"),
    ],
    ids=["empty", "jpeg header", "text", "gif", "png header", "webp header"],
)
def test_what_is_no_image_is_a_data_error(content, reason):
    with pytest.raises(DataError) as caught:
        decode(content, 3)
    assert str(caught.value) == reason
