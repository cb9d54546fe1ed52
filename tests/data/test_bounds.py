"""What an image may ask of its decoder is bounded by what the decoder will really do."""

import struct
import zlib

import pytest
from pack_images import encoded, image_bytes, picture
from PIL import Image

from rtl_dist.core.errors import DataError
from rtl_dist.data.images import foreign, jpeg
from rtl_dist.data.images.decode import decode

FRAME = b"\xff\xc0\0\x11\x08"  # a frame header, up to its height


def claiming(width, height, before=b"", progressive=False):
    """A JPEG that says it is larger, with bytes between its start and its first marker."""
    content = encoded(Image.fromarray(picture()), "JPEG", progressive=progressive)
    frame = FRAME.replace(b"\xc0", b"\xc2") if progressive else FRAME
    at = content.index(frame) + 5
    content = content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]
    return content[:2] + before + content[2:]


@pytest.mark.parametrize(
    "before",
    [
        b"",
        b"\xff\0junk",
        b"\xff\0",
        b"\xff\xff\xff",
        b"\xff\xd0\xff\x01",
        b"\xff\xe0\0\x04ab\xff\0\0junk",
        b"\xff\xe1\0\x13" + FRAME + b"\0\x01\0\x01" + bytes(8),  # small, within a segment
        b"\xff\xe5\0\0",
    ],
    ids=["plain", "junk", "FF 00", "fill", "stand-alone", "mixed", "decoy", "short length"],
)
def test_a_jpegs_size_is_found_as_libjpeg_finds_it(before):
    with pytest.raises(DataError, match=r"has 20000 x 20000 pixels, more than the 178,956,970 pix"):
        decode(claiming(20_000, 20_000, before), 3)
    assert decode(claiming(16, 12, before), 3).shape == (3, 12, 16)


@pytest.mark.parametrize("size", [(0, 12), (16, 0)])
def test_a_jpeg_of_no_size_is_refused(size):
    with pytest.raises(DataError, match="its header says"):
        decode(claiming(*size), 3)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8\xff\xe0\xff\xff",
        b"\xff\xd8\xff no marker",
        b"\xff\xd8\xff\xd9" + image_bytes(0),  # it ends before it begins
        b"\xff\xd8\xff\xda\0\x08\x01\x01\0\0\0\0" + image_bytes(0)[2:],  # data before a header
        b"\xff\xd8\xff\xc0\0\x11\x08\0\x01",
    ],
)
def test_a_jpeg_of_unknown_size_is_refused(content):
    with pytest.raises(DataError, match="a JPEG without a header"):
        decode(content, 3)


def many_scans(number, behind=b""):
    content = encoded(Image.fromarray(picture()), "JPEG", progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * number + b"\xff\xd9" + behind


def test_a_jpeg_of_very_many_scans_is_refused():
    assert decode(many_scans(400), 3).shape == (3, 12, 16)
    with pytest.raises(DataError, match="more than 500 scans"):
        decode(many_scans(500), 3)


def test_the_larger_the_fewer_scans(monkeypatch):
    monkeypatch.setattr(jpeg, "MAX_SCANNED_PIXELS", 50 * 12 * 16)
    assert decode(many_scans(20), 3).shape == (3, 12, 16)
    with pytest.raises(DataError, match="more than 50 scans"):
        decode(many_scans(50), 3)


def test_what_only_looks_like_scans_is_no_reason():
    """A video behind the picture, as telephones put it, and text within it."""
    assert decode(many_scans(3, behind=b"\xff\xda" * 1000), 3).shape == (3, 12, 16)
    content = many_scans(3)
    text = b"\xff\xfe" + struct.pack(">H", 2002) + b"\xff\xda" * 1000
    assert decode(content[:-2] + text + content[-2:], 3).shape == (3, 12, 16)


@pytest.mark.parametrize("kind", ["jpeg", "scans", "png", "webp"])
def test_files_of_very_many_pieces_are_refused(kind, monkeypatch):
    """Some of a gigabyte took minutes, a piece at a time."""
    many = 3000
    if kind == "png":
        content = encoded(Image.fromarray(picture()), "PNG")
        content = content[:33] + (bytes(4) + b"teXt" + bytes(4)) * many + content[33:]
    elif kind == "webp":
        content = encoded(Image.fromarray(picture()), "WEBP") + b"abcd\0\0\0\0" * many
    elif kind == "jpeg":
        content = claiming(16, 12, b"\xff\xe5\0\2" * many)
    else:
        content = many_scans(3)
        text = b"\xff\xfe" + struct.pack(">H", 2002) + b"\xff\xda" * 1000
        content = content[:-2] + text + b"\xff\xe5\0\2" * many + content[-2:]
    assert decode(content, 3).shape == (3, 12, 16)
    monkeypatch.setattr(foreign, "MAX_PIECES", many)
    with pytest.raises(DataError, match="of more than 3,000 pieces"):
        decode(content, 3)


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_that_claims_too_much(lossless):
    content = bytearray(encoded(Image.fromarray(picture()), "WEBP", lossless=lossless))
    if lossless:
        content[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    else:
        content[26:30] = struct.pack("<HH", 16_383, 16_383)
    with pytest.raises(DataError, match="has 16383 x 16383 pixels"):
        decode(bytes(content), 3)


def test_an_animation_is_no_picture():
    frames = [Image.fromarray(picture() ^ i) for i in (0, 255)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="is an animation"):
        decode(content, 3)


def test_a_png_that_claims_too_much():
    content = encoded(Image.fromarray(picture()), "PNG")
    for size, reason in (((50_000, 40_000), "50000 x 40000 pixels, more than the 178,956,970"),
                         ((1_000_001, 1), "more than 1,000,000 on a side")):  # fmt: skip
        header = b"IHDR" + struct.pack(">II", *size) + content[24:29]
        claiming = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        with pytest.raises(DataError, match=reason):
            decode(claiming, 3)
