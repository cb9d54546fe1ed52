"""A stage's own optimizer: its keys over the run's, and what cannot go together."""

import pytest
import yaml

from rtl_dist.config import OptimConfig, ResolvedStage, load_config, parse_config, to_dict, to_yaml
from rtl_dist.config.resolved_stage import resolve_stages
from rtl_dist.core.errors import UserError


@pytest.fixture
def load(tmp_path):
    """Loads stages ``a`` and ``b`` with the keys given for each, and the run's ``optim``."""

    def load(a="", b="", optim="{}", *overrides):
        stages = [f"{{name: {n}, epochs: 1, lr: 1{k}}}" for n, k in (("a", a), ("b", b))]
        file = tmp_path / "c.yaml"
        file.write_text(
            f"data: {{path: d}}\nstages: [{', '.join(stages)}]\noptim: {optim}\n"
            "early_stop: {metric: val/loss}\n"
        )
        return load_config(file, list(overrides))

    return load


@pytest.fixture
def refusal(load, tmp_path):
    def refusal(*arguments):
        with pytest.raises(UserError) as caught:
            load(*arguments)
        return str(caught.value).replace(f"{tmp_path / 'c.yaml'}: ", "")

    return refusal


def resolved(config) -> list[ResolvedStage]:
    return resolve_stages(config, num_samples=1000)


def test_a_stage_s_own_keys_lie_over_the_run_s(load):
    config = load(", optim: {name: sgd, weight_decay: 0}", "", "{label_smoothing: 0.2, ema: 0.9}")
    a, b = resolved(config)
    assert a.optim == OptimConfig(name="sgd", weight_decay=0, label_smoothing=0.2, ema=0.9)
    assert b.optim == config.optim == OptimConfig(label_smoothing=0.2, ema=0.9)


def test_overrides_reach_a_stage_that_has_no_section(load):
    config = load("", "", "{}", "stages.0.optim.weight_decay=0", "stages.0.optim.name=sgd")
    a, b = resolved(config)
    assert (a.optim.name, a.optim.weight_decay) == ("sgd", 0)
    assert b.optim == OptimConfig()


@pytest.mark.parametrize(
    ("a", "optim", "schedule", "warmup"),
    [
        ("", "{}", "cosine", 0.05),
        ("", "{schedule: linear, warmup: 3}", "linear", 3),
        (", schedule: linear, warmup: 3", "{}", "linear", 3),
        (", schedule: linear, warmup: 3, optim: {name: sgd}", "{}", "linear", 3),
        (", optim: {schedule: linear, warmup: 3}", "{}", "linear", 3),
        (", schedule: linear, optim: {schedule: linear, warmup: 3}", "{}", "linear", 3),
    ],
)
def test_schedule_and_warm_up_of_a_stage_are_its_optimizer_s(load, a, optim, schedule, warmup):
    config = load(a, ", schedule: constant", optim)
    stage = resolved(config)[0]
    assert (stage.schedule, stage.warmup) == (schedule, warmup)
    assert (stage.optim.schedule, stage.optim.warmup) == (schedule, warmup)
    # as a run folder keeps it, and goes on from it
    again = parse_config(yaml.safe_load(to_yaml(config)))
    assert again == config
    assert resolved(again) == resolved(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([", optim: {ema: 0.9}"], "stages.0.optim.ema: there is one average of the whole run; "),
        (
            [", optim: {ema_batchnorm: averaged}"],
            "stages.0.optim.ema_batchnorm: there is one average of the whole run; leave it out and"
            " set optim.ema_batchnorm",
        ),
        (
            ["", "", "{}", "stages.1.optim.ema=0.9"],
            "'stages.1.optim.ema=0.9': stages.1.optim.ema: there is one average",
        ),
        ([", optim: {nme: sgd}"], "unknown key stages.0.optim.nme; did you mean name?"),
        ([", optim: {betas: 1}"], "stages.0.optim.betas: expected a list of 2 numbers"),
        ([", optim: sgd"], "stages.0.optim: expected a section with keys, found 'sgd'"),
        (
            [", schedule: linear, optim: {schedule: cosine}"],
            "stages.0.schedule: linear and optim.schedule: cosine of the same stage differ; give o",
        ),
        (
            [", warmup: 1, optim: {warmup: 0}"],
            "stages.0.warmup: 1.0 and optim.warmup: 0.0 of the same stage differ; give one",
        ),
        # what a stage has from elsewhere is told of there, and once
        (
            [", optim: {name: sgd}", ", optim: {name: sgd}", "{momentum: 2}"],
            "optim.momentum: must lie in 0 to 1, not 2.0",
        ),
        ([", schedule: cosin, optim: {name: sgd}"], "stages.0.schedule: must be one of cosine, "),
        # but how it goes with a key of the stage's own is the stage's affair
        (
            [", optim: {class_weights: balanced}", "", "{logit_adjustment: 1}"],
            "stages.0.optim.logit_adjustment: and class_weights both make up for rare classes",
        ),
        # step
        ([", schedule: step"], "optim.step_size: schedule: step needs it, in epochs"),
        ([", optim: {schedule: step}"], "stages.0.optim.step_size: schedule: step needs it, in"),
        (["", "", "{schedule: step, step_size: 0}"], "optim.step_size: must be positive, in epo"),
        (["", "", "{gamma: 1.5}"], "optim.gamma: must lie between 0 and 1, not 1.5"),
        # plateau
        (["", "", "{factor: 1}"], "optim.factor: must lie between 0 and 1, not 1.0"),
        (["", "", "{patience: -1}"], "optim.patience: must be at least 0"),
        (["", "", "{min_lr: -1}"], "optim.min_lr: must be at least 0"),
        (
            [", optim: {schedule: plateau, min_lr: 1}"],
            "stages.0.optim.min_lr: must be below stages.0.lr, 1.0",
        ),
        (
            [", schedule: plateau, early_stop: {patience: 3}"],
            "optim.patience: stage a would end by early_stop.patience before its rate falls; set t",
        ),
        # across sections, whichever stage it is of
        (
            ["", ", optim: {class_weights: balanced}", "{}", "data.sampling=balanced"],
            "'data.sampling=balanced': data.sampling: balanced makes up for rare classes, as do"
            " stages.1.optim.class_weights and stages.1.optim.logit_adjustment; choose one",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(refusal, arguments, message):
    told = refusal(*arguments)
    assert told.startswith(message)
    assert "\n" not in told


def test_a_section_that_no_stage_is_trained_by_is_in_no_check(load):
    own = ", optim: {class_weights: none}"
    config = load(own, own, "{class_weights: balanced}", "data.sampling=balanced")
    assert list(config.optim_sections()) == ["stages.0.optim", "stages.1.optim"]


def test_configs_without_the_section_are_as_they_were(load):
    tree = to_dict(load())
    for stage in tree["stages"]:
        assert stage.pop("optim") is None  # as an earlier version wrote it
    assert parse_config(tree) == load()
