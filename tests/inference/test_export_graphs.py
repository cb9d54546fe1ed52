"""The graphs that are exported: the view of any image, and networks of many kinds."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from exported_models import FITTED, loaded_model
from grids import one_of_each
from networks import pixels

from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.inference.export.graphs import BatchGraph
from rtl_dist.inference.export.onnx_file import make_batch_onnx
from rtl_dist.inference.export.programs import image_program
from rtl_dist.inference.export.view import View

NETWORKS = {
    "resnet18 of torchvision": ("torchvision:resnet18", 3, {}),
    "small stem": ("resnet18", 3, {"small_stem": True}),
    "grey resnet": ("resnet18", 1, {}),
    "our own": ("basic_cnn", 3, {}),
    "resnext": ("resnext26ts", 3, {}),
    "regnet x": ("regnetx_002", 3, {}),
    "efficientnet": ("efficientnet_b0", 3, {}),
    "mobilenet": ("mobilenetv3_small_050", 3, {}),
    "convnext": ("convnext_atto", 3, {}),
    "torchvision's densenet": ("torchvision:densenet121", 3, {}),
    "squeeze and excite": ("legacy_seresnet18", 3, {}),
}


@pytest.mark.parametrize("kind", one_of_each(NETWORKS))
def test_any_network_gives_the_same_in_onnx(kind):
    name, channels, options = NETWORKS[kind]
    loaded = loaded_model(Path(), name, channels=channels, **options)
    images = pixels(5, channels)
    with torch.inference_mode():
        wanted = FITTED.probabilities(loaded.model(images), SINGLE_LABEL).numpy()
    model = make_batch_onnx(BatchGraph(loaded)).SerializeToString()
    runner = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for size in (1, 2, 5):
        given = images[:size].permute(0, 2, 3, 1).numpy()
        found = runner.run(["probabilities"], {"images": given})[0]
        np.testing.assert_allclose(found, wanted[:size], atol=1e-4)


SIZES = [(1, 1), (1, 9), (7, 1), (33, 47), (257, 301), (97, 2000), (1025, 413), (256, 256), (13, 3)]


@pytest.mark.parametrize(("side", "crop_pct"), [(224, 0.875), (16, 1.0), (96, 0.95), (33, 0.5)])
def test_the_view_has_the_pixels_of_the_evaluation_to_the_last_bit(side, crop_pct):
    view = View(image_size=side, crop_pct=crop_pct)
    transform = EvalTransform(image_size=side, crop_pct=crop_pct, channels=3)
    generator = torch.Generator().manual_seed(side)
    for size in [*SIZES, (side, side), (2 * side, 2 * side - 1)]:
        image = torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)
        found = view(image.permute(1, 2, 0))[0].permute(2, 0, 1)
        assert torch.equal(found, transform.of_pixels(image)), size


def test_the_view_of_a_strip_takes_no_more_memory_than_the_strip():
    image = torch.arange(200_000).remainder(251).to(torch.uint8).repeat(3, 1, 1)
    transform = EvalTransform(image_size=64, crop_pct=0.875, channels=3)
    found = View(image_size=64, crop_pct=0.875)(image.permute(1, 2, 0))[0].permute(2, 0, 1)
    assert torch.equal(found, transform.of_pixels(image))


@pytest.mark.exhaustive
@pytest.mark.parametrize("side", [16, 224])
def test_a_traced_view_takes_all_sizes(side):
    """Torch fixes what it thinks cannot vary, as it sees one image of one size."""
    view = View(image_size=side, crop_pct=0.875)
    traced = image_program(view, 3).module()
    for size in [*SIZES, (side, side), (1500, 1600)]:
        image = torch.randint(0, 256, (*size, 3)).to(torch.uint8)
        assert torch.equal(traced(image), view(image)), size
