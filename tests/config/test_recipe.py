"""``recipe: auto``: what it chooses, what it leaves to the config, and what it cannot choose for."""

from pathlib import Path

import pytest
import yaml

from rtl_dist.config import Config, StageConfig, load_config, parse_config
from rtl_dist.config.recipe import lines_that_hold, recipe_for
from rtl_dist.core.errors import UserError

ALL = StageConfig(name="all", epochs="auto", lr="auto")
SIZES = (1, 50, 244, 1_097, 5_000, 9_999, 10_000, 60_000, 100_000, 10_000_000)


def config_of(**changes) -> Config:
    return parse_config({"recipe": "auto", "data": {"path": "d"}, **changes})


# --- what it says of every data set ---


def test_without_stages_a_head_is_solved_and_then_all_of_the_network_trained():
    head, finetune = config_of().stages
    assert head.solve
    assert not head.takes_steps
    assert finetune.trainable == "all"
    assert finetune.batchnorm == "frozen"
    assert finetune.layer_decay < 1
    assert finetune.takes_steps
    assert (finetune.lr, finetune.epochs, finetune.steps) == ("auto", "auto", None)


def test_what_the_config_says_goes_before():
    given = {"name": "a", "layer_decay": 0.9, "warmup": 7}
    (stage,) = config_of(stages=[given]).stages
    assert (stage.layer_decay, stage.warmup) == (0.9, 7)
    (stage,) = config_of(stages=[{"name": "a"}], optim={"warmup": 7}).stages
    assert stage.warmup is None
    (stage,) = config_of(stages=[{"name": "a", "optim": {"warmup": 7}}]).stages
    assert stage.warmup is None
    (stage,) = config_of(stages=[{"name": "a", "lr": 1e-3, "steps": 3}]).stages
    assert (stage.epochs, stage.steps, stage.lr) == (None, 3, 1e-3)
    assert stage.layer_decay == 0.5


def test_a_rate_that_is_auto_brings_what_it_was_measured_with():
    by_recipe = config_of(stages=[{"name": "a"}]).stages
    assert config_of(stages=[{"name": "a", "lr": "auto"}]).stages == by_recipe
    alone = parse_config(
        {"data": {"path": "d"}, "stages": [{"name": "a", "lr": "auto", "epochs": "auto"}]}
    )
    assert alone.stages == by_recipe
    assert alone.batch.global_ == 256  # only the recipe leaves that open


def test_a_batch_without_keys_is_open_too():
    assert config_of(batch=None).batch.global_ == "auto"
    assert config_of(batch={}).batch.global_ == "auto"


def test_the_caller_s_tree_stays_as_it_is():
    tree = {"recipe": "auto", "data": {"path": "d"}}
    parse_config(tree)
    assert tree == {"recipe": "auto", "data": {"path": "d"}}


@pytest.mark.parametrize("stages", ["", "stages: [{name: head, trainable: head}, {name: all}]"])
@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["stages.1.epochs=3"], {"epochs": 3, "lr": "auto", "layer_decay": 0.5, "warmup": 0.3}),
        (["stages.1.steps=3"], {"epochs": None, "steps": 3, "lr": "auto"}),
        (["stages.1.lr=1e-4"], {"epochs": "auto", "lr": 1e-4, "layer_decay": 0.5, "warmup": 0.3}),
        (["optim.warmup=0.1"], {"warmup": None, "layer_decay": 0.5}),
        (["stages.1.optim.warmup=0.1"], {"warmup": None, "lr": "auto"}),
        (["stages.1.trainable=layer4+", "stages.1.lr=1", "stages.1.epochs=1"], {"layer_decay": 1}),
    ],
)
def test_an_override_means_what_the_same_key_of_the_file_means(tmp_path, stages, overrides, found):
    file = tmp_path / "c.yaml"
    file.write_text(f"recipe: auto\ndata: {{path: d}}\n{stages}\n", encoding="utf-8")
    head = ["stages.0.solve=true"] if stages else []
    stage = load_config(file, [*overrides, *head]).stages[1]
    assert {key: getattr(stage, key) for key in found} == found


def test_a_recipe_may_come_and_go_by_an_override(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: {path: d}\n", encoding="utf-8")
    config = load_config(file, ["recipe=auto", "stages.1.epochs=3"])
    assert [stage.name for stage in config.stages] == ["head", "finetune"]
    assert config.stages[1].epochs == 3
    file.write_text("recipe: auto\ndata: {path: d}\nstages: [{name: a}]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"stages\.0\.lr: is required"):
        load_config(file, ["recipe=null"])


# --- what it says of a number of images ---


@pytest.mark.parametrize("num_images", SIZES)
def test_every_number_of_images_gets_a_whole_config(num_images, tmp_path):
    config = config_of()
    recipe = recipe_for(config.stages, num_images)
    assert recipe.stages[0] == config.stages[0]
    assert 0 < recipe.stages[1].lr <= 1e-2
    told = [line.partition(":")[0].split() for line in recipe.told]
    assert [key for key, _ in told] == ["batch.global", "stages.1.epochs", "stages.1.lr"]
    chosen = (recipe.batch, recipe.stages[1].epochs, recipe.stages[1].lr)
    assert [float(value) for _, value in told] == list(chosen)


def test_more_images_are_gone_through_less_often_in_no_smaller_batches():
    recipes = [recipe_for([ALL], num_images) for num_images in SIZES]
    epochs = [recipe.stages[0].epochs for recipe in recipes]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] > epochs[-1] >= 1
    batches = [recipe.batch for recipe in recipes]
    assert batches == sorted(batches)


def test_rate_and_batch_follow_what_is_given():
    recipe = recipe_for([ALL], 244, batch=128)
    assert recipe.batch == 128
    assert recipe.stages[0].lr == pytest.approx(
        2 * recipe_for([ALL], 244, batch=32).stages[0].lr, rel=0.1
    )
    assert not any("batch.global" in line.split(":")[0] for line in recipe.told)
    assert recipe_for([ALL], 244, micro=24).batch % 24 == 0


def test_a_stage_that_says_all_is_left_alone():
    whole = [StageConfig(name="a", steps=5, lr=0.1), StageConfig(name="b", epochs=2, lr=0.1)]
    recipe = recipe_for(whole, 244, batch=8)
    assert recipe.stages == whole
    assert recipe.told == []


def test_what_was_told_says_what_was_chosen():
    recipe = recipe_for([StageConfig(name="h", trainable="head", solve=True), ALL], 244)
    chosen = {
        "batch.global": recipe.batch,
        "stages.0.lr": None,
        "stages.1.epochs": recipe.stages[1].epochs,
        "stages.1.lr": recipe.stages[1].lr,
    }
    assert list(lines_that_hold(recipe.told, chosen).values()) == recipe.told
    keys = [key for key, value in chosen.items() if value is not None]
    assert list(lines_that_hold(recipe.told, chosen)) == keys
    for key in keys:
        others = lines_that_hold(recipe.told, {**chosen, key: 7})
        assert list(others) == [other for other in keys if other != key]
    assert lines_that_hold("auto", chosen) == lines_that_hold(None, chosen) == {}


@pytest.mark.parametrize(
    "line", ["", ":", "what a user wrote", "batch.global", "batch.global x: y"]
)
def test_lines_that_a_person_changed_are_left_out(line):
    told = recipe_for([ALL], 244).told
    chosen = {"batch.global": 32, "stages.0.lr": "auto"}
    assert lines_that_hold([line, *told, line], chosen) == {"batch.global": told[0]}
    newer = "stages.0.lr 0.5: newer"
    assert lines_that_hold([*told, newer], {"stages.0.lr": 0.5}) == {"stages.0.lr": newer}


# --- what it cannot choose for ---


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
        ({"recipe": "best"}, "recipe: must be one of auto"),
        ({"recipe": None}, "stages: is required"),
        ({"recipe": None, "stages": []}, "stages: must name at least one stage; recipe: auto"),
        ({"recipe": ["batch.global 32: so"], "stages": [{"name": "a"}]}, "stages.0.lr: is"),
        ({"stages": [{"name": "a", "trainable": "layer4+"}]}, "stages.0.lr: is required"),
        (
            {"stages": [{"name": "a", "trainable": "layer4+", "lr": 1}]},
            "stages.0.epochs: a stage has either epochs or steps",
        ),
        (
            {"stages": [{"name": "a", "trainable": "layer4+", "lr": "auto", "epochs": 1}]},
            "stages.0.lr: auto is for a stage that trains all",
        ),
        (
            {"recipe": None, "stages": [{"name": "a", "lr": "auto", "epochs": 1}]}
            | {"model": {"weights": "none"}},
            "model.weights: none, and stages.0.lr: auto",
        ),
        ({"stages": {"a": 1}}, "stages: expected a list"),
        ({"stages": ["a"]}, "stages.0: expected a section"),
        (
            {"model": {"weights": "none"}},
            "model.weights: none, and batch.global and stages.1.epochs and stages.1.lr: auto",
        ),
        (
            {"data": {"path": "d", "backend": "stream", "stream_urls": "a.tar"}},
            "stages.0.solve: needs data.backend: indexed",
        ),
        ({"optim": {"loss": "focal"}}, "stages.0.solve: the focal loss has no one optimum"),
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


def test_what_was_chosen_reads_back_and_changes_nothing(tmp_path: Path):
    told = recipe_for([ALL], 244).told
    tree = {"recipe": told, "data": {"path": "d"}, "stages": [{"name": "a", "epochs": 1, "lr": 1}]}
    read = parse_config(yaml.safe_load(yaml.safe_dump(tree)))
    assert read.recipe == told
    assert read.stages == parse_config({**tree, "recipe": None}).stages
