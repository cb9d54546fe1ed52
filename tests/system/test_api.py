"""rtl_dist in Python: what the commands do, in a process that stays the caller's."""

import csv
import gc
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from remote_helpers import serving
from safetensors.torch import load_file
from tiny_runs import ROOT, make_dataset, tiny_config

import rtl_dist
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.distributed.guest import as_guest
from rtl_dist.distributed.heartbeat import Heartbeat
from rtl_dist.distributed.stopping import IS_GUEST, StopRequests
from rtl_dist.distributed.terminal import ProgressLines, progress
from rtl_dist.distributed.watch import HEARTBEATS, Watch
from rtl_dist.training.stage_trainer import StageTrainer

# torchvision 0.29 announces that its decoder will move to another package.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), val=150)  # three blocks to evaluate


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> rtl_dist.Run:
    """Trained with its report drawn, the process looked at before and after."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    before = state_of_process()
    made = rtl_dist.train(config_of(data, folder), {"stages.0.lr": 2e-2})
    assert state_of_process() == before
    return made


def config_of(data: Path, folder: Path) -> dict[str, Any]:
    """The last stage of ``tiny_config`` alone."""
    config = tiny_config(data, folder)
    return config | {"stages": config["stages"][-1:]}


def state_of_process():
    log = logging.getLogger("rtl_dist")
    return (
        [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        (list(log.handlers), log.level, log.propagate),
        (torch.get_rng_state().tolist(), torch.get_num_threads()),
        (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision),
        (gc.isenabled(), gc.get_threshold()),
        {k: v for k, v in os.environ.items() if not k.startswith("KMP_")},  # scikit-learn's
    )


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_to_import_it_costs_neither_torch_nor_numpy():
    heavy = "{'torch', 'numpy', 'PIL', 'yaml', 'accelerate'} & sys.modules.keys()"
    assert python(f"import rtl_dist, sys; print({heavy})") == "set()"
    code = f"from rtl_dist import UserError, RtlDistError; import rtl_dist, sys; print({heavy})"
    assert python(code) == "set()"
    functions = "load, train, evaluate, predict, pack, open_dataset"
    code = "print({'torch', 'accelerate', 'timm', 'matplotlib'} & sys.modules.keys())"
    assert python(f"from rtl_dist import {functions}; import sys; {code}") == "set()"
    names = python("import rtl_dist; print(*dir(rtl_dist))").split()
    assert {"load", "train", "evaluate", "predict", "pack", "open_dataset", "Run"} <= set(names)


def test_every_name_is_there_and_no_other():
    for name in rtl_dist.__all__:
        assert getattr(rtl_dist, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        rtl_dist.trian  # noqa: B018 - the error is looked at


def test_train_is_the_function_although_a_file_has_its_name():
    import rtl_dist.train as imported  # what the name means, too
    from rtl_dist.train import main

    assert callable(main)
    assert imported is rtl_dist.train is rtl_dist.api.train
    assert sys.modules["rtl_dist.train"].main is main


def test_a_run_gives_its_metrics_as_columns_and_its_plots(run, data):
    assert run.status == "done"
    assert run.config.stages[0].lr == 2e-2
    metrics = run.metrics
    assert len({len(metrics[name]) for name in metrics}) == 1
    assert metrics["val/top1"].dtype == np.float64
    assert metrics["stage"].tolist()[0] == "all"
    epochs, values = metrics.points("val/top1")
    assert len(epochs) == len(values) == np.isfinite(metrics["val/top1"]).sum() > 1
    assert values.max() == run.best.value
    assert run.best.metric == "val/top1"
    with pytest.raises(KeyError, match="did you mean val/top"):
        metrics["val/topl"]
    assert set(run.plots) == {"accuracy", "learning_rate", "loss", "throughput"}
    assert run.plots["loss"].path.read_bytes().startswith(b"\x89PNG")
    assert run.report.is_file()
    assert run.test is None  # the config names no such split
    assert "done, best val/top1" in repr(run)
    assert rtl_dist.Run(run.folder).results == run.results
    with pytest.raises(rtl_dist.UserError, match="is no run folder"):
        rtl_dist.Run(data)


@pytest.mark.usefixtures("undrawn")
def test_the_answers_are_those_of_the_commands(run, data, tmp_path):
    """Value by value: ``evaluate``'s table, ``predict``'s file, and images one after the other."""
    evaluated = rtl_dist.evaluate(run, data, "val")  # of more images than a block
    assert evaluated.folder == run.folder / "evaluation" / "val"
    assert run.evaluation("val").metrics == evaluated.metrics
    split = rtl_dist.open_dataset(data).split("val")
    reader = SampleReader(split)
    files = [reader.read(number) for number in range(split.num_samples)]
    reader.close()
    answers = rtl_dist.load(run.folder).predict(files)
    rows = evaluated.predictions
    assert [row["predicted"] for row in rows] == [answer.label for answer in answers]
    assert [row["confidence"] for row in rows] == [f"{a.probability:.6f}" for a in answers]
    right = np.mean([row["predicted"] == row["truth"] for row in rows])
    assert evaluated.metrics["top1"] == pytest.approx(right)
    assert len(evaluated.per_class) == 3
    assert "confusion_matrix" in evaluated.plots
    assert evaluated.report.is_file()

    out = rtl_dist.predict(run, data, tmp_path / "out.csv", split="val", workers=0)
    with out.open(newline="") as file:
        predicted = list(csv.DictReader(file))
    assert [row["label"] for row in predicted] == [answer.label for answer in answers]
    assert [row["probability"] for row in predicted] == [f"{a.probability:.6f}" for a in answers]
    streamed = rtl_dist.predict(run, iter(files))
    for one, other in zip(streamed, answers, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_files_are_predicted_into_a_file_as_by_the_command(run, tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    for name in "ab":
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    out = rtl_dist.predict(run, tmp_path, tmp_path / "out.jsonl", workers=0, top=2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    alone = rtl_dist.predict(run, tmp_path / "a.png")
    assert [Path(row["input"]).name for row in rows] == ["a.png", "b.png"]
    assert rows[0]["label"] == alone.label
    with pytest.raises(rtl_dist.UserError, match="out: a ndarray has no name"):
        rtl_dist.predict(run, [picture], tmp_path / "out.csv")
    with pytest.raises(rtl_dist.UserError, match="tops: no such option; there are split, top"):
        rtl_dist.predict(run, tmp_path, tmp_path / "out.csv", tops=2)
    with pytest.raises(rtl_dist.UserError, match="top: no such option without out="):
        rtl_dist.predict(run, picture, top=2)
    with pytest.raises(rtl_dist.UserError, match="tta: there is no 'vflip'; give 'hflip' or None"):
        rtl_dist.load(run.folder, tta="vflip")
    with pytest.raises(rtl_dist.UserError, match="tta: the model is loaded already"):
        rtl_dist.predict(rtl_dist.load(run.folder), picture, tta="hflip")


@pytest.mark.usefixtures("undrawn")
def test_a_model_is_used_as_it_was_loaded_where_its_files_are_read_again(run, data, tmp_path):
    as_it_is = rtl_dist.predict(run, data, tmp_path / "a.csv", split="val", workers=0)
    options = rtl_dist.predict(run, data, tmp_path / "b.csv", split="val", raw=True, workers=0)
    raw = run.load(raw=True)
    loaded = rtl_dist.predict(raw, data, tmp_path / "c.csv", split="val", workers=0)
    assert loaded.read_bytes() == options.read_bytes() != as_it_is.read_bytes()
    evaluated = rtl_dist.evaluate(raw, data, "val", out=tmp_path / "raw")
    assert "ece_raw" not in evaluated.metrics  # there is no other
    with pytest.raises(rtl_dist.UserError, match="model: it was loaded with tta=hflip"):
        rtl_dist.evaluate(run.load(tta="hflip"), data, "val")


@pytest.mark.usefixtures("undrawn")
def test_a_data_set_is_used_as_it_was_opened(run, data, tmp_path):
    with serving(data) as server:
        opened = rtl_dist.open_dataset(server.url, cache_dir=str(tmp_path / "cache"))
        evaluated = rtl_dist.evaluate(run, opened, "val", out=tmp_path / "out", workers=0)
    assert evaluated.metrics["num_samples"] == 150
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("undrawn")
def test_it_trains_again_in_one_process_and_in_a_thread(run, data, tmp_path):
    """A config may be a file, a dict or one that was read; equal ones give equal weights."""
    made, failed = [], []

    def work():
        try:
            made.append(rtl_dist.train(run.config, {"run": {"dir": tmp_path / "again"}}))
        except BaseException as error:  # noqa: BLE001 - told by the test
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    one, other = (load_file(r.folder / "best/model.safetensors") for r in (run, made[0]))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    (tmp_path / "c.yaml").write_text(json.dumps(config_of(data, tmp_path / "again")))
    done = rtl_dist.train(tmp_path / "c.yaml", ["stages.0.lr=2e-2"])  # the same: nothing to do
    assert done.results == made[0].results
    with pytest.raises(rtl_dist.UserError, match="the config differs from that of the run"):
        rtl_dist.train(tmp_path / "c.yaml")


def test_what_is_wrong_is_an_exception_and_no_exit(data, tmp_path):
    tree = config_of(data, tmp_path / "run")
    with pytest.raises(rtl_dist.UserError, match=r"stages.0.lr: must be"):
        rtl_dist.train(tree, {"stages.0.lr": -1})
    with pytest.raises(rtl_dist.UserError, match=r"no config file gone.yaml"):
        rtl_dist.train("gone.yaml")
    with pytest.raises(rtl_dist.UserError, match="overrides: 'seed=1' is a text"):
        rtl_dist.train(tree, "seed=1")
    with pytest.raises(rtl_dist.UserError, match="config: a int is none"):
        rtl_dist.train(3)
    with pytest.raises(rtl_dist.DataError):
        rtl_dist.train(tree, {"data.path": tmp_path / "nothing"})
    with pytest.raises(rtl_dist.DataError):
        rtl_dist.open_dataset(tmp_path)
    with pytest.raises(rtl_dist.UserError):
        rtl_dist.pack(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(rtl_dist.UserError, match="is not a model"):
        rtl_dist.evaluate(tmp_path, data)


def test_one_job_runs_at_a_time(data, tmp_path):
    with as_guest(), pytest.raises(rtl_dist.UserError, match="another job of rtl_dist runs"):
        rtl_dist.train(config_of(data, tmp_path / "run"))


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_saves_and_the_same_call_goes_on(run, data, tmp_path, monkeypatch, capfd):
    steps, step = [], StageTrainer.step

    def interrupted(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **options)

    monkeypatch.setattr(StageTrainer, "step", interrupted)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    tree, same = config_of(data, tmp_path / "stopped"), {"stages.0.lr": 2e-2}
    with pytest.raises(rtl_dist.StopRequested, match="SIGINT"):
        rtl_dist.train(tree, same)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "SIGINT: saving as soon as the step allows" in capfd.readouterr().err
    assert rtl_dist.Run(tmp_path / "stopped").status == "stopped"
    resumed = rtl_dist.train(tree, same)
    assert resumed.results["weights_sha256"] == run.results["weights_sha256"]


def test_a_guest_hears_ctrl_c_alone_and_never_ends_the_process():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with as_guest(), StopRequests() as stops:
        assert all(signal.getsignal(number) == handler for number, handler in before.items())
        with pytest.raises(KeyboardInterrupt):  # nothing to save yet
            signal.raise_signal(signal.SIGINT)
        with stops.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # at once: the same request
            assert stops.reason == "SIGINT"


def test_a_job_that_stands_still_is_interrupted_where_a_command_would_end(tmp_path, capsys):
    (tmp_path / HEARTBEATS).mkdir()
    with (
        pytest.raises(KeyboardInterrupt),
        as_guest(),
        StopRequests() as stops,
        stops.deferred(),
        Watch(tmp_path, Heartbeat(), rank=0, world_size=1, timeout_s=0.5),
    ):
        time.sleep(30)
    assert "made no progress for 0.5 s (run.timeout)" in capsys.readouterr().err


def test_in_a_process_that_was_launched_a_job_is_no_guest(monkeypatch):
    with as_guest():
        assert IS_GUEST.get()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with as_guest():
        assert not IS_GUEST.get()


def test_a_notebook_has_a_bar(monkeypatch):
    class OutStream(io.StringIO):
        """As ipykernel's, which is no terminal."""

    OutStream.__module__ = "ipykernel.iostream"
    stream = OutStream()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(total=3, what="training", unit="step") as bar:
        with progress(total=2, what="evaluating", unit="batch") as other:
            other.update()
        bar.update()
    assert "training" in stream.getvalue()
    assert "evaluating" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()  # one line: none to go up to
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress(total=3, what="training", unit="step"), ProgressLines)


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_what_the_pages_say_runs(run, tmp_path, monkeypatch, page):
    """Every Python line of a page that predicts; the others are the tests above."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert blocks
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(run.folder)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "one.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        compiled = compile(block, page, "exec")
        if "load(" in block:
            exec(compiled, {"print": lambda *values: None})
