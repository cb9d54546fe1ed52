"""Small images of every kind, and folders of them."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def image_bytes(seed: int, size: tuple[int, int] = (12, 10), kind: str = "JPEG") -> bytes:
    """A (width, height) picture that is another for every seed."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def class_folders(root: Path, counts: dict[str, int], kind: str = "JPEG", seed: int = 0) -> Path:
    """``counts`` maps a folder, ``ants`` or ``train/ants``, to how many images it gets."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            seed += 1
            (root / folder / f"{i:03d}.{kind.lower()}").write_bytes(image_bytes(seed, kind=kind))
    return root


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a packed data set: relative path to bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(width=16, height=12):
    """A smooth colour picture, so that JPEG changes little."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, (x + y) / 2], 2).astype(np.uint8)


def png_16bit(pixels):
    """A PNG of uint16 (height, width[, 3]), which Pillow cannot write in colour."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
