"""Strips of pixels are evaluated: of an enlarged one only the middle is made."""

import numpy as np
import pytest
import torch
from pack_images import encoded
from PIL import Image
from torchvision.transforms import v2

from rtl_dist.data.images import augment
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.data.images.middle import enlarged_middle


def noise(width, height, channels=3):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels))
    return torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "short", "side"),
    [((3000, 1), 16, 14), ((1, 3000), 16, 14), ((997, 7), 50, 40), ((7, 998), 51, 40),
     ((64, 63), 64, 64), ((65, 30), 31, 31), ((2, 1), 256, 224), ((1, 1), 9, 7), ((500, 30), 32, 5),
     ((1001, 3), 256, 224), ((3, 1001), 255, 224)],
)  # fmt: skip
def test_the_middle_is_that_of_the_whole(size, short, side, channels):
    image = noise(*size, channels)
    whole = v2.Resize(short, antialias=True)(image)
    expected = v2.CenterCrop(side)(whole)
    found = enlarged_middle(image, tuple(whole.shape[1:]), side)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("most", [0, 1 << 24])
@pytest.mark.parametrize("size", [(3000, 1), (1, 2900), (20, 30), (300, 280), (40, 256)])
def test_the_view_is_the_same_either_way(size, most, monkeypatch):
    content = encoded(Image.fromarray(noise(*size).permute(1, 2, 0).numpy()), "PNG")
    monkeypatch.setattr(augment, "MOST_ENLARGED", most)
    view = EvalTransform(image_size=48, crop_pct=0.75, channels=3)(content, 0)
    whole = v2.Compose([v2.Resize(64, antialias=True), v2.CenterCrop(48)])
    assert torch.equal(view, whole(noise(*size)))


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000)])
def test_the_longest_strip_is_looked_at(size):
    """As a whole it would become 12 GB."""
    content = encoded(Image.new("RGB", size, (9, 8, 7)), "JPEG", quality=100)
    view = EvalTransform(image_size=224, crop_pct=0.875, channels=3)(content, 0)
    assert view.shape == (3, 224, 224)
    assert view.float().std(dim=(1, 2)).max() == 0
