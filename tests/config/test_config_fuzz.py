"""Every key of a config with every odd value, in files and in overrides: it is taken, or refused in
one short line; and what is taken at the ends of its range can be begun with."""

import contextlib
import dataclasses
import time
import typing

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import make_dataset, tiny_config, write_config

from rtl_dist.config import Config, load_config
from rtl_dist.core.errors import RtlDistError, UserError
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.records.run_folder import owned_run_folder
from rtl_dist.train import main
from rtl_dist.training.begin import open_data, open_run
from rtl_dist.training.resolve import resolve

GOOD = "data: {path: d}\nstages: [{name: a, epochs: 1, lr: 1}]\n"


def keys_of(section, path=()):
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        here = (*path, str(field.metadata.get("key", field.name)))
        yield here
        for kind in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind) and not hasattr(kind, "parse"):
                below = (*here, "0") if here == ("stages",) else here
                yield from keys_of(kind, below)


KEYS = sorted(set(keys_of(Config)))
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**18, 10**50, 5e-324, 1e-30, 1e30, 1.8e308, -0.0, 0.5]
NUMBERS += [float("inf"), float("nan")]
ODD_TEXT = [
    "",
    "~",
    "~~",
    "no",
    "null",
    "010",
    "0x1",
    "1:30",
    "2026-02-30",
    "a\x00",
    "\ud800",
    "\n",
]
ODD_TEXT += ["!!int x", "*x", "&a [*a]", "[", "{", "{a: 1, a: 2}", "'", "%", "@", "\\", "x" * 5000]
ODD_TEXT += ["9" * 5000, "[" * 3000, "1 epoch", "9999999999999 steps", "1-00:00:00", "99999 days"]
ODD_TEXT += ["🦊" * 64, "a/" * 3000, "http://[", "s3://u:p@h", "!!float 1", "=", "<<: 1"]
scalars = st.one_of(
    *(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(), st.floats()),
    *(st.sampled_from(ODD_TEXT), st.text(max_size=30)),
)
values = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=9), below, max_size=3),
    max_leaves=8,
)  # fmt: skip
often = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def require_taken_or_refused(path, overrides):
    began = time.process_time()
    try:
        load_config(path, overrides)
    except UserError as error:
        told = str(error)
        assert len(told.split("\n")) < 50
        assert max(map(len, told.split("\n"))) < 1500
    assert time.process_time() - began < 1


@often
@given(key=st.sampled_from(KEYS), value=values)
def test_a_file(tmp_path, key, value):
    tree = yaml.safe_load(GOOD)
    node = tree
    for name in key[:-1]:
        node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
    node[key[-1]] = value
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    require_taken_or_refused(path, [])


@often
@given(
    key=st.sampled_from(KEYS),
    text=st.sampled_from([*ODD_TEXT, *map(str, NUMBERS)]) | st.text(max_size=40),
    more=st.sampled_from(["", "seed=1", "stages.a.lr=3", "a" * 3000 + "=1", "x.0.y=1"]),
)
def test_an_override(tmp_path, key, text, more):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD)
    require_taken_or_refused(path, [f"{'.'.join(key)}={text}", *([more] if more else [])])


@often
@given(text=st.text("[]{}:,-&*!?|>'\"%@` \n\tab01.<~=#", max_size=60) | st.text(max_size=60))
def test_a_text_that_may_be_no_yaml(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    require_taken_or_refused(path, [text])


# --- dry starts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


LARGEST = {
    **{"seed": 2**63 - 1, "data.bad_samples": 2**31, "data.window": 2**31, "data.cache_gb": 1e30},
    **{"data.crop_pct": 0.1, "augment.rotation": 360, "augment.color_jitter": 10},
    **{"augment.crop_ratio": [0.01, 100], "augment.crop_scale": [1e-30, 1], "augment.mixup": 1000},
    **{"augment.cutmix": 1000, "augment.randaugment": 30, "augment.erasing": 1, "augment.hflip": 1},
    **{"stages.0.epochs": 10**6, "stages.0.steps": None, "stages.0.lr": 1e30, "stages.0.views": 10**6},
    **{"stages.1.steps": 10**9, "stages.1.warmup": 10**9, "stages.1.layer_decay": 1e-30},
    **{"optim.weight_decay": 1000, "optim.momentum": 1, "optim.patience": 10**6},
    **{"optim.skip_limit": 10**6, "optim.clip_grad_norm": 1e30, "optim.label_smoothing": 1},
    **{"optim.logit_adjustment": 100, "optim.focal_gamma": 100, "optim.ema": 0.9999999999},
    **{"checkpoint.keep": 10**6, "checkpoint.every": "999999999999 epochs"},
    **{"eval.every": "999999999999 steps", "run.time_limit": "1000 days", "run.timeout": "1000 days"},
    **{"early_stop.patience": 10**6, "features.cache_gb": 1e30, "run.log_every": "0.000000000001 epochs"},
    **{"model.dropout": 0.999999, "track.project": "p" * 4000},
}  # fmt: skip
SMALLEST = {
    **{"seed": 0, "data.window": 1, "data.cache_gb": 1e-30, "data.image_size": 8},
    **{"augment.mixup": 0.001, "augment.cutmix": 0.001, "augment.rotation": 1e-30},
    **{"augment.color_jitter": 1e-30, "augment.crop_ratio": [0.01, 0.01]},
    **{"augment.crop_scale": [1e-30, 1e-30], "augment.erasing": 1e-30, "augment.randaugment": 0},
    **{"stages.0.epochs": 1e-30, "stages.0.steps": None, "stages.0.lr": 1e-30, "stages.0.views": 1},
    **{"optim.clip_grad_norm": 1e-30, "optim.warmup": 1e-30, "optim.ema": 1e-30},
    **{"features.cache_gb": 1e-30, "checkpoint.every": "0.000000000001 epochs"},
    **{"batch.global": 2, "batch.micro": 2, "run.time_limit": "1000 days", "early_stop.patience": 1},
}  # fmt: skip


def begun_with(dataset, folder, values):
    """Everything up to the first stage."""
    tree = tiny_config(
        dataset, folder / "run", **{k.replace(".", "__"): v for k, v in values.items()}
    )
    config = load_config(write_config(folder / "c.yaml", tree))
    with (
        Runtime(config.precision) as runtime,
        owned_run_folder(config.run, runtime) as run_folder,
    ):
        data = open_data(config, runtime)
        with open_run(resolve(config, runtime, data), runtime, run_folder, data) as (_, stages, _):
            assert stages


@pytest.mark.parametrize("values", [LARGEST, SMALLEST], ids=["largest", "smallest"])
def test_all_that_is_taken_at_the_ends_of_its_range_can_be_begun_with(dataset, tmp_path, values):
    begun_with(dataset, tmp_path, values)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "value", [*NUMBERS, *ODD_TEXT[:12], [0.5, 1e-30], "999999999999 steps"], ids=ascii
)
@pytest.mark.parametrize("key", [".".join(key) for key in KEYS])
def test_each_key_with_each_odd_value_is_refused_or_can_be_begun_with(dataset, tmp_path, key, value, monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)  # where run.dir is relative
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with contextlib.suppress(RtlDistError, KeyError):  # KeyError: no such place in the test's tree
        begun_with(dataset, tmp_path, {key: value})


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("ends", [LARGEST, SMALLEST], ids=["largest", "smallest"])
def test_and_trained_with_for_a_step(dataset, tmp_path, ends, capfd):
    """A run may fail of such values, in a line."""
    values = {k: v for k, v in ends.items() if not k.startswith(("stages", "eval", "checkpoint"))}
    stages = [{"name": "a", "steps": 1, "lr": 1e-2, "batchnorm": "train"}]
    changes = {k.replace(".", "__"): v for k, v in values.items()} | {"stages": stages}
    path = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run", **changes))
    main(["--config", path])
    assert "Traceback" not in capfd.readouterr().err
