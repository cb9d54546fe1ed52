"""``recipe: auto``: what it chooses, what it leaves to the config, and what it cannot choose for."""

import math

import pytest
import yaml

from rtl_dist.config import Config, parse_config
from rtl_dist.config.recipe import recipe_for
from rtl_dist.core.errors import UserError


def config_of(**changes) -> Config:
    return parse_config({"recipe": "auto", "data": {"path": "d"}, **changes})


@pytest.mark.parametrize("num_images", [1, 20, 244, 1_097, 9_999, 10_000, 100_000, 10_000_000])
def test_its_stages_are_a_head_that_is_solved_and_then_all_of_the_network(num_images):
    recipe = recipe_for(num_images)
    head, finetune = recipe.stages
    assert head.solve
    assert not head.takes_steps
    assert finetune.trainable == "all"
    assert finetune.batchnorm == "frozen"
    assert 0 < finetune.lr <= 1e-2
    assert len(recipe.told) == 3
    # a config in plain keys, and again the same
    parse_config({"data": {"path": "d"}, "stages": [vars(head), vars(finetune)]})


def test_more_images_are_gone_through_less_often_in_no_smaller_batches():
    recipes = [recipe_for(n) for n in (50, 244, 1_097, 5_000, 9_999, 10_000, 60_000, 1_000_000)]
    epochs = [recipe.stages[1].epochs for recipe in recipes]
    steps = [
        math.ceil(epoch * n / recipe.batch)
        for n, epoch, recipe in zip(
            (50, 244, 1_097, 5_000, 9_999, 10_000, 60_000, 1_000_000), epochs, recipes, strict=True
        )
    ]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > epochs[-1] >= 1
    batches = [recipe.batch for recipe in recipes]
    assert batches == sorted(batches)
    assert steps[0] < steps[2] < steps[-1]


def test_what_the_config_says_stays():
    recipe = recipe_for(244, batch=128)
    assert recipe.batch == 128
    assert recipe.stages[1].lr == pytest.approx(2 * recipe_for(244, batch=32).stages[1].lr, rel=0.1)
    assert "as the config says" in recipe.told[0]
    assert recipe_for(244, micro=24).batch % 24 == 0


def test_a_batch_that_is_chosen_need_not_be_made_of_the_microbatches_of_256():
    assert config_of(batch={"micro": 24}).batch.micro == 24
    with pytest.raises(UserError, match=r"batch\.micro: 24 does not divide batch\.global 32"):
        config_of(batch={"micro": 24, "global": 32})
    stage = {"name": "a", "epochs": 1, "lr": 1}
    with pytest.raises(UserError, match=r"batch\.micro: 24 does not divide batch\.global 256"):
        parse_config({"data": {"path": "d"}, "stages": [stage], "batch": {"micro": 24}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"name": "a", "epochs": 1, "lr": 1}]}, "recipe: auto chooses the stages; lea"),
        ({"recipe": "best"}, "recipe: must be one of auto"),
        ({"recipe": None}, "stages: must name at least one stage; recipe: auto chooses them"),
        ({"recipe": ["batch.global 32: so"]}, "stages: must name at least one stage"),
        ({"model": {"weights": "none"}}, "recipe: auto fine-tunes weights that were trained"),
        (
            {"data": {"path": "d", "backend": "stream", "stream_urls": "a.tar"}},
            "recipe: needs data.backend: indexed",
        ),
        ({"optim": {"loss": "focal"}}, "set optim.loss to another, or leave recipe out"),
        ({"optim": {"schedule": "step"}}, "optim.step_size: schedule: step needs it"),
        (
            {"data": {"path": "d", "sampling": "balanced"}, "optim": {"class_weights": "balanced"}},
            "data.sampling: balanced makes up for rare classes",
        ),
    ],
)
def test_what_it_cannot_choose_for_is_told_before_anything_begins(changes, message):
    with pytest.raises(UserError) as told:
        config_of(**changes)
    assert message in str(told.value)


def test_what_was_chosen_reads_back(tmp_path):
    recipe = recipe_for(244)
    stages = [{"name": "a", "epochs": 1, "lr": 1}]
    text = yaml.safe_dump({"recipe": recipe.told, "data": {"path": "d"}, "stages": stages})
    assert parse_config(yaml.safe_load(text)).recipe == recipe.told
