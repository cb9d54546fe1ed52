"""Every sample of a split is scored once, or there is no figure at all."""

import numpy as np
import pytest
import torch
from tiny_runs import make_dataset

import rtl_dist.evaluation.logits as of_logits
import rtl_dist.evaluation.scoring as room
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.loading.blocks import EVAL_BLOCK
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.evaluation.metrics import compute_metrics
from rtl_dist.model.classifier import Preprocessing
from rtl_dist.model.divided import Divided


class Brightness(torch.nn.Module):
    """Stands for a classifier: three classes by the mean of each colour."""

    preprocessing = Preprocessing(image_size=16, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))

    def forward(self, images):
        return images.float().mean((2, 3))[:, [2, 1, 0]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(make_dataset(tmp_path_factory.mktemp("data"), val=300))


@pytest.fixture
def runtime():
    with Runtime("no") as runtime:
        yield runtime


def score(dataset, runtime, **options):
    split = dataset.split("val")
    divided = Divided(Brightness(), torch.nn.Identity())
    return room.score_split(
        Brightness(), dataset, split, runtime=runtime, workers=0, divided=divided, **options
    )


def test_the_scores_are_in_the_order_of_the_index(dataset, runtime):
    split = dataset.split("val")
    assert split.num_samples > EVAL_BLOCK
    predictions = score(dataset, runtime)
    assert predictions.labels.tolist() == split.labels(np.arange(split.num_samples)).tolist()
    assert (predictions.predicted == predictions.labels).all()
    assert room.metrics_on_every_rank(predictions, runtime) == compute_metrics(predictions)


@pytest.mark.parametrize("change", ["left out", "twice"])
def test_a_block_that_does_not_come_once_is_no_result(dataset, runtime, monkeypatch, change):
    blocks_of = of_logits.blocks_of

    def other_blocks(*given):
        blocks = list(blocks_of(*given))
        return blocks[1:] if change == "left out" else [*blocks, blocks[0]]

    monkeypatch.setattr(of_logits, "blocks_of", other_blocks)
    monkeypatch.setattr(of_logits, "rounds_of", lambda *given: len(other_blocks(*given)))
    with pytest.raises(RuntimeError, match=r"split 'val': \d+ of 300 samples were not counted"):
        score(dataset, runtime)


def test_scores_are_kept_where_they_are_wanted_and_fit(dataset, runtime, monkeypatch):
    whole = score(dataset, runtime)
    assert whole.scores.shape == (300, 3)
    for patch, wanted in ((room.SCORES_BYTES, False), (300 * 3 * 4 - 1, True)):
        monkeypatch.setattr(room, "SCORES_BYTES", patch)
        alone = score(dataset, runtime, keep_scores=wanted)
        assert alone.scores is None
        assert compute_metrics(alone) == compute_metrics(whole)
