"""The surest mistakes as a picture, each with its heatmap."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from report_helpers import make_split
from torch import nn

from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.model.classifier import Classifier, Preprocessing
from rtl_dist.model.head import Head
from rtl_dist.report.mistakes import Mistake, mistakes_picture

# torchvision 0.29 announces that its decoder will move to another package.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    made = make_split(tmp_path_factory.mktemp("data"), 6)
    made.index["crc32"][3] ^= 1  # one that cannot be read
    return made


def classifier(*layers):
    torch.manual_seed(0)
    view = Preprocessing(image_size=16, crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Classifier(nn.Sequential(*layers), Head(3, 2), native_head="fc", preprocessing=view)


POOLED = classifier(nn.AdaptiveAvgPool2d(4), nn.AvgPool2d(4), nn.Flatten())
WITHOUT_PLACES = classifier(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))


def drawn(split, model, *, samples=6, task=SINGLE_LABEL, was_said=True):
    mistakes = [
        Mistake(
            sample=sample,
            truth="cat",
            predicted="dog",
            confidence=0.9,
            label=1,
            label_name="dog",
            was_said=was_said,
        )
        for sample in range(samples)
    ]
    content = mistakes_picture(split, mistakes, model, task=task)
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def test_beside_each_mistake_is_its_heatmap_where_one_can_be_made(split, caplog):
    alone, with_maps = drawn(split, None), drawn(split, POOLED)
    assert with_maps.shape != alone.shape  # two columns of pairs, not three of pictures
    without = drawn(split, WITHOUT_PLACES)
    np.testing.assert_array_equal(without, alone)
    assert [record.getMessage() for record in caplog.records] == [
        "the heatmaps of the mistakes could not be made (no heatmap can be made: no layer of this"
        " network has more than one place, as of images of 16 pixels; a network of convolutions or"
        " of tokens has them)"
    ]


def test_orange_speaks_for_the_answer_also_where_it_missed_a_label(split):
    said = drawn(split, POOLED, samples=1, task=MULTI_LABEL)
    missed = drawn(split, POOLED, samples=1, task=MULTI_LABEL, was_said=False)
    side = 320
    one, other = (picture[12 : 12 + side, 16 + side : 16 + 2 * side] for picture in (said, missed))
    orange = one[..., 0] - one[..., 2]
    strong = orange > 60
    assert strong.mean() > 0.05
    assert (other[..., 2] - other[..., 0])[strong].min() > 40


def test_no_mistakes_are_said_to_be_none(split):
    assert (drawn(split, POOLED, samples=0) < 100).any()
