"""Runs whose stages and batch a recipe chose."""

from pathlib import Path

import pytest
import yaml
from tiny_runs import killed_after, make_dataset, metric_rows, require_equal_runs, results, train

from rtl_dist.cli import main
from rtl_dist.config import parse_config, read_run_config
from rtl_dist.config import recipe as rules
from rtl_dist.config.recipe import recipe_for

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
NUM_TRAIN = 57


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def by_recipe(tmp_path, dataset, monkeypatch) -> dict:
    """What makes a tiny config one that a recipe fills in; few steps."""
    monkeypatch.setattr(rules, "STEPS", 4)
    stages = [{"name": "all", "steps": 3, "trainable": "all", "lr": 1e-3, "batchnorm": "train"}]
    pretrained = train(tmp_path, dataset, "pretrained", stages=stages)
    return {
        "recipe": "auto",
        "stages": [],
        "model": {"name": "basic_cnn", "weights": str(pretrained), "head": "new"},
        "batch": {"micro": 4},
        "eval": {"every": "1 epoch"},
    }


def test_the_run_has_the_recipe_in_plain_keys_with_its_reasons(
    tmp_path, dataset, by_recipe, capsys
):
    run = train(tmp_path, dataset, **by_recipe)
    config, recipe = (
        read_run_config(run),
        recipe_for(
            parse_config({"recipe": "auto", "data": {"path": "d"}}).stages, NUM_TRAIN, micro=4
        ),
    )
    assert config.recipe == recipe.told
    assert config.batch.global_ == recipe.batch
    assert [stage.name for stage in config.stages] == ["head", "finetune"]
    assert config.stages[1].lr == recipe.stages[1].lr
    told = capsys.readouterr().err
    assert all(f"recipe: {line}" in told for line in recipe.told)
    rows = metric_rows(run)
    assert rows[0]["stage"] == "head"
    assert rows[-1]["stage"] == "finetune"
    assert rows[-1]["epoch"] == pytest.approx(recipe.stages[1].epochs, abs=recipe.batch / NUM_TRAIN)

    # its config, copied to a file of one's own, is the same run
    copied = tmp_path / "copied.yaml"
    text = (run / "config.yaml").read_text(encoding="utf-8").replace(str(run), f"{run}-again")
    copied.write_text(text, encoding="utf-8")
    assert main(["train", "--config", str(copied)]) == 0
    require_equal_runs(run, Path(f"{run}-again"))


def test_a_run_keeps_its_recipe_whatever_would_be_chosen_later(
    tmp_path, dataset, by_recipe, monkeypatch
):
    whole = train(tmp_path, dataset, "whole", **by_recipe)
    with killed_after(4, monkeypatch):
        train(tmp_path, dataset, "killed", **by_recipe, checkpoint={"every": "1 step"})
    monkeypatch.setattr(rules, "RATE", 7e-2)
    killed = train(tmp_path, dataset, "killed", **by_recipe)
    assert read_run_config(killed).stages == read_run_config(whole).stages
    assert results(killed)["weights_sha256"] == results(whole)["weights_sha256"]
    other = train(tmp_path, dataset, "other", **by_recipe)
    assert read_run_config(other).stages[1].lr > 1e-2


def test_a_run_of_other_stages_is_not_gone_on_with(
    tmp_path, dataset, by_recipe, monkeypatch, capsys
):
    given = {**by_recipe, "recipe": None, "batch": {"global": 32, "micro": 4}}
    given["stages"] = [{"name": "all", "steps": 6, "trainable": "all", "lr": 1e-3}]
    with killed_after(4, monkeypatch):
        train(tmp_path, dataset, **given, checkpoint={"every": "1 step"})
    train(tmp_path, dataset, code=2, **by_recipe)
    assert "the config differs from that of the run" in capsys.readouterr().err


def test_what_was_given_once_is_not_taken_for_what_was_chosen(
    tmp_path, dataset, by_recipe, monkeypatch, capsys
):
    """A short trial is not gone on with as if the recipe had wanted it so short."""
    short = {**by_recipe, "stages": [{"name": "all", "steps": 3}]}
    train(tmp_path, dataset, **short)
    open_again = {**by_recipe, "stages": [{"name": "all"}]}
    train(tmp_path, dataset, code=2, **open_again)
    assert "stages.0.epochs was None and is" in capsys.readouterr().err
    train(tmp_path, dataset, **short)
    assert "already done" in capsys.readouterr().out
    train(tmp_path, dataset, code=2, **{**short, "batch": {"micro": 24}})
    assert "batch.global was" in capsys.readouterr().err


def test_reasons_that_hold_no_more_are_left_out(tmp_path, dataset, by_recipe):
    run = train(tmp_path, dataset, **by_recipe)
    again = f"run.dir={tmp_path / 'again'}"
    arguments = ["train", "--config", str(run / "config.yaml"), again, "stages.1.lr=5e-4"]
    assert main(arguments) == 0
    before, now = read_run_config(run).recipe, read_run_config(tmp_path / "again").recipe
    assert now == [line for line in before if not line.startswith("stages.1.lr")]


def test_what_cannot_go_with_what_was_chosen_is_one_error(tmp_path, dataset, by_recipe, capsys):
    changes = {**by_recipe, "optim": {"schedule": "plateau", "min_lr": 0.1}}
    train(tmp_path, dataset, code=2, **changes)
    error = capsys.readouterr().err
    assert "optim.min_lr: must be below stages.1.lr" in error
    assert "Traceback" not in error


def test_a_recipe_with_nothing_to_choose_says_so(tmp_path, dataset, capsys):
    run = train(tmp_path, dataset, recipe="auto")
    assert "recipe: nothing is left for it to choose" in capsys.readouterr().err
    assert read_run_config(run).recipe is None


def test_find_lr_tests_what_the_recipe_trains(tmp_path, dataset, by_recipe, capsys, monkeypatch):
    monkeypatch.setattr("rtl_dist.training.lr_finder.STEPS", 8)
    train(tmp_path, dataset, **by_recipe)
    config = tmp_path / "run.yaml"
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert content["recipe"] == "auto"
    capsys.readouterr()
    assert main(["find-lr", "--config", str(config)]) == 0
    output = capsys.readouterr()
    assert "head solved" in output.err
    assert "stage finetune: " in output.out.splitlines()[-1]
    assert "from a solved head" in output.out.splitlines()[-1]
    arguments = ["find-lr", "--config", str(config), "stages.0.epochs=1", "--stage", "finetune"]
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert "not after stage head" in output.err
    assert "solved" not in output.out
    assert main(["find-lr", "--config", str(config), "--stage", "fintune"]) == 2
    assert "it has head, finetune" in capsys.readouterr().err
