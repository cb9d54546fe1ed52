"""Regions of JPEGs: the pixels and refusals of decoding whole, whatever the file."""

import contextlib
import dataclasses
import io
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pack_images import REAL_DATA
from PIL import Image
from torchvision.transforms import v2

from rtl_dist.config import AugmentConfig
from rtl_dist.core.errors import DataError
from rtl_dist.data.images import augment as augment_module
from rtl_dist.data.images import decode as decode_module
from rtl_dist.data.images import region
from rtl_dist.data.images.augment import TrainTransform
from rtl_dist.data.images.decode import decode
from rtl_dist.data.images.jpeg import jpeg_header

built = pytest.mark.skipif(
    region._native is None,
    reason="the extension is not built (libjpeg-turbo's headers were not there at installation)",
)

KINDS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "optimized": {"subsampling": "4:2:0", "optimize": True, "quality": 95},
    "restarts": {"subsampling": "4:2:0", "restart_marker_blocks": 3},
    "rgb": {"keep_rgb": True},
    "grey": {},
}
SIZES = [(1, 1), (2, 3), (7, 5), (16, 16), (17, 33), (33, 17), (64, 48), (131, 90)]  # width, height


def picture(size, seed=0):
    """Waves with noise on them: all frequencies, and colours that subsampling changes."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 3 + y / 5), np.cos(x / 4 - y / 2), np.sin(x * y / 50)], -1)
    noise = np.random.default_rng(seed).normal(0, 25, waves.shape)
    return Image.fromarray((waves * 90 + 128 + noise).clip(0, 255).astype(np.uint8))


def jpeg(size=(64, 48), kind="4:2:0", **options):
    image = picture(size).convert("L" if kind == "grey" else "RGB")
    file = io.BytesIO()
    image.save(file, "JPEG", **{**KINDS[kind], **options})
    return file.getvalue()


def with_segment(content, marker, data):
    """The JPEG with one more marker segment, the first."""
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + content[2:]


def resampled(content, factors, size):
    """The JPEG with other sampling factors in its header: as many blocks, which mean another
    picture. ``size`` (width, height) must make the number of blocks come out the same."""
    at = content.index(b"\xff\xc0")
    width, height = size
    header = struct.pack(">HH", height, width) + content[at + 9 : at + 11] + bytes([factors])
    return content[: at + 5] + header + content[at + 12 :]


def rotated(orientation, order="<"):
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    mark = b"II" if order == "<" else b"MM"
    tiff = mark + struct.pack(order + "HIH", 42, 8, 1) + entry + b"\0\0\0\0"
    return with_segment(jpeg(), 0xE1, b"Exif\0\0" + tiff)


def crops(size, seed, count):
    """(top, left, height, width): all of it, each border, each corner, and any others."""
    width, height = size
    draw = random.Random(seed)
    yield 0, 0, height, width
    for _ in range(count):
        h, w = draw.randint(1, height), draw.randint(1, width)
        top = draw.choice([0, height - h, draw.randint(0, height - h)])
        left = draw.choice([0, width - w, draw.randint(0, width - w)])
        yield top, left, h, w


def assert_exact(content, channels, *, seed=0, count=40):
    whole = decode(content, channels)
    assert region.region_size(content) == whole.shape[1:]
    for top, left, height, width in crops(whole.shape[:0:-1], seed, count):
        pixels = region.decode_region(content, top, left, height, width, channels)
        assert pixels is not None
        assert pixels.dtype == torch.uint8
        expected = whole[:, top : top + height, left : left + width]
        assert torch.equal(pixels, expected), (top, left, height, width)


def without_regions(monkeypatch):
    monkeypatch.setattr(augment_module, "region_size", lambda content: None)


# --- pixels -------------------------------------------------------------------------------------


@built
def test_the_two_decoders_agree_here():
    assert region.available()


@built
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_those_of_the_whole(kind, size, channels):
    assert_exact(jpeg(size, kind), channels)


@built
def test_every_position_of_a_small_region():
    """Whatever the region's place within the blocks, and the border's."""
    content = jpeg((35, 34))
    whole = decode(content, 3)
    for top in range(34):
        for left in range(35):
            pixels = region.decode_region(content, top, left, 1, 1, 3)
            assert torch.equal(pixels, whole[:, top : top + 1, left : left + 1]), (top, left)


@built
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["hymenoptera", "imagenette-mini", "miml_scene"])
def test_regions_of_photographs(name):
    files = [p for p in sorted((REAL_DATA / name).rglob("*.*")) if p.suffix.lower()[:3] == ".jp"]
    if not files:
        pytest.skip(f"the {name} images are not on this machine")
    random.Random(0).shuffle(files)
    contents = [path.read_bytes() for path in files[:150]]
    contents = [content for content in contents if region.region_size(content)]
    assert len(contents) > 100
    for seed, content in enumerate(contents):
        assert_exact(content, 1 if seed % 4 == 0 else 3, seed=seed, count=8)


@built
def test_a_region_must_lie_within_the_image():
    content = jpeg((20, 30))  # 20 wide, 30 high
    for crop in [
        (0, 0, 31, 20),
        (0, 0, 30, 21),
        (30, 0, 1, 1),
        (0, 20, 1, 1),
        (-1, 0, 2, 2),
        (0, -1, 2, 2),
        (0, 0, 0, 5),
        (0, 0, 5, 0),
        (0, 0, -1, 5),
        (2**31 - 1, 0, 2, 2),
        (0, 2**31 - 1, 2, 2),
    ]:
        with pytest.raises(ValueError):
            region.decode_region(content, *crop, 3)
    with pytest.raises(ValueError, match="channels"):
        region.decode_region(content, 0, 0, 2, 2, 2)
    for size in (0, 11, 13):
        with pytest.raises(ValueError, match="out must hold"):
            region._native.decode_region(content, 0, 0, 2, 2, 3, bytearray(size))


# --- what is decoded whole ----------------------------------------------------------------------


def unsuitable():
    cmyk = io.BytesIO()
    picture((64, 48)).convert("CMYK").save(cmyk, "JPEG")
    png = io.BytesIO()
    picture((64, 48)).save(png, "PNG")
    plain = jpeg()
    yield "progressive", jpeg(progressive=True)
    yield "cmyk", cmyk.getvalue()
    yield "png", png.getvalue()
    yield "4:1:1", resampled(plain, 0x41, (64, 48))
    yield "4:4:0", resampled(jpeg(kind="4:2:2"), 0x12, (64, 48))
    for orientation in range(2, 9):
        yield f"turned {orientation}", rotated(orientation)
    yield "turned, big-endian", rotated(6, ">")
    yield "second exif", with_segment(rotated(6), 0xE1, b"Exif\0\0" + b"\0" * 8)
    yield "no exif", with_segment(plain, 0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff\0\0\0\0")
    yield "12 bits", plain.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    yield "no end", plain[:-2]
    yield "cut", plain[: len(plain) // 2]
    yield "marker inside", plain[:-40] + b"\xff\xda" + plain[-38:]
    yield "header only", plain[:30]
    yield "empty", b""
    yield "two bytes", b"\xff\xd8"
    yield "text", b"not an image at all"


UNSUITABLE = dict(unsuitable())


def outcome(transform, content, key):
    try:
        return transform(content, key)
    except DataError as error:
        return str(error)


def same(a, b):
    return a == b if isinstance(a, str) or isinstance(b, str) else torch.equal(a, b)


@pytest.mark.parametrize("name", UNSUITABLE)
def test_other_files_are_decoded_whole(name):
    content = UNSUITABLE[name]
    assert region.region_size(content) is None
    transform = TrainTransform(AugmentConfig(), image_size=24, channels=3)
    assert same(outcome(transform, content, 3), outcome(reference(AugmentConfig()), content, 3))


@built
def test_upright_photographs_keep_their_regions():
    assert region.region_size(rotated(1)) == (48, 64)
    assert region.region_size(rotated(1, ">")) == (48, 64)
    assert region.region_size(with_segment(jpeg(), 0xE1, b"http://ns.adobe.com/xap/1.0/\0"))


@built
def test_a_file_that_asks_for_too_much_is_not_taken(monkeypatch):
    assert region.region_size(jpeg()) == (48, 64)
    monkeypatch.setattr(region, "MAX_PIXELS", 48 * 64 - 1)
    assert region.region_size(jpeg()) is None


@built
def test_damage_is_left_to_the_whole_decode(monkeypatch):
    """Coded data that ends early makes libjpeg warn and fill up with grey."""
    content = jpeg()
    damaged = content[: -len(content) // 3] + b"\xff\xd9"
    assert region.region_size(damaged) == (48, 64)
    assert region.decode_region(damaged, 40, 0, 8, 64, 3) is None
    transform = TrainTransform(AugmentConfig(), image_size=24, channels=3)
    ours = transform(damaged, 5)
    without_regions(monkeypatch)
    assert torch.equal(ours, transform(damaged, 5))


# --- the transform ------------------------------------------------------------------------------


def reference(augment, side=24, channels=3):
    """torchvision's own transforms on the whole image."""
    crop = v2.RandomResizedCrop(side, scale=augment.crop_scale, ratio=augment.crop_ratio)
    steps = [crop, v2.RandomHorizontalFlip(augment.hflip)]
    if augment.vflip:
        steps.append(v2.RandomVerticalFlip(augment.vflip))
    if augment.rotation:
        steps.append(v2.RandomRotation(augment.rotation, v2.InterpolationMode.BILINEAR))
    if augment.randaugment is not None:
        steps.append(v2.RandAugment(magnitude=augment.randaugment))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if augment.erasing:
        steps.append(v2.RandomErasing(augment.erasing))

    def transform(content, key):
        image = decode(content, channels)
        torch.default_generator.manual_seed(key)
        return v2.Compose(steps)(image)

    return transform


AUGMENTS = {
    "default": AugmentConfig(),
    "small crops": AugmentConfig(crop_scale=(0.02, 0.3)),
    "whole": AugmentConfig(crop_scale=(1.0, 1.0)),
    "no such ratio": AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(3.0, 4.0)),
    "nor this": AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(0.1, 0.2)),
    "flips": AugmentConfig(hflip=0.3, vflip=0.7),
    "rotation": AugmentConfig(vflip=0.5, rotation=20),
    "jitter": AugmentConfig(color_jitter=0.4),
    "randaugment": AugmentConfig(randaugment=9),
    "erasing": AugmentConfig(erasing=0.5),
    "all": AugmentConfig(vflip=0.5, rotation=9, randaugment=5, color_jitter=0.2, erasing=0.5),
}


def test_every_augmentation_of_one_image_is_among_these():
    default = AugmentConfig()
    tried = {
        field.name
        for augment in AUGMENTS.values()
        for field in dataclasses.fields(augment)
        if getattr(augment, field.name) != getattr(default, field.name)
    }
    every = {field.name for field in dataclasses.fields(default)}
    assert tried == every - {"mixup", "cutmix"}, "which mix several; see tests/optim/test_optim.py"


@pytest.mark.parametrize("regions", [pytest.param(True, marks=built), False])
@pytest.mark.parametrize("name", AUGMENTS)
def test_views_are_those_of_torchvisions_transforms(name, regions, monkeypatch):
    if not regions:
        without_regions(monkeypatch)
    files = [jpeg((64, 48)), jpeg((24, 24), "4:4:4"), jpeg((31, 90), "grey")]
    key = 0
    for channels in (1, 3):
        ours = TrainTransform(AUGMENTS[name], image_size=24, channels=channels)
        expected = reference(AUGMENTS[name], channels=channels)
        for content in files:
            for _ in range(12):
                key += 1
                view = ours(content, key)
                assert (view.dtype, view.shape) == (torch.uint8, (channels, 24, 24))
                drawn = torch.rand(1)  # nothing more was drawn, and nothing less
                assert torch.equal(view, expected(content, key)), key
                assert torch.equal(drawn, torch.rand(1)), key


@built
def test_training_decodes_the_region_alone(monkeypatch):
    def refuse(*args):
        raise AssertionError("the whole image was decoded")

    transform = TrainTransform(AugmentConfig(), image_size=24, channels=3)
    expected = transform(jpeg(), 3)
    region.available()  # which compares with the whole decode, once
    monkeypatch.setattr(augment_module, "decode", refuse)
    assert torch.equal(transform(jpeg(), 3), expected)
    with pytest.raises(AssertionError):
        transform(UNSUITABLE["4:4:0"], 3)


@built
def test_a_decoder_that_disagrees_is_not_used(monkeypatch):
    monkeypatch.setattr(region, "decode", lambda *args: decode_module.decode(*args) ^ 1)
    region.available.cache_clear()
    try:
        assert not region.available()
        assert region.region_size(jpeg()) is None
    finally:
        region.available.cache_clear()


# --- hostile files ------------------------------------------------------------------------------


def damaged_variants(seed, count):
    draw = random.Random(seed)
    files = [jpeg(kind=kind) for kind in KINDS] + [jpeg(progressive=True), rotated(1), rotated(6)]
    for _ in range(count):
        content = bytearray(draw.choice(files))
        start = content.index(b"\xff\xda")
        for _ in range(draw.choice([1, 1, 2, 8])):
            # half of them in the headers, which are short
            content[draw.randrange(2, start if draw.random() < 0.5 else len(content))] = (
                draw.choice([0, 0xFF, draw.randrange(256)])
            )
        if draw.random() < 0.3:
            del content[draw.randrange(len(content)) :]
            content += draw.choice([b"", b"\xff\xd9"])
        yield bytes(content)


def fuzz(seed, count):
    """Run by itself, since what it looks for ends the process."""
    transform = TrainTransform(AugmentConfig(crop_scale=(0.05, 1.0)), image_size=24, channels=3)
    whole = reference(AugmentConfig(crop_scale=(0.05, 1.0)))
    regions = 0
    for key, content in enumerate(damaged_variants(seed, count)):
        size = region.region_size(content)
        if size is not None and size[0] * size[1] > 2**22:
            continue  # thousands of pixels a side from a few bytes: legal, and slow to decode
        if size is not None:
            regions += 1
            assert jpeg_header(content)[1::-1] == size, "both find the same header"
        assert same(outcome(transform, content, key), outcome(whole, content, key)), (seed, key)
        # also what was not found suitable must do no harm
        for crop in ((0, 0, 1, 1), (40, 30, 8, 34)):
            with contextlib.suppress(ValueError):
                region.decode_region(content, *crop, 3)
    return regions


@built
@pytest.mark.timeout(300)
def test_damaged_files_end_as_they_do_when_decoded_whole():
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "import test_region; print(test_region.fuzz(0, 800))",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # the tests' tools are there
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 200


@built
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_nothing_is_left_behind():
    content = jpeg()
    cut = content[: -len(content) // 3] + b"\xff\xd9"

    def many(times):
        for _ in range(times):
            assert region.region_size(content)
            assert region.decode_region(content, 3, 5, 30, 40, 3) is not None
            assert region.decode_region(cut, 40, 0, 8, 64, 3) is None
            assert region.region_size(content[:-2]) is None
            with pytest.raises(ValueError):
                region.decode_region(content, 0, 0, 49, 64, 3)

    def resident():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    many(300)
    before = resident()
    many(10_000)
    assert resident() - before < 8 * 2**20
