"""Tiny images: enlarged on the device to the pixels that a worker would have made."""

import numpy as np
import pytest
import torch
from small_sets import order_of, packed
from torch.nn.functional import interpolate

from rtl_dist.config import AugmentConfig
from rtl_dist.data.images.augment import TrainTransform
from rtl_dist.data.images.tiny import TinyView, enlarge, gather_tiny
from rtl_dist.data.loading.microbatches import TrainingMicrobatches
from rtl_dist.data.loading.ring import Request, Ring

SIDE, MICRO, NUM = 32, 6, 24


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    counts = {"train/ants": 13, "train/bees": 11, "val/ants": 1, "val/bees": 1}
    return packed(tmp_path_factory.mktemp("data"), counts).split("train")


def random_views(channels, side, count=60):
    generator = torch.Generator().manual_seed(side)

    def draw(high):
        return int(torch.randint(1, high, (1,), generator=generator))

    for i in range(count):
        shape = (channels, draw(side // 2 + 1), draw(side // 2 + 1))
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        yield TinyView(pixels, bool(i & 1), bool(i & 2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [16, 32, 100, 224])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_enlarging_gives_the_bits_of_torchs_resize(channels, side, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    views = list(random_views(channels, side))
    batch = gather_tiny(views, torch.zeros(len(views) * channels * side * side, dtype=torch.uint8))
    enlarged = enlarge(batch._replace(pixels=batch.pixels.to(device)), side).cpu()
    for view, result in zip(views, enlarged, strict=True):
        resized = interpolate(view.pixels[None], size=[side, side], mode="bilinear", antialias=True)
        flips = [axis for axis, flip in ((-1, view.hflip), (-2, view.vflip)) if flip]
        assert torch.equal(result, resized[0].flip(flips))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_microbatch_that_travels_small_is_the_same_microbatch(train, channels):
    transform = TrainTransform(AugmentConfig(vflip=0.5), image_size=SIDE, channels=channels)
    order = order_of(train)
    microbatches = TrainingMicrobatches(train, transform, order=order, size=MICRO, views=None)
    ring = Ring(microbatches, 1, enlarge_here=True)
    for position in range(0, 2 * NUM, MICRO):
        reply = ring[Request(0, position)]
        assert max(reply.shape[-2:]) <= 12  # as large as the crops, which came from 12 x 10 pixels
        assert (reply.tiny_shapes[:, :2] <= 12).all()
        batch, expected = ring.batch(reply, torch.device("cpu")), microbatches[position]
        assert torch.equal(batch.inputs, expected.inputs)
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.samples, expected.samples)


@pytest.mark.parametrize(
    ("augment", "side"),
    [(AugmentConfig(color_jitter=0.2), SIDE), (AugmentConfig(crop_scale=(1.0, 1.0)), 16)],
    ids=["more than a crop and flips", "hardly smaller"],
)
def test_what_cannot_be_enlarged_or_is_not_tiny_travels_as_it_is(train, augment, side):
    transform = TrainTransform(augment, image_size=side, channels=3)
    order = order_of(train)
    microbatches = TrainingMicrobatches(train, transform, order=order, size=MICRO, views=None)
    ring = Ring(microbatches, 1, enlarge_here=True)
    reply = ring[Request(0, 0)]
    assert reply.tiny_shapes is None
    assert reply.shape == (MICRO, 3, side, side)
    assert torch.equal(ring.batch(reply, torch.device("cpu")).inputs, microbatches[0].inputs)


def test_pixels_and_flips_are_whole_numbers_of_bytes():
    views = [TinyView(torch.full((3, 2, 5), 7, dtype=torch.uint8), True, False)]
    batch = gather_tiny(views, torch.zeros(3 * 2 * 5, dtype=torch.uint8))
    assert batch.shapes.tolist() == [[2, 5, 1, 0]]
    assert batch.shapes.dtype == np.int64
    assert (enlarge(batch, 16) == 7).all()
