"""Damaged and odd image files by the thousand: each is pixels or one sort of error, in a process
that lives on and prints nothing."""

import io
import json
import os
import random
import struct
import zlib

import pytest
from PIL import Image

from rtl_dist.core.errors import DataError
from rtl_dist.data.images import foreign
from rtl_dist.data.images.decode import decode_file
from rtl_dist.data.images.doubts import doubt_of

MODES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"),
         "WEBP": ("RGB", "RGBA"), "GIF": ("P", "L")}  # fmt: skip


def sound_files():
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, modes in MODES.items():
        for mode in modes:
            for size in ((1, 1), (9, 7), (40, 33)):
                noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
                image = Image.new(mode, size, 7) if mode == "I;16" else noise.convert(mode)
                for options in ({}, {"exif": exif}, {"progressive": True}, {"lossless": True}):
                    if kind == "GIF" and options:
                        continue
                    file = io.BytesIO()
                    image.save(file, kind, **options)
                    yield kind, file.getvalue()


def chunks_of(png):
    at = 8
    while at < len(png):
        (size,) = struct.unpack_from(">I", png, at)
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        at += 12 + size


def forged(png, rng):
    """Chunks changed, moved and repeated, with checksums that fit."""
    chunks = list(chunks_of(png))
    for _ in range(rng.choice((1, 1, 2, 3))):
        number = rng.randrange(len(chunks))
        kind, body = chunks[number]
        how = rng.choice(("body", "data", "kind", "drop", "repeat", "swap", "split", "window"))
        if how == "body" and body:
            changed = bytearray(body)
            changed[rng.randrange(len(body))] = rng.choice((0, 1, 3, 8, 16, 255))
            chunks[number] = kind, bytes(changed)
        elif how == "kind":
            chunks[number] = (
                rng.choice((b"IDAT", b"PLTE", b"tRNS", b"IEND", b"ABCD", b"a\0cd")),
                body,
            )
        elif how == "drop":
            del chunks[number]
            chunks = chunks or [(b"IEND", b"")]
        elif how == "repeat":
            chunks.insert(rng.randrange(len(chunks) + 1), (kind, body))
        elif how == "swap":
            other = rng.randrange(len(chunks))
            chunks[number], chunks[other] = chunks[other], chunks[number]
        elif how == "split":
            between = [(rng.choice((b"tEXt", b"IDAT", b"gAMA")), b"")] * rng.randrange(2)
            chunks[number : number + 1] = [(kind, body[:5]), *between, (kind, body[5:])]
        elif kind == b"IDAT" and len(body) > 2 and how == "window":
            head = rng.randrange(8) << 4 | 8
            chunks[number] = kind, bytes([head, 31 - (head << 8) % 31]) + body[2:]
        elif kind == b"IDAT":
            try:
                rows = bytearray(zlib.decompress(body))
            except zlib.error:
                continue
            rows[rng.randrange(len(rows)) if rows else 0 :] = rng.randbytes(rng.choice((0, 1, 900)))
            chunks[number] = kind, zlib.compress(bytes(rows), rng.randrange(10))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        parts += [struct.pack(">I", len(body)), kind, body]
        parts += [struct.pack(">I", zlib.crc32(kind + body))]
    return b"".join(parts)


def odd(kind, content, rng):
    if kind == "PNG" and rng.random() < 0.7:
        return forged(content, rng)
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        # most of them in the headers, which are short
        place = rng.randrange(min(len(changed), rng.choice((40, 300, len(changed)))))
        how = rng.random()
        if how < 0.7:
            changed[place] = rng.choice((0, 0xFF, changed[place] ^ 1, rng.randrange(256)))
        elif how < 0.8:
            changed[place:place] = rng.randbytes(rng.choice((1, 2, 40)))
        elif how < 0.9:
            del changed[place : place + rng.choice((1, 2, 40))]
        else:
            changed[place : place + 2] = rng.choice((b"\xff\xda", b"\xff\0", b"\xff\xd9", b"II"))
        changed = changed or bytearray(b"\0")
    return bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed) + 1)))])


def fuzz(seed, count):
    """How many were decoded, and how many refused."""
    files, decoded, refused = list(sound_files()), 0, 0
    rng = random.Random(seed)
    for _ in range(count):
        kind, content = rng.choice(files)
        try:
            image = decode_file(odd(kind, content, rng), rng.choice((1, 3)))
        except DataError:
            refused += 1
        else:
            doubt_of(image)
            decoded += 1
    return decoded, refused


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("seed", "count"), [(0, 3000), pytest.param(1, 200_000, marks=pytest.mark.exhaustive)]
)
def test_an_image_is_pixels_or_an_error_and_never_the_end_of_a_process(
    seed, count, capfd, tmp_path, monkeypatch
):
    monkeypatch.setattr(foreign, "MAX_PIXELS", 1 << 20)  # larger ones are legal, and slow
    child = os.fork()
    if not child:
        code = 1
        try:
            (tmp_path / "found").write_text(json.dumps(fuzz(seed, count)))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    decoded, refused = json.loads((tmp_path / "found").read_text())
    assert refused > count // 4
    assert decoded > count // 10
    assert capfd.readouterr().err == "", "libjpeg's and libpng's words without a file's name"
