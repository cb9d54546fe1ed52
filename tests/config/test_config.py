"""The config: strict YAML, conversions by type, overrides, refusals that name path and cure."""

import dataclasses
import os
import re
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from rtl_dist.config import load_config, parse_config, read_run_config, to_dict, to_yaml
from rtl_dist.core.errors import UserError
from rtl_dist.core.intervals import Every
from rtl_dist.train import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MINIMAL = "data: {path: d}\nstages: [{name: head, epochs: 2, lr: 1e-3}]\n"


@pytest.fixture
def load(tmp_path):
    """Loads YAML text, with overrides."""

    def load(text, *overrides):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        return load_config(file, list(overrides))

    return load


@pytest.fixture
def refusal(load, tmp_path):
    """The message with which YAML text is refused, less the file's name."""

    def refusal(text, *overrides):
        with pytest.raises(UserError) as caught:
            load(text, *overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message.removeprefix(f"{tmp_path / 'c.yaml'}: ")

    return refusal


def with_section(section):
    return MINIMAL + section


# --- unknown keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_section("optm: {}"), "unknown key optm; did you mean optim?"),
        (with_section("optim: {weight_decy: 0}"), "unknown key optim.weight_decy; did you mean"),
        (with_section("batch: {globl: 8}"), "unknown key batch.globl; did you mean global?"),
        (
            "data: {path: d}\nstages: [{name: a, epochs: 1, lr: 1}, {nme: b, epochs: 1, lr: 1}]",
            "unknown key stages.1.nme; did you mean name?",
        ),
        (with_section("optim: {xyzzy: 0}"), "unknown key optim.xyzzy; known here: name, "),
        (with_section("1: 2"), "unknown key 1; known here: seed, "),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_nearest(refusal, text, message):
    assert refusal(text).startswith(message)


def test_the_field_name_behind_a_key_is_no_key(refusal):
    assert refusal(with_section("batch: {global_: 8}")).startswith("unknown key batch.global_")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{name: a, epochs: 1, lr: 1}]", "data: is required"),
        ("data: {}\nstages: [{name: a, epochs: 1, lr: 1}]", "data.path: is required"),
        ("data: null\nstages: [{name: a, epochs: 1, lr: 1}]", "data.path: is required"),
        ("data: {path: d}\nstages: [{name: a, epochs: 1}]", "stages.0.lr: is required"),
    ],
)
def test_what_has_no_default_is_required(refusal, text, message):
    assert refusal(text) == message


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        # whole numbers
        ("seed: true", "seed: expected a whole number, found True"),
        ("seed: 1.0", "seed: expected a whole number, found 1.0"),
        ("seed: '1'", "seed: expected a whole number, found '1'"),
        ("seed: null", "seed: expected a whole number, found None"),
        ("data: {path: d, bad_samples: 1e3}", "data.bad_samples: expected a whole number"),
        # numbers
        ("optim: {weight_decay: true}", "optim.weight_decay: expected a number, found True"),
        ("optim: {weight_decay: much}", "optim.weight_decay: expected a number, found 'much'"),
        ("optim: {weight_decay: [1]}", "optim.weight_decay: expected a number, found [1]"),
        ("optim: {weight_decay: null}", "optim.weight_decay: expected a number, found None"),
        # text
        ("run: {dir: 3}", "run.dir: expected text, found 3"),
        ("run: {dir: null}", "run.dir: expected text, found None"),
        ("track: {project: [a]}", "track.project: expected text, found ['a']"),
        # true or false
        ("run: {ledger: 1}", "run.ledger: expected true or false, found 1"),
        ("run: {ledger: 'yes'}", "run.ledger: expected true or false, found 'yes'"),
        # one of several
        ("precision: bf8", "precision: must be one of auto, no, fp16, bf16, fp64; found 'bf8'"),
        ("precision: true", "precision: must be one of auto, no, fp16, bf16, fp64; found True"),
        ("data: {path: d, channels: 2}", "data.channels: must be one of 1, 3; found 2"),
        ("data: {path: d, channels: true}", "data.channels: must be one of 1, 3; found True"),
        ("data: {path: d, channels: 1.0}", "data.channels: must be one of 1, 3; found 1.0"),
        ("run: {resume: false}", "run.resume: must be one of auto, never, must; found False"),
        # one of several, or a number
        (
            "batch: {micro: big}",
            "batch.micro: must be one of auto; found 'big'; or expected a whole",
        ),
        (
            "batch: {micro: true}",
            "batch.micro: must be one of auto; found True; or expected a whole",
        ),
        (
            "data: {path: d, workers: 1.5}",
            "data.workers: must be one of auto; found 1.5; or expect",
        ),
        ("compile: 1", "compile: must be one of auto; found 1; or expected true or false"),
        # a number or null
        ("optim: {clip_grad_norm: no}", "optim.clip_grad_norm: expected a number, found False"),
        ("augment: {randaugment: 9.5}", "augment.randaugment: expected a whole number, found 9.5"),
        # pairs
        ("augment: {crop_scale: 0.5}", "augment.crop_scale: expected a list of 2 numbers, found 0"),
        (
            "augment: {crop_scale: [0.1, 0.5, 1]}",
            "augment.crop_scale: expected a list of 2 numbers",
        ),
        ("augment: {crop_scale: [a, 1]}", "augment.crop_scale: expected a number, found 'a'"),
        # recurring events
        ("eval: {every: 1}", "eval.every: expected something like '1 epoch', found 1"),
        ("eval: {every: daily}", "eval.every: expected something like '1 epoch' or '200 steps', n"),
        ("eval: {every: 0 steps}", "eval.every: expected a positive number of steps, not 0"),
        ("eval: {every: 1.5 steps}", "eval.every: expected a positive number of steps, not 1.5"),
        # sections and lists
        ("optim: adamw", "optim: expected a section with keys, found 'adamw'"),
        ("stages: {name: a}", "stages: expected a list, found {'name': 'a'}"),
        ("stages: null", "stages: expected a list, found None"),
        ("stages: [head]", "stages.0: expected a section with keys, found 'head'"),
        (
            "stages: [{name: a, epochs: 1, lr: 1, trainable: 5}]",
            "stages.0.trainable: expected text, found 5; or expected a list, found 5",
        ),
        (
            "stages: [{name: a, epochs: 1, lr: 1, trainable: [head, 5]}]",
            "stages.0.trainable: expected text, found ['head', 5]; or stages.0.trainable.1: expec",
        ),
    ],
)
def test_a_wrong_type_is_refused_with_its_path(refusal, section, message):
    tree = yaml.safe_load(MINIMAL) | yaml.safe_load(section)
    assert refusal(yaml.safe_dump(tree)).startswith(message)


@pytest.mark.parametrize("value", [".nan", ".inf", "nan", "-inf", "1e999", "9" * 400])
def test_a_number_must_be_finite(refusal, value):
    message = refusal(with_section(f"augment: {{rotation: {value}}}"))
    assert message.startswith("augment.rotation: expected a number, found ")


def test_numbers_are_converted_by_the_type_of_their_field(load):
    config = load(
        "seed: 7\ndata: {path: d}\n"
        "stages: [{name: a, epochs: 2, lr: 1e-3}, {name: b, steps: 3, lr: '3E4'}]\n"
        "optim: {weight_decay: 1, warmup: 0, clip_grad_norm: 1e1, betas: [0, 1e-1]}"
    )
    values = [
        *(config.stages[0].lr, config.stages[0].epochs, config.stages[1].lr),
        *(config.optim.weight_decay, config.optim.warmup, config.optim.clip_grad_norm),
        *config.optim.betas,
    ]
    assert values == [1e-3, 2.0, 3e4, 1.0, 0.0, 10.0, 0.0, 0.1]
    assert {type(value) for value in values} == {float}
    assert type(config.seed) is int
    assert type(config.stages[1].steps) is int


@pytest.mark.parametrize("word", ["no", "off", "false"])
def test_what_yaml_makes_of_no_and_off_is_taken_back(load, word):
    config = load(
        f"{MINIMAL}precision: {word}\ntrack: {{wandb: {word}}}\ncompile: {word}\n".replace(
            "lr: 1e-3", f"lr: 1e-3, cache: {word}"
        )
    )
    assert (config.precision, config.track.wandb, config.compile) == ("no", "off", False)
    assert config.stages[0].cache == "off"


def test_null_is_a_value_where_the_type_allows_it(load):
    config = load(
        "data: {path: d, test: null}\n"
        "stages: [{name: a, epochs: null, steps: 2, lr: 1, views: null}]\n"
        "optim: {clip_grad_norm: null}"
    )
    assert (config.data.test, config.optim.clip_grad_norm) == (None, None)
    assert (config.stages[0].epochs, config.stages[0].views) == (None, None)


# --- impossible combinations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("stages: []", "stages: must name at least one stage"),
        ("stages: [{name: a, lr: 1}]", "stages.0.epochs: a stage has either epochs or steps"),
        (
            "stages: [{name: a, epochs: 1, steps: 1, lr: 1}]",
            "stages.0.epochs: a stage has either epochs or steps",
        ),
        ("stages: [{name: a, epochs: 0, lr: 1}]", "stages.0.epochs: must be positive"),
        ("stages: [{name: a, steps: 0, lr: 1}]", "stages.0.steps: must be positive"),
        ("stages: [{name: a, steps: 1, lr: 0}]", "stages.0.lr: must be positive or auto, not 0.0"),
        ("stages: [{name: a, steps: 1, lr: 1, layer_decay: 0}]", "stages.0.layer_decay: must lie"),
        ("stages: [{name: a, steps: 1, lr: 1, views: 0}]", "stages.0.views: must be positive"),
        ("stages: [{name: a, steps: 1, lr: 1, trainable: []}]", "stages.0.trainable: must name"),
        (
            "stages: [{name: a, steps: 1, lr: 1}, {name: a, steps: 1, lr: 1}]",
            "stages: names must differ, not ['a', 'a']",
        ),
        ("seed: -1", "seed: must lie in 0 to 2^63 - 1"),
        ("batch: {global: 0}", "batch.global: must be auto or positive"),
        ("batch: {micro: 0}", "batch.micro: must be auto or positive"),
        ("batch: {global: 10, micro: 4}", "batch.micro: 4 does not divide batch.global 10"),
        ("checkpoint: {keep: 0}", "checkpoint.keep: must be at least 1"),
        ("calibrate: {coverage: 1}", "calibrate.coverage: must lie between 0 and 1, not 1.0"),
        (
            "calibrate: {precision_target: 95}",
            "calibrate.precision_target: must lie between 0 and 1",
        ),
        ("early_stop: {metric: val/top2}", "early_stop.metric: must be one of auto, val/top1, "),
        ("early_stop: {patience: 0}", "early_stop.patience: must be positive or null"),
        ("model: {dropout: 1}", "model.dropout: must lie in 0 to 1, not 1.0"),
        ("optim: {label_smoothing: 1.1}", "optim.label_smoothing: must lie in 0 to 1, not 1.1"),
        ("optim: {ema: 1}", "optim.ema: must lie in 0 to 1, not 1.0"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas: must lie in 0 to below 1, not [0.9, 1.0]"),
        ("optim: {clip_grad_norm: 0}", "optim.clip_grad_norm: must be positive or null"),
        ("optim: {warmup: -1}", "optim.warmup: must be at least 0"),
        ("optim: {weight_decay: -1}", "optim.weight_decay: must be at least 0"),
        ("augment: {hflip: 2}", "augment.hflip: must lie in 0 to 1, not 2.0"),
        ("augment: {crop_scale: [0.5, 0.4]}", "augment.crop_scale: must be 0 < low <= high <= 1"),
        ("augment: {crop_ratio: [2, 1]}", "augment.crop_ratio: must be 0 < low <= high"),
        ("augment: {mixup: -1}", "augment.mixup: must be at least 0"),
        ("augment: {randaugment: 31}", "augment.randaugment: must be null or 0 to 30, not 31"),
        ("data: {path: d, image_size: 7}", "data.image_size: must be at least 8, not 7"),
        ("data: {path: d, crop_pct: 0}", "data.crop_pct: must lie in 0 to 1, not 0.0"),
        ("data: {path: d, val_fraction: 1}", "data.val_fraction: must lie in 0 to 1"),
        ("data: {path: d, workers: -1}", "data.workers: must be auto or at least 0"),
        ("data: {path: d, bad_samples: -1}", "data.bad_samples: must be at least 0"),
        ("data: {path: d, backend: stream}", "data.stream_urls: names the tars"),
        ("data: {path: d, stream_urls: a.tar}", "data.stream_urls: names the tars"),
        (
            "data: {path: d, backend: stream, stream_urls: a.tar}\naugment: {cutmix: 1}",
            "augment.cutmix: needs data.backend: indexed",
        ),
    ],
)
def test_an_impossible_combination_is_refused(refusal, section, message):
    tree = yaml.safe_load(MINIMAL) | yaml.safe_load(section)
    assert refusal(yaml.safe_dump(tree)).startswith(message)


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_reach_any_depth_and_convert_by_type(load):
    config = load(
        MINIMAL,
        *("stages.0.lr=3e-4", "seed=1", "optim.betas=[0.8, 0.9]", "eval.every=0.5 epochs"),
        *("precision=no", "track.wandb=off", "run.dir=a=b", "batch.global=64"),
    )
    assert (config.stages[0].lr, config.seed) == (3e-4, 1)
    assert config.optim.betas == (0.8, 0.9)
    assert config.eval.every == Every.parse("0.5 epochs")
    assert (config.precision, config.track.wandb, config.run.dir) == ("no", "off", "a=b")
    assert config.batch.global_ == 64


@pytest.mark.parametrize(
    ("overrides", "twice"),
    [
        (("seed=1", "seed=2"), "'seed=2': seed is given twice, before by 'seed=1'"),
        (
            ("stages.head.lr=1", "stages.0.lr=2"),
            "'stages.0.lr=2': stages.0.lr is given twice, before by 'stages.head.lr=1'",
        ),
        (
            ("optim.ema=0", "optim={warmup: 1}"),
            "'optim={warmup: 1}': optim.ema is given twice, before by 'optim.ema=0'",
        ),
    ],
)
def test_a_key_is_given_once_in_overrides_as_in_a_file(load, refusal, overrides, twice):
    assert refusal(MINIMAL, *overrides) == twice
    assert load(MINIMAL, "seed=1", "seed=1").seed == 1
    assert load(MINIMAL, "optim={ema: 0}", "optim.warmup=1").optim.warmup == 1


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.dir=2026-02-30", "2026-02-30"),
        ("run.dir=010", "010"),
        ("run.dir=1e3", "1e3"),
        ("run.dir=no", "no"),
        ("run.dir=null", "null"),
        ("run.dir=a: b #c", "a: b #c"),
        ("run.dir=@x", "@x"),
        ("run.dir=[x", "[x"),
        ("run.dir='010'", "010"),
        ('run.dir="a b"', "a b"),
        ("run.dir= x ", "x"),
    ],
)
def test_where_text_is_wanted_what_was_typed_is_taken(load, override, value):
    assert load(MINIMAL, override).run.dir == value


def test_null_and_lists_are_taken_beside_text(load):
    config = load(MINIMAL, "data.test=~", "stages.0.trainable=[layer4, head]", "data.train=2026")
    assert (config.data.test, config.data.train) == (None, "2026")
    assert config.stages[0].trainable == ["layer4", "head"]
    assert load(MINIMAL, "data.test=null", "stages.0.trainable=3").stages[0].trainable == "3"


@pytest.mark.parametrize("digits", ["10", "010", "+10", "1_0"])
def test_whole_numbers_are_decimal(load, digits):
    assert load(MINIMAL, f"seed={digits}").seed == 10
    assert load(f"{MINIMAL}seed: {digits}").seed == 10


@pytest.mark.parametrize("digits", ["0o17", "0x10", "0b1", "1:30", "1__0", "1_", "9" * 5000, "1e3"])
def test_other_ways_to_write_a_whole_number_are_refused(refusal, digits):
    for message in (refusal(MINIMAL, f"seed={digits}"), refusal(f"{MINIMAL}seed: {digits}")):
        assert "seed: expected a whole number, found '" in message
        assert len(message) < 500


@pytest.mark.parametrize("place", ["run.dir", "data.path", "data.source", "data.cache_dir"])
def test_a_tilde_is_the_home_folder(load, refusal, monkeypatch, place):
    monkeypatch.setenv("HOME", "/home/ada")
    section, key = place.split(".")
    config = load(MINIMAL, f"{place}=~/x", "features.cache_dir=~/", "model.weights=~/w.pth")
    assert getattr(getattr(config, section), key) == "/home/ada/x"
    assert (config.features.cache_dir, config.model.weights) == ("/home/ada/", "/home/ada/w.pth")
    in_file = load(
        MINIMAL.replace("path: d", "path: ~/d, stream_urls: '~/{0..9}.tar', backend: stream")
    )
    assert (in_file.data.path, in_file.data.stream_urls) == ("/home/ada/d", "/home/ada/{0..9}.tar")
    assert f"{place}: there is no home folder of a user 'nobody-here'" in refusal(
        MINIMAL, f"{place}=~nobody-here/x"
    )
    config = load(MINIMAL, "run.dir=./~x", "data.path=s3://~/x")
    assert (config.run.dir, config.data.path) == ("./~x", "s3://~/x")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("30:00", 1800),
        ("11:30:00", 41400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:15", 131415),
        ("90 Minutes", 5400),
        ("0.00001 days", 0.864),
        ("20000000s", 2e7),
    ],
)
def test_times_are_read_as_slurm_writes_them_too(load, written, seconds):
    for config in (
        load(MINIMAL, f"run.time_limit={written}"),
        load(f"{MINIMAL}run: {{timeout: {written}}}"),
    ):
        span = config.run.time_limit or config.run.timeout
        assert span.seconds == pytest.approx(seconds)
    config = load(MINIMAL, f"run.time_limit={written}")
    assert parse_config(to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed' is not an override; write key=value, such as seed=1"),
        ("=1", "'=1' is not an override; write key=value, such as seed=1"),
        ("sed=1", "'sed=1': unknown key sed; did you mean seed?"),
        ("optim.warmpu=1", "'optim.warmpu=1': unknown key optim.warmpu; did you mean warmup?"),
        ("stages.0.lrr=1", "'stages.0.lrr=1': unknown key stages.0.lrr; did you mean lr?"),
        ("stages.1.lr=1", "'stages.1.lr=1': '1' is not a position in a list of 1"),
        ("stages.-1.lr=1", "'stages.-1.lr=1': '-1' is not a position in a list of 1"),
        ("stages.haed.lr=1", "'stages.haed.lr=1': 'haed' is not a position in a list of 1"),
        ("stages.1={}", "'stages.1={}': '1' is not a position in a list of 1"),
        ("data.path.x=1", "'data.path.x=1': data.path is not a section"),
        ("seed=", "'seed=': seed: expected a whole number, found None"),
        ("seed=[1", "'seed=[1': the value is not valid YAML"),
    ],
)
def test_a_bad_override_is_refused(refusal, override, message):
    assert refusal(MINIMAL, override).startswith(message)


# --- files ---------------------------------------------------------------------------------------


def test_what_is_no_config_file_is_refused_in_one_line(refusal, tmp_path):
    assert "is not valid YAML" in refusal("a: [")
    assert "is not valid YAML" in refusal("!!python/object/apply:os.system ['true']")
    assert refusal("- 1\n- 2").startswith("expected sections such as data: and stages:")
    assert refusal("").startswith("expected sections such as data: and stages:")
    with pytest.raises(
        UserError,
        match=r"no config file .*none\.yaml; shipped ones: configs/cifar10_basic_cnn.yaml, ",
    ):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot read config"):
        load_config(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match=r"pipe\.yaml is a named pipe"):
        load_config(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2", "optim: {ema: 0}\noptim: {warmup: 1}"])
def test_a_key_given_twice_is_refused(refusal, text):
    key = text.split(":")[0]
    message = refusal(MINIMAL + text)
    assert f"the key '{key}' is given twice" in message
    assert "line 4" in message
    nested = MINIMAL.replace("epochs: 2", "epochs: 2, epochs: 3")
    assert "the key 'epochs' is given twice" in refusal(nested)


def test_anchors_and_merges_work(load):
    config = load(
        "data: {path: d}\n"
        "stages:\n"
        "  - &head {name: head, epochs: 2, lr: 1e-3, trainable: head}\n"
        "  - {<<: *head, name: all, trainable: all}\n"
    )
    assert [stage.name for stage in config.stages] == ["head", "all"]
    assert [stage.epochs for stage in config.stages] == [2, 2]


def everything_set():
    """A config in which each key has another value than its default."""
    return parse_config(
        {
            "seed": 3,
            "run": {
                **{"dir": "r", "resume": "must", "ledger": True, "log_every": "3 steps"},
                **{"time_limit": "11.5 hours", "timeout": "90m"},
            },
            "data": {
                **{"path": "p", "source": "digits", "val_fraction": 0.1, "train": "a", "val": "b"},
                **{"backend": "stream", "stream_urls": "x.tar", "test": None, "image_size": 33},
                **{"shuffle": "window", "window": 3, "cache_dir": "c", "cache_gb": 1.5},
                "redirects": "any",
                **{"crop_pct": 0.9, "channels": 1, "workers": 3, "bad_samples": 4},
            },
            "augment": {
                **{"crop_scale": [0.1, 0.2], "crop_ratio": [0.5, 1.7], "hflip": 0.25, "vflip": 0.1},
                **{"rotation": 1e-5, "color_jitter": 0.3, "randaugment": 9, "erasing": 0.2},
            },
            "model": {
                "name": "n",
                "weights": "w",
                "head": "keep",
                "dropout": 0.3,
                "small_stem": True,
            },
            "recipe": ["batch.global 32: why"],
            "stages": [
                {"name": "a", "steps": 7, "lr": 1e-7, "trainable": ["layer4", "head"], "views": 3},
                {"name": "b", "epochs": 0.3, "lr": 2, "trainable": "head", "layer_decay": 0.1}
                | {"batchnorm": "stats", "cache": "off", "image_size": 17}
                | {"schedule": "constant", "warmup": 0.7, "augment": {"hflip": 0.9}}
                | {
                    "early_stop": {"patience": 6},
                    "optim": {"name": "adamw", "schedule": "constant"},
                },
            ],
            "optim": {
                **{"name": "sgd", "weight_decay": 0.3, "momentum": 0.1, "betas": [0.1, 0.2]},
                **{"warmup": 3, "schedule": "linear", "clip_grad_norm": None},
                **{"label_smoothing": 0.3, "ema": 0.999, "class_weights": "balanced"},
                **{"ema_batchnorm": "averaged", "loss": "focal", "focal_gamma": 1.5},
                **{"skip_limit": 7, "step_size": 2.5, "gamma": 0.5, "factor": 0.3, "patience": 4},
                **{"min_lr": 1e-9},
            },
            "batch": {"global": 6, "micro": 3, "sync_batchnorm": True},
            "features": {"cache_dir": "f", "cache_gb": 2.5},
            "precision": "fp64",
            "tf32": False,
            "deterministic": False,
            "compile": True,
            "checkpoint": {"every": "0.00001 epochs", "keep": 5},
            "early_stop": {"metric": "val/loss", "patience": 2},
            "eval": {"every": "1.25 epochs"},
            "calibrate": {"coverage": 0.8, "precision_target": 0.7},
            "track": {"wandb": "off", "project": "q"},
        }
    )


def same_leaves(one, other, path=""):
    for key in one:
        if isinstance(one[key], dict):
            yield from same_leaves(one[key], other[key], f"{path}{key}.")
        elif one[key] == other[key]:
            yield f"{path}{key}"


def test_yaml_round_trip_keeps_every_key(tmp_path):
    config = everything_set()
    left_alone = set(same_leaves(to_dict(config), to_dict(parse_config(yaml.safe_load(MINIMAL)))))
    assert left_alone <= {
        *("augment.mixup", "augment.cutmix", "data.sampling"),  # not with the stream backend
        "optim.logit_adjustment",  # not with class weights
    }
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_run_config(tmp_path) == config
    assert parse_config(to_dict(config)) == config


def test_a_config_cannot_be_changed():
    config = parse_config(yaml.safe_load(MINIMAL))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.warmup = 1.0


# --- the shipped configs -------------------------------------------------------------------------


def test_configs_are_shipped():
    assert sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_config_parses_and_its_header_names_its_command(path):
    load_config(path)
    header = list(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert header, "it starts with a comment"
    assert f"--config configs/{path.name}" in " ".join(header), "which names its command"


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{file}", "sed=1"], "rtl-dist: 'sed=1': unknown key sed; did you mean seed?"),
        (
            ["--config", "{file}", "stages.0.lr=-1"],
            "rtl-dist: 'stages.0.lr=-1': stages.0.lr: must be positive or auto",
        ),
        (["--config", "{bad}"], "rtl-dist: {bad}: seed: must lie in 0 to 2^63 - 1"),
        (["--config", "none.yaml"], "rtl-dist: no config file none.yaml; shipped ones: configs/"),
        (
            ["--config", "transfer"],
            "rtl-dist: no config file transfer; did you mean configs/transfer.yaml?",
        ),
    ],
)
def test_a_mistake_ends_the_job_with_code_2_and_one_line(tmp_path, capfd, arguments, message):
    file = tmp_path / "c.yaml"
    file.write_text(MINIMAL)
    bad = tmp_path / "bad.yaml"
    bad.write_text(with_section("seed: -1"))
    assert main([argument.format(file=file, bad=bad) for argument in arguments]) == 2
    out, err = capfd.readouterr()
    assert err.startswith(message.format(bad=bad))
    assert err.count("\n") == 1
    assert out == ""


def test_debug_adds_the_traceback(tmp_path, capfd):
    assert main(["--config", "none.yaml", "--debug"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("rtl-dist: no config file")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed: 1\ndata: {path: a\n", "line 3, column 1: expected ',' or '}'"),
        ("seed: 1\nseed: 2\n", "line 2, column 1: the key 'seed' is given twice"),
    ],
)
def test_a_fault_of_the_yaml_says_where_it_is(tmp_path, text, fault):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path} is not valid YAML: {fault}")):
        load_config(path)


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    with pytest.raises(
        UserError, match="expected sections such as data: and stages:, found nothing"
    ):
        load_config(tmp_path / "c.yaml")
