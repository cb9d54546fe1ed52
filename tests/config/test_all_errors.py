"""All that is wrong with a config is told at once, each thing once, and nothing that follows."""

import pytest

from rtl_dist.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    load_config,
    parse_section,
)
from rtl_dist.core.errors import UserError
from rtl_dist.train import main

STAGE = "{name: a, epochs: 1, lr: 1}"
GOOD = f"data: {{path: d}}\nstages: [{STAGE}]\n"


@pytest.fixture
def lines(tmp_path):
    """The lines with which YAML text is refused, the file's name written FILE."""

    def lines(text, *overrides):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(file, list(overrides))
        return str(caught.value).replace(str(file), "FILE").split("\n")

    return lines


def test_every_kind_of_error_of_a_file_is_told_at_once(lines):
    text = """
sede: 1
data: {path: d, image_size: 4, channels: 2, nonsense: 1}
augment: {hflip: 2, mixup: abc}
optim: {weight_decay: -1, ema: 3, skip_limit: 0}
batch: {global: 10, micro: 4}
stages:
  - {name: a, epochs: -1, lr: abc, trainabel: head}
  - {name: b, epochs: 1, steps: 1}
checkpoint: {every: daily}
"""
    told = lines(text)
    known = told.pop(2)
    assert known.startswith("  unknown key data.nonsense; known here: path, source, ")
    assert told == [
        "16 errors in FILE:",
        "  unknown key sede; did you mean seed?",
        "  data.channels: must be one of 1, 3; found 2",
        "  data.image_size: must be at least 8, not 4",
        "  augment.mixup: expected a number, found 'abc'",
        "  augment.hflip: must lie in 0 to 1, not 2.0",
        "  unknown key stages.0.trainabel; did you mean trainable?",
        "  stages.0.lr: expected a number, found 'abc'; or must be one of auto; found 'abc'",
        "  stages.0.epochs: must be positive",
        "  stages.1.lr: is required",
        "  stages.1.epochs: a stage has either epochs or steps",
        "  optim.ema: must lie in 0 to 1, not 3.0",
        "  optim.weight_decay: must be at least 0",
        "  optim.skip_limit: must be at least 1",
        "  batch.micro: 4 does not divide batch.global 10",
        "  checkpoint.every: expected something like '1 epoch' or '200 steps', not 'daily'",
    ]


def test_checks_across_sections_are_told_with_those_of_others(lines):
    text = f"""
seed: -1
data: {{path: d, backend: stream, stream_urls: x.tar}}
augment: {{mixup: 0.2, cutmix: 1}}
stages: [{STAGE}, {STAGE}]
"""
    assert lines(text) == [
        "4 errors in FILE:",
        "  stages: names must differ, not ['a', 'a']",
        "  seed: must lie in 0 to 2^63 - 1",
        "  augment.mixup: needs data.backend: indexed",
        "  augment.cutmix: needs data.backend: indexed",
    ]


@pytest.mark.parametrize(
    ("text", "only"),
    [
        # what did not become a value is not missing, and is in no other check
        (f"data: {{path: 5}}\nstages: [{STAGE}]", "data.path: expected text, found 5"),
        (f"data: {{pth: d}}\nstages: [{STAGE}]", "unknown key data.pth; did you mean path?"),
        (f"dat: {{path: d}}\nstages: [{STAGE}]", "unknown key dat; did you mean data?"),
        ("data: {path: d}\nstages: 5", "stages: expected a list, found 5"),
        (
            "data: {path: d}\nstages: [{name: a, epoch: 1, lr: 1}]",
            "unknown key stages.0.epoch; did you mean epochs?",
        ),
        (
            "data: {path: d}\nstages: [{name: a, steps: x, lr: 1}]",
            "stages.0.steps: expected a whole number, found 'x'",
        ),
        (
            GOOD + "batch: {global: x, micro: 7}",
            "batch.global: expected a whole number, found 'x'; or must be one of auto; found 'x'",
        ),
        (GOOD + "batch: {global: 10, micro: 0}", "batch.micro: must be auto or positive"),
        (GOOD + "batch: {global: -4, micro: 8}", "batch.global: must be auto or positive"),
        (
            f"data: {{path: d, backend: steam, stream_urls: a.tar}}\nstages: [{STAGE}]",
            "data.backend: must be one of indexed, stream; found 'steam'",
        ),
        (
            f"data: {{path: d, bakend: stream, stream_urls: a.tar}}\nstages: [{STAGE}]",
            "unknown key data.bakend; did you mean backend?",
        ),
        # a check across sections needs all of them
        (
            f"data: {{path: d, sampling: balanced}}\nstages: [{STAGE}]\n"
            "optim: {ema: 2, class_weights: balanced}",
            "optim.ema: must lie in 0 to 1, not 2.0",
        ),
        (
            "data: {path: d}\nstages: [{name: a, epochs: 1, lr: 1}, {name: a, epochs: 1, lr: 0}]",
            "stages.1.lr: must be positive or auto, not 0.0",
        ),
        # what stages have from the run's own section is wrong there, once
        (
            "data: {path: d}\naugment: {hflip: 2}\nstages:\n"
            "  - {name: a, epochs: 1, lr: 1, augment: {vflip: 0.5}}\n"
            "  - {name: b, epochs: 1, lr: 1, augment: {vflip: 0.5}}\n",
            "augment.hflip: must lie in 0 to 1, not 2.0",
        ),
        (
            "data: {path: d, backend: stream, stream_urls: a.tar}\naugment: {mixup: 1}\nstages:\n"
            "  - {name: a, epochs: 1, lr: 1, augment: {vflip: 0.5}}\n"
            "  - {name: b, epochs: 1, lr: 1, augment: {vflip: 0.5}}\n",
            "augment.mixup: needs data.backend: indexed",
        ),
    ],
)
def test_what_follows_from_another_error_is_not_told(lines, text, only):
    assert lines(text) == [f"FILE: {only}"]


def test_a_stage_s_own_keys_are_told_as_its_own(lines):
    text = (
        "data: {path: d}\naugment: {hflip: 2}\nstages:\n"
        "  - {name: a, epochs: 1, lr: 1, augment: {hflip: 2, vflip: 3}}\n"
    )
    assert lines(text) == [
        "3 errors in FILE:",
        "  augment.hflip: must lie in 0 to 1, not 2.0",
        "  stages.0.augment.hflip: must lie in 0 to 1, not 2.0",
        "  stages.0.augment.vflip: must lie in 0 to 1, not 3.0",
    ]


# --- overrides -----------------------------------------------------------------------------------


def test_errors_of_several_overrides_name_each(lines):
    overrides = ("seed=abc", "optm.ema=1", "stages.0.lr=-1", "stages.3.lr=1", "foo", "data=[1")
    assert [line.split(": line 1")[0] for line in lines(GOOD, *overrides)] == [
        "6 errors in the overrides of FILE:",
        "  'optm.ema=1': unknown key optm; did you mean optim?",
        "  'seed=abc': seed: expected a whole number, found 'abc'",
        "  'stages.0.lr=-1': stages.0.lr: must be positive or auto, not -1.0",
        "  'stages.3.lr=1': '3' is not a position in a list of 1, counted from 0",
        "  'foo' is not an override; write key=value, such as seed=1",
        "  'data=[1': the value is not valid YAML",
    ]


def test_errors_of_the_file_and_of_overrides_are_told_apart(lines):
    assert lines(GOOD + "optim: {ema: 2}", "optim.warmup=-1", "batch.micro=7") == [
        "3 errors in FILE and its overrides:",
        "  optim.ema: must lie in 0 to 1, not 2.0",
        "  'optim.warmup=-1': optim.warmup: must be at least 0",
        "  'batch.micro=7': batch.micro: 7 does not divide batch.global 256",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "only"),
    [
        # what an override left as it was
        (GOOD + "seed: -1", ("optim.ema=0.5",), "FILE: seed: must lie in 0 to 2^63 - 1"),
        ("stages: []", ("data.train=x", f"stages=[{STAGE}]"), "FILE: data.path: is required"),
        # what it mended
        (GOOD + "seed: -1\noptim: {ema: 2}", ("seed=1",), "FILE: optim.ema: must lie in 0 to 1, n"),
        (GOOD, ("optim={ema: 3}", "optim.ema=x"), "'optim.ema=x': optim.ema: expected a number"),
        # a section that is none is told of once
        (GOOD + "optim: adamw", ("optim.ema=0.5",), "FILE: optim: expected a section with keys"),
        (GOOD, ("optim=5", "optim.ema=0.5"), "'optim=5': optim: expected a section with keys"),
        (GOOD, ("data.path.x=1",), "'data.path.x=1': data.path is not a section"),
        # a password belongs into no log
        (GOOD, ("data.path=https://me:pw@h/d",), "'data.path=...': data.path: the URL of h/d hol"),
        (
            GOOD,
            ("data.path=https://[x",),
            "'data.path=...': data.path: what follows :// is no addr",
        ),
    ],
)
def test_an_error_is_laid_to_what_caused_it(lines, text, overrides, only):
    (line,) = lines(text, *overrides)
    assert line.startswith(only)


def test_the_job_ends_with_code_2_and_a_line_each(tmp_path, capfd):
    file = tmp_path / "c.yaml"
    file.write_text(GOOD + "optim: {ema: 2}\nseed: -1")
    assert main(["--config", str(file)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        f"rtl-dist: 2 errors in {file}:\n"
        "  optim.ema: must lie in 0 to 1, not 2.0\n"
        "  seed: must lie in 0 to 2^63 - 1\n"
    )


# --- sections built by hand ----------------------------------------------------------------------


def test_a_section_built_by_hand_raises_one_error_for_all_that_is_wrong():
    with pytest.raises(ValueError, match=r"^ema: must lie in 0 to 1, not 2; skip_limit: must be a"):
        OptimConfig(ema=2, skip_limit=0)
    with pytest.raises(ValueError, match=r"^micro: 4 does not divide batch.global 10$"):
        BatchConfig(global_=10, micro=4)
    stage = StageConfig(name="a", epochs=1, lr=1)
    with pytest.raises(ValueError, match=r"^stages: names must differ, .*; seed: must lie in 0"):
        Config(data=DataConfig(path=""), stages=[stage, stage], seed=-1)


def test_one_section_alone():
    assert parse_section(ModelConfig, {"dropout": "1e-1"}, origin="x") == ModelConfig(dropout=0.1)
    with pytest.raises(UserError, match=r"^x: dropout: must lie in 0 to 1, not 2\.0$"):
        parse_section(ModelConfig, {"dropout": 2}, origin="x")
    with pytest.raises(UserError, match=r"^2 errors in x:\n  name: .*\n  dropout: "):
        parse_section(ModelConfig, {"dropout": "a", "name": 5}, origin="x")
