"""PNG decoders beside each other: ours (`data/images/png.py`), torchvision's alone, Pillow's.

    python benchmarks/png_decoders.py --small FOLDER --photos FOLDER [--damages 6000] [--rounds 7]

`FOLDER` holds images of any kind, which become PNGs: the small ones of 32 px, the photographs with
a longer side of 500. The sides:

  checked      ours: taken apart, checked and put together anew, then torchvision
  unchecked    torchvision alone
  pillow       the other candidate: Pillow, with torchvision's rules for alpha, depth and grey

Printed: every sort of PNG of which Pillow's pixels differ from torchvision's; what each side makes
of damaged files, in processes of their own so that a crash is counted; time and memory of files
made to cost much; CPU time an image, the sides alternating within each round, as the median and
the span of the ratios to `checked`.

On 2026-11-28 (2 busy vCPUs of an AMD EPYC, torch 2.15, torchvision 0.29.2, Pillow 13.0.0): of 6,000
damaged files `checked` and `pillow` crashed on none, `unchecked` on 1,646; `pillow` returned other
pixels for 550, `checked` for 140. See `docs/decisions/png-decoder.md`.
About 5 minutes on a quiet machine, and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import os
import random
import resource
import signal
import statistics
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from png_files import assemble, bombs, damaged, every_sort
from torchvision.io import ImageReadMode, decode_png

from rtl_dist.core.errors import DataError
from rtl_dist.data.images.decode import decode
from rtl_dist.data.images.foreign import MAX_PIXELS

Decoder = Callable[[bytes, int], torch.Tensor]
SMALL_PX, PHOTO_PX = 32, 500
LIMIT_S = 60  # a decoder that takes longer is ended and counted
# libpng's weights of red, green and blue for torchvision's 0.2989 and 0.587, of 2^15
GREY_WEIGHTS = np.array([9794, 19234, 3740], np.int32)


# --- the sides ------------------------------------------------------------------------------------


def unchecked(content: bytes, channels: int) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    try:
        image = decode_png(encoded, mode=mode, apply_exif_orientation=True)
    except RuntimeError as error:
        raise DataError(str(error)) from error
    return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image


def pillow(content: bytes, channels: int) -> torch.Tensor:
    """As much like `decode` as Pillow allows: alpha dropped, 16 bits to their upper 8, libpng's
    weights for grey, EXIF orientation applied."""
    if math.prod(struct.unpack(">II", content[16:24].ljust(8, b"\0"))) > MAX_PIXELS:
        raise DataError(f"has more than the {MAX_PIXELS:,} pixels allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
                file.load()
                image = _in_8_bits(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"cannot be decoded: {error}") from error
    except (struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be decoded: {error}") from error
    pixels = np.array(image)
    if pixels.ndim == 3 and channels == 1:
        pixels = (pixels @ GREY_WEIGHTS >> 15).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], channels, axis=2)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """In mode L or RGB."""
    if image.mode.startswith("I"):  # 16-bit grey
        return Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    if image.mode == "LA":
        return image.getchannel("L")
    wanted = "L" if image.mode in ("1", "L") else "RGB"
    return image if image.mode == wanted else image.convert(wanted)


SIDES: dict[str, Decoder] = {"checked": decode, "unchecked": unchecked, "pillow": pillow}


# --- pixels ---------------------------------------------------------------------------------------


def compare_pixels() -> None:
    found: dict[tuple[int, str], list[int]] = {}
    for (name, chunks), channels in itertools.product(every_sort(), (3, 1)):
        content = assemble(chunks)
        ours, theirs = decode(content, channels), pillow(content, channels)
        off = 255 if ours.shape != theirs.shape else int((ours.int() - theirs.int()).abs().max())
        found.setdefault((channels, name), []).append(off)
    for (channels, name), off in found.items():
        if any(off):
            print(f"pixels, {channels} channel(s), {name}: up to {max(off)} of 255 apart")
    same = sum(not any(off) for off in found.values())
    print(f"pixels, {same} of {len(found)} (channels, sort) alike")


# --- damage ---------------------------------------------------------------------------------------


def outcome(decoder: Decoder, content: bytes, channels: int, whole: torch.Tensor) -> str:
    try:
        pixels = decoder(content, channels)
    except DataError:
        return "refused"
    except TimeoutError:
        return "too slow"
    except Exception as error:  # noqa: BLE001 (what lets one out is what is counted)
        return f"{type(error).__name__}: {str(error)[:60]}"
    return "same pixels" if torch.equal(pixels, whole) else "other pixels"


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a fork of this process that did the work: negative, the signal."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # "libpng error: ..."
        code = 1
        try:
            signal.signal(signal.SIGALRM, _too_slow)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 (a fork must not go on as its parent)
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _too_slow(*_: object) -> None:
    raise TimeoutError


def compare_damaged(number: int, seed: int) -> None:
    sources = [(chunks, assemble(chunks)) for _, chunks in every_sort()]
    for name, decoder in SIDES.items():
        found: Counter[str] = Counter()
        slowest, next_one = 0.0, 0
        while next_one < number:
            with tempfile.TemporaryFile("w+") as log:
                start = next_one

                def work(log=log, start=start, decoder=decoder) -> None:
                    for i in range(start, number):
                        rng = random.Random(f"{seed}/{i}")
                        chunks, content = rng.choice(sources)
                        channels = rng.choice((1, 3))
                        how, bad = damaged(chunks, rng)
                        whole = decode(content, channels)
                        log.write(json.dumps([i, how]) + "\n")
                        log.flush()
                        signal.alarm(LIMIT_S)
                        began = time.process_time()
                        what = outcome(decoder, bad, channels, whole)
                        took = time.process_time() - began
                        signal.alarm(0)
                        log.write(json.dumps([i, how, what, took]) + "\n")
                        log.flush()

                status = in_child(work)
                log.seek(0)
                lines = [json.loads(line) for line in log]
            if status == 1:
                raise SystemExit("the benchmark itself failed")
            for _, how, what, took in (line for line in lines if len(line) == 4):
                found[f"{what}, {how}" if what == "other pixels" else what] += 1
                slowest = max(slowest, took)
            next_one = lines[-1][0] + 1
            if status != 0:
                found[f"CRASH ({status}), {lines[-1][1]}"] += 1
        counts = ", ".join(f"{count} {what}" for what, count in sorted(found.items()))
        print(f"damage, {name:<9} of {number}: {counts}; slowest {1e3 * slowest:.0f} CPU-ms")


# --- files made to cost much ----------------------------------------------------------------------


def compare_bombs(pixels: int) -> None:
    print(f"files that ask for {pixels:,} pixels")
    for what, content in bombs(pixels):
        print(f"  {what} ({len(content) / 1e6:.1f} MB)")
        for name, decoder in SIDES.items():

            def work(name=name, decoder=decoder, content=content) -> None:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                signal.alarm(LIMIT_S)
                began = time.process_time()
                ended = outcome(decoder, content, 3, torch.empty(0))
                took = time.process_time() - began
                signal.alarm(0)
                most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                ended = "decoded" if "pixels" in ended else ended
                print(f"    {name:<9} {took:6.2f} CPU-s {most / 1e3:6.0f} MB  {ended}")

            status = in_child(work)
            if status < 0:
                print(f"    {name:<9} CRASH ({status})")


# --- cost -----------------------------------------------------------------------------------------


def pngs_of(folder: Path, side: int, number: int) -> list[bytes]:
    """PNGs with a longer side of that many pixels, of the folder's images in order of name."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
    contents = []
    for file in files[:: max(1, len(files) // number)][:number]:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG", icc_profile=None)
        contents.append(buffer.getvalue())
    return contents


def compare_cost(what: str, contents: list[bytes], *, rounds: int, repeats: int) -> None:
    for channels in (3, 1):
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(rounds):
            order = list(SIDES.items())
            order = order[number % 3 :] + order[: number % 3]
            for name, decoder in order:
                began = time.process_time()
                for content in contents * repeats:
                    decoder(content, channels)
                times[name].append((time.process_time() - began) / len(contents) / repeats)
        for name, took in times.items():
            ratios = [one / base for one, base in zip(took, times["checked"], strict=True)]
            print(
                f"cost, {what}, {channels} channel(s), {name:<9}"
                f" {1e6 * statistics.median(took):8.1f} us,"
                f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--damages", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=40, help="of each size")
    parser.add_argument("--bomb-pixels", type=int, default=MAX_PIXELS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
    torch.set_num_threads(1)
    compare_pixels()
    compare_damaged(args.damages, args.seed)
    compare_bombs(args.bomb_pixels)
    small = pngs_of(args.small, SMALL_PX, args.images)
    photos = pngs_of(args.photos, PHOTO_PX, args.images)
    compare_cost("32 px", small, rounds=args.rounds, repeats=10)
    compare_cost("500 px", photos, rounds=args.rounds, repeats=1)


if __name__ == "__main__":
    main()
