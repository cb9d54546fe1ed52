"""Views of a frozen part: what determines them, made, found again, and read in stream order."""

import dataclasses

import numpy as np
import pytest
import torch
from small_sets import flip_byte, order_of, packed

from rtl_dist.config import (
    AugmentConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    ModelConfig,
    StageConfig,
)
from rtl_dist.config.resolved_stage import StageSpan, resolve_stage
from rtl_dist.core.errors import DataError
from rtl_dist.data.images.augment import EvalTransform, TrainTransform
from rtl_dist.data.loading.blocks import blocks_of_rank, num_rounds
from rtl_dist.data.loading.microbatches import TrainingMicrobatches
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.ahead import batches_ahead
from rtl_dist.features.maker import FeatureMaker
from rtl_dist.features.microbatches import ViewMicrobatches, views_of_stage
from rtl_dist.features.views import ViewPlanner, key_of
from rtl_dist.model.build import make_classifier
from rtl_dist.model.divided import divide

SIDE, MICRO, SEED, NUM_VIEWS = 16, 4, 3, 2
NUM = {"train": 11, "val": 5}
CPU = torch.device("cpu")
EVAL = EvalTransform(image_size=SIDE, crop_pct=0.875, channels=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    counts = {"train/ants": 6, "train/bees": 5, "val/ants": 2, "val/bees": 3}
    return packed(tmp_path_factory.mktemp("data"), counts)


@pytest.fixture
def runtime():
    with Runtime("no") as one:
        yield one


@pytest.fixture(scope="module")
def frozen():
    data = DataConfig(path="x", image_size=SIDE)
    config = ModelConfig(name="basic_cnn", weights="none")
    return divide(make_classifier(config, data, num_classes=2, seed=0), "head", dtype=None).frozen


def resolved(**changes):
    stage = StageConfig(name="head", steps=1, trainable="head", lr=0.1, views=NUM_VIEWS)
    config = Config(data=DataConfig(path="x", image_size=SIDE), stages=[stage])
    return dataclasses.replace(resolve_stage(0, config, StageSpan(0, 1), num_samples=8), **changes)


def planner(frozen, dataset, runtime, **changes):
    arguments = {"model_name": "basic_cnn", "first_trained": "head", "stage": resolved(),
                 "channels": 3, "seed": SEED, "micro_batch_size": MICRO}  # fmt: skip
    return ViewPlanner(frozen, dataset=dataset, runtime=runtime, **(arguments | changes))


def maker(root, frozen, dataset, runtime):
    features = FeaturesConfig(cache_dir=str(root))
    plans = planner(frozen, dataset, runtime)
    return FeatureMaker(plans, features, runtime=runtime, workers=0, uses_store=True)


# --- identity ----------------------------------------------------------------------------------


def test_keys_stay_what_they_were():
    """Or what users have in their stores is computed again."""
    content = {"weights": "abc", "split": "train", "view": 0, "augment": {"hflip": 0.5}}
    assert key_of(content) == "76ee1369e0f224f1e0f82af2ed0663a4"


def test_a_view_is_determined_by_what_its_features_depend_on(frozen, dataset, runtime):
    plans = planner(frozen, dataset, runtime)
    training = plans.training(dataset.split("train"), 1)
    evaluation = plans.evaluation(dataset.split("val"), EVAL)
    network = {"format", "network", "weights", "dataset", "precision", "device", "torch"}
    common = network | {"torchvision", "split", "channels", "block"}
    assert set(training.content) == common | {"augment", "image_size", "seed", "view"}
    assert set(evaluation.content) == common | {"eval"}
    assert training.content["network"][::2] == ["basic_cnn", "head"]
    assert training.content["block"] == training.shape.block_size == MICRO
    assert evaluation.content["block"] == evaluation.shape.block_size == 64
    assert evaluation.content["eval"] == {"image_size": SIDE, "crop_pct": 0.875}
    assert (training.number, evaluation.number) == (1, None)
    for plan in (training, evaluation):
        assert plan.key == key_of(plan.content)
        assert plan.shape.num_samples == NUM[plan.split.name]


def test_what_changes_the_images_changes_the_key_and_mixing_does_not(frozen, dataset, runtime):
    split = dataset.split("train")

    def key(number=0, **changes):
        return planner(frozen, dataset, runtime, **changes).training(split, number).key

    keys = {
        key(),
        key(number=1),
        key(seed=4),
        key(micro_batch_size=2),
        key(model_name="other"),
        key(first_trained="layer3"),
        key(stage=resolved(image_size=8)),
        key(stage=resolved(augment=AugmentConfig(hflip=0.0))),
    }
    assert len(keys) == 8
    assert key(stage=resolved(augment=AugmentConfig(mixup=0.5))) == key()


# --- made, and read ----------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [None, 7])
def test_features_are_what_the_frozen_part_makes_of_each_microbatch(
    tmp_path, frozen, runtime, damage
):
    counts = {"train/ants": 6, "train/bees": 5, "val/ants": 1, "val/bees": 1}
    dataset = packed(tmp_path, counts)
    split = dataset.split("train")
    if damage is not None:
        flip_byte(split, damage)
    views = maker(tmp_path / "store", frozen, dataset, runtime).training_views(
        split, (0, 1), samples_to_come=1000
    )
    order = order_of(split, seed=SEED)
    cached = ViewMicrobatches(
        views=views, num_views=NUM_VIEWS, order=order, split=split, size=MICRO
    )
    transform = TrainTransform(AugmentConfig(), image_size=SIDE, channels=3)
    images = TrainingMicrobatches(split, transform, order=order, size=MICRO, views=NUM_VIEWS)
    positions = range(0, 4 * NUM["train"], MICRO)
    for position, found in zip(
        positions, batches_ahead(cached, positions, device=CPU), strict=True
    ):
        expected = images[position]
        assert torch.equal(found.samples, expected.samples)
        assert torch.equal(found.labels, expected.labels)
        assert torch.allclose(found.inputs, frozen(expected.inputs), atol=1e-6)
    assert len(cached.bad) == (0 if damage is None else 2)  # once a view


def test_views_are_computed_once_and_damaged_ones_again(
    tmp_path, frozen, dataset, runtime, computed
):
    val = dataset.split("val")
    first = maker(tmp_path, frozen, dataset, runtime).evaluation_view(val, EVAL)
    again = maker(tmp_path, frozen, dataset, runtime).evaluation_view(val, EVAL)
    assert computed == ["val"]
    assert torch.equal(first.features, again.features)
    features = first.features.clone()  # of the file that is damaged
    assert again.used.tolist() == list(range(NUM["val"]))
    (file,) = tmp_path.glob("*/features.bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    mended = maker(tmp_path, frozen, dataset, runtime).evaluation_view(val, EVAL)
    assert computed == ["val", "val"]
    assert torch.equal(features, mended.features)


def test_an_evaluation_of_a_damaged_sample_is_refused_and_nothing_is_left(
    tmp_path, frozen, runtime
):
    dataset = packed(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 2, "val/b": 2})
    flip_byte(dataset.split("val"), 1)
    with pytest.raises(DataError, match="cannot evaluate exactly: sample 1"):
        maker(tmp_path / "store", frozen, dataset, runtime).evaluation_view(
            dataset.split("val"), EVAL
        )
    assert list((tmp_path / "store").iterdir()) == []


def test_views_that_cost_more_than_they_save_are_not_made(
    tmp_path, frozen, dataset, runtime, computed
):
    split, numbers = dataset.split("train"), (0, 1)
    ours = maker(tmp_path, frozen, dataset, runtime)
    assert ours.training_views(split, numbers, samples_to_come=21) is None
    assert computed == []
    assert ours.training_views(split, numbers, samples_to_come=22) is not None
    assert computed == ["train", "train"]
    assert ours.training_views(split, numbers, samples_to_come=0) is not None  # found


# --- numbers -----------------------------------------------------------------------------------


def test_the_views_of_a_stage_are_those_its_samples_are_seen_in():
    for first, end, batch, num_samples, num_views in np.random.default_rng(0).integers(
        1, [20, 20, 8, 30, 5], size=(200, 5), endpoint=True
    ):
        end = first + end
        epochs = np.arange(first * batch, end * batch) // num_samples
        assert views_of_stage(
            num_views,
            first_step=first,
            end_step=end,
            global_batch_size=batch,
            num_samples=num_samples,
        ) == tuple(sorted(set((epochs % num_views).tolist())))


@pytest.mark.parametrize("num_samples", [0, 1, 4, 5, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_each_block_is_one_rank_s(num_samples, world_size):
    shares = [
        blocks_of_rank(num_samples, 4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(first for share in shares for first in share) == list(range(0, num_samples, 4))
    assert max(map(len, shares)) == num_rounds(num_samples, 4, world_size=world_size)
