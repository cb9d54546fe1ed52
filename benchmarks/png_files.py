"""PNG files for `png_decoders.py`: of every sort, damaged, and made to cost much."""

from __future__ import annotations

import itertools
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from rtl_dist.data.images.foreign import PNG_SIGNATURE

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
NAMES = {GREY: "grey", RGB: "RGB", PALETTE: "palette", GREY_ALPHA: "grey+alpha", RGBA: "RGBA"}
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # fmt: skip
Chunk = tuple[bytes, bytes]


def assemble(chunks: list[Chunk]) -> bytes:
    parts = [PNG_SIGNATURE]
    for kind, body in chunks:
        crc = zlib.crc32(kind + body)
        parts += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", crc)]
    return b"".join(parts)


def make_png(
    pixels: np.ndarray,
    colour: int,
    depth: int,
    *,
    interlaced: bool = False,
    extra: tuple[Chunk, ...] = (),
) -> list[Chunk]:
    """The chunks of a PNG of samples (height, width, samples a pixel); ``extra`` come before the
    image data."""
    height, width, _ = pixels.shape
    rows = bytearray()
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = pixels[top::down, left::across]
        if part.size:
            for row in part.reshape(len(part), -1):
                bits = (row[:, None] >> np.arange(depth)[::-1]) & 1
                rows += b"\0" + np.packbits(bits.astype(np.uint8)).tobytes()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    data = zlib.compress(bytes(rows))
    return [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]


def every_sort() -> Iterator[tuple[str, list[Chunk]]]:
    """(name, chunks) of every colour type and depth, alone and with a chunk that may change what
    is shown; under each name plain and interlaced, with and without transparency, in three
    sizes."""
    rng = np.random.default_rng(0)
    turned = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    additions: dict[str, tuple[Chunk, ...]] = {
        "": (),
        "gAMA": ((b"gAMA", struct.pack(">I", 45455)),),
        "sRGB": ((b"sRGB", b"\0"),),
        "eXIf": ((b"eXIf", turned),),
    }
    for colour, samples in SAMPLES.items():
        for depth in DEPTHS.get(colour, (8, 16)):
            transparent = {
                GREY: struct.pack(">H", 1),
                RGB: struct.pack(">HHH", 1, 1, 1),
                PALETTE: bytes(range(2 ** min(depth, 8))),
            }.get(colour)
            palette = rng.integers(0, 256, 3 * 2 ** min(depth, 8), dtype=np.uint8).tobytes()
            needed = ((b"PLTE", palette),) if colour == PALETTE else ()
            for clear, interlaced, addition in itertools.product((0, 1), (0, 1), additions):
                if clear and transparent is None:
                    continue
                tail = ((b"tRNS", transparent),) if clear and transparent else ()
                first = additions[addition]
                name = f"{depth}-bit {NAMES[colour]}" + f" with {addition}" * bool(addition)
                for height, width in ((1, 1), (5, 7), (33, 17)):
                    pixels = rng.integers(0, 2**depth, (height, width, samples))
                    yield name, make_png(
                        pixels, colour, depth, interlaced=bool(interlaced),
                        extra=(*first, *needed, *tail),
                    )  # fmt: skip


def damaged(chunks: list[Chunk], rng: random.Random) -> tuple[str, bytes]:
    """One damage: what a disk or a network does (checksums no longer fit), or what someone who
    means it does (they do)."""
    content = assemble(chunks)
    how = rng.choice(("flip", "cut", "forged flip", "header", "chunk order", "rows", "length"))
    if how == "flip":
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(8, len(changed))] ^= 1 << rng.randrange(8)
        return how, bytes(changed)
    if how == "cut":
        return how, content[: rng.randrange(8, len(content))]
    if how == "length":
        at = rng.choice([n for n in range(8, len(content) - 4) if content[n + 4 : n + 8].isalpha()])
        size = rng.choice((0, 1, 2**31 - 1, 2**32 - 1, rng.randrange(4096)))
        return how, content[:at] + struct.pack(">I", size) + content[at + 4 :]
    changed_chunks = list(chunks)
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    if how == "forged flip" and body:
        flipped = bytearray(body)
        for _ in range(rng.randint(1, 4)):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        changed_chunks[number] = kind, bytes(flipped)
    elif how == "header":
        fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
        field = rng.randrange(7)
        fields[field] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 17, 255))
        if field < 2 and rng.random() < 0.5:
            fields[field] = rng.choice((13_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1))
        changed_chunks[0] = b"IHDR", struct.pack(">IIBBBBB", *fields)
    elif how == "rows":
        number = next(n for n, chunk in enumerate(chunks) if chunk[0] == b"IDAT")
        rows = bytearray(zlib.decompress(chunks[number][1]))
        rows[0] = rng.choice((0, 5, 255))
        rows = rows[: rng.randrange(len(rows) + 1)] + bytes(rng.choice((0, 0, 1, 100_000)))
        data = zlib.compress(bytes(rows))
        changed_chunks[number] = b"IDAT", data[: len(data) - rng.choice((0, 0, 1, 4, 5))]
    else:
        other = rng.randrange(len(chunks))
        what = rng.choice(("drop", "repeat", "swap"))
        if what == "drop":
            del changed_chunks[number]
        elif what == "repeat":
            changed_chunks.insert(other, changed_chunks[number])
        else:
            changed_chunks[number], changed_chunks[other] = chunks[other], chunks[number]
    return how, assemble(changed_chunks)


def bombs(pixels: int) -> Iterator[tuple[str, bytes]]:
    """Files of which a few kilobytes or a few megabytes ask for much more."""
    side = int(pixels**0.5)
    header = struct.pack(">IIBBBBB", side, side, 8, RGB, 0, 0, 0)

    def of(data: bytes, *extra: Chunk, header: bytes = header) -> bytes:
        return assemble([(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")])

    def zeros(count: int) -> bytes:
        packer, block = zlib.compressobj(1), bytes(1 << 20)
        parts = [packer.compress(block) for _ in range(count >> 20)]
        return b"".join([*parts, packer.compress(bytes(count & 0xFFFFF)), packer.flush()])

    one = struct.pack(">IIBBBBB", 1, 1, 8, RGB, 0, 0, 0)
    rows = side * (1 + 3 * side)
    pixel, flood = zlib.compress(bytes(4)), zeros(rows)
    yield "a header of that many pixels, no data", of(b"")
    yield "a header of that many pixels, the data of one", of(pixel)
    yield "that many pixels, all black", of(flood)
    deep = struct.pack(">IIBBBBB", side, side, 16, RGBA, 0, 0, 1)
    yield "the same in 16-bit RGBA, interlaced", of(zeros(8 * side * side + 8 * side), header=deep)
    yield "one pixel, and as much data behind it", of(flood, header=one)
    yield "one pixel, a text of that size", of(pixel, (b"zTXt", b"t\0\0" + flood), header=one)
    yield "one pixel, a profile of that size", of(pixel, (b"iCCP", b"p\0\0" + flood), header=one)
    texts = ((b"zTXt", b"t\0\0" + zeros(900_000)),) * (pixels // 90_000)
    yield f"one pixel, {len(texts)} texts of 0.9 MB", of(pixel, *texts, header=one)
    empty = ((b"IDAT", b""),) * (pixels // 200)
    yield f"one pixel, {len(empty)} empty data chunks", of(pixel, *empty, header=one)
    noise = np.random.default_rng(0).bytes(rows // 6)
    lines = [b"\0" + noise[i : i + 3 * side] for i in range(0, len(noise) - 3 * side, 3 * side)]
    half = struct.pack(">IIBBBBB", side, len(lines), 8, RGB, 0, 0, 0)
    yield "a sixth of the pixels, noise", of(zlib.compress(b"".join(lines), 0), header=half)
