"""PNGs are taken apart before a decoder sees them: damage is an error, never the process's end."""

import io
import struct
import zlib

import numpy as np
import pytest
from pack_images import class_folders, encoded, image_bytes, picture, png_16bit
from PIL import Image

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.decode import decode
from rtl_dist.prepare.packing.pack import pack

ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # fmt: skip


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, data, colour=2, kind=b"IDAT", interlaced=0):
    """A PNG whose chunks are in order, whatever its header and data say."""
    header = (
        width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, colour, 0, 0, interlaced])
    )
    chunks = chunk(b"IHDR", header) + chunk(kind, zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


ROWS = bytes(10 * (1 + 3 * 10))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(10, 11, ROWS), "data ends early"),
        (png(10, 10, b"\x09" + ROWS[1:]), "data is damaged"),
        (png(10, 10, ROWS, kind=b"IDAX"), "chunks that no decoder knows"),
        (png(10, 10, ROWS, colour=3), "contradicts itself"),
        (png(10, 10, ROWS)[:-5], "cut short"),
        (png(10, 10, ROWS).replace(b"IDAT\x78", b"IDAT\x79"), "checksum"),
    ],
)
def test_damaged_png_cannot_kill_the_packer(content, reason, tmp_path):
    """torchvision's decoder would end the process at most of these."""
    source = class_folders(tmp_path / "source", {"bees": 1})
    (source / "bees" / "bad.png").write_bytes(content)
    report = pack(str(source), tmp_path / "out", allow_missing_classes=True)
    assert [file.name for file in report.left_out] == ["bees/bad.png"]
    assert reason in report.left_out[0].reason


def test_every_sort_of_png_is_whole(tmp_path):
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    colour = Image.open(io.BytesIO(image_bytes(1, (37, 29))))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        picture = Image.new(mode, (37, 29), 7) if mode == "I;16" else colour.convert(mode)
        picture.save(folder / f"{mode.replace(';', '')}.png")
    report = pack(str(tmp_path / "source"), tmp_path / "out", allow_missing_classes=True)
    assert (report.left_out, report.num_samples) == ((), {"train": 7})


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 5), (8, 8), (33, 17)])
def test_interlaced_png(size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    passes = [pixels[top::down, left::across] for left, top, across, down in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    whole = png(width, height, rows, interlaced=1)
    assert (decode(whole, 3).permute(1, 2, 0).numpy() == pixels).all()
    with pytest.raises(DataError, match="ends early"):
        decode(png(width, height, rows[:-1], interlaced=1), 3)


def test_stream_without_its_end():
    """libpng looks for input beyond the last row, and takes the process down when there is none."""
    whole = png(10, 10, ROWS)
    cut = chunk(b"IDAT", zlib.compress(ROWS)[:-6])
    with pytest.raises(DataError, match="ends early"):
        decode(whole[:33] + cut + whole[-12:], 3)


def test_other_chunks_within_the_data_are_refused():
    whole, data = png(10, 10, ROWS), zlib.compress(ROWS)
    gap = chunk(b"IDAT", data[:7]) + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", data[7:])
    with pytest.raises(DataError, match="other chunks stand within"):
        decode(whole[:33] + gap + whole[-12:], 3)


def test_a_window_smaller_than_its_matches_is_none_of_a_decoders_business():
    noise = np.random.default_rng(0).bytes(3 * 40)
    rows = b"".join(b"\0" + noise for _ in range(40))  # matches reach back 121 bytes and more
    packed = bytearray(zlib.compress(rows))
    packed[0] = 0x08  # a window of 256 bytes
    packed[1] = 31 - (packed[0] << 8) % 31
    whole = png(40, 40, rows)
    small = whole[:33] + chunk(b"IDAT", bytes(packed)) + whole[-12:]
    assert (decode(small, 3) == decode(whole, 3)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_handed_on_has_the_pictures_pixels(mode, channels):
    """Filters of every kind, rows in several blocks, alpha and interlacing left behind."""
    image = Image.fromarray(picture(700, 500)).convert(mode)
    expected = image.convert("LA" if mode == "LA" else mode).convert("RGBA").convert("RGB")
    pixels = decode(encoded(image, "PNG"), channels).permute(1, 2, 0).numpy().astype(int)
    if channels == 1:
        expected = image.getchannel(0) if mode in ("L", "LA") else expected.convert("L")
        assert abs(pixels[:, :, 0] - np.asarray(expected)).max() <= 1
    else:
        assert (pixels == np.asarray(expected)).all()


def test_gamma_and_profiles_change_nothing():
    """libpng would weigh colours in linear light where a file says how bright it is meant."""
    plain = encoded(Image.fromarray(picture()), "PNG")
    for extra in (chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"sRGB", b"\0")):
        for channels in (1, 3):
            told = plain[:33] + extra + plain[33:]
            assert (decode(told, channels) == decode(plain, channels)).all()


def test_16_bit_colour_as_grey_is_made_of_all_its_bits():
    pixels = np.random.default_rng(0).integers(0, 1 << 16, (12, 9, 3)).astype(np.uint16)
    grey = decode(png_16bit(pixels), 1)[0].numpy().astype(int)
    weighed = pixels @ np.array([0.299, 0.587, 0.114]) / 256
    assert abs(grey - weighed).max() < 1.02


def test_a_large_file_is_never_copied_as_a_whole_again_and_again(monkeypatch):
    """What one call of zlib's leaves is a copy: of a whole file of 180 MB, 11 s of copying."""
    fed, make = [], zlib.decompressobj

    class Inflater:
        def __init__(self):
            self._real = make()

        def decompress(self, data, most):
            fed.append(len(data))
            return self._real.decompress(data, most)

        def __getattr__(self, name):
            return getattr(self._real, name)

    monkeypatch.setattr("rtl_dist.data.images.png.BLOCK_BYTES", 1000)
    monkeypatch.setattr("rtl_dist.data.images.png.zlib.decompressobj", Inflater)
    noise = np.random.default_rng(0).bytes(300 * 100)
    rows = b"".join(b"\0" + noise[i : i + 300] for i in range(0, len(noise), 300))
    decode(png(100, 100, rows), 3)
    assert len(fed) > 30
    assert max(fed) <= 1000
