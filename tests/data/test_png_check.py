"""A damaged PNG is found out before a decoder that it could crash; whole ones all pass."""

import io
import zlib

import numpy as np
import pytest
from pack_images import class_folders, image_bytes
from PIL import Image

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.decode import decode
from rtl_dist.data.images.png_check import _ADAM7, check_png
from rtl_dist.prepare.packing.pack import pack


def png(width, height, data, colour=2, kind=b"IDAT", interlaced=0):
    """A PNG whose chunks are in order, whatever its header and data say."""

    def chunk(kind, body):
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + crc

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
        (png(10, 10, ROWS, kind=b"IDAX"), "data ends early"),
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
    passes = [pixels[top::down, left::across] for left, top, across, down in _ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    whole = png(width, height, rows, interlaced=1)
    check_png(whole)
    assert (decode(whole, 3).permute(1, 2, 0).numpy() == pixels).all()
    with pytest.raises(DataError, match="ends early"):
        check_png(png(width, height, rows[:-1], interlaced=1))


def test_stream_without_its_end():
    """libpng looks for input beyond the last row, and takes the process down when there is none."""
    whole = png(10, 10, ROWS)
    packed = zlib.compress(ROWS)
    body = b"IDAT" + packed[:-6]
    cut = len(packed[:-6]).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    with pytest.raises(DataError, match="ends early"):
        check_png(whole[:33] + cut + whole[-12:])


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

    monkeypatch.setattr("rtl_dist.data.images.png_check.BLOCK_BYTES", 1000)
    monkeypatch.setattr("rtl_dist.data.images.png_check.zlib.decompressobj", Inflater)
    noise = np.random.default_rng(0).bytes(300 * 100)
    rows = b"".join(b"\0" + noise[i : i + 300] for i in range(0, len(noise), 300))
    check_png(png(100, 100, rows))
    assert len(fed) > 30
    assert max(fed) <= 1000
