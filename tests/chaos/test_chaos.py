"""``rtl-dist chaos``: its kills are real, a difference is told, and nothing is left running."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from statistics import mean

import psutil
import pytest
from tiny_runs import make_dataset, tiny_config, train, write_config

from rtl_dist.chaos import trial
from rtl_dist.chaos.process import started
from rtl_dist.chaos.trial import Moment, Pace, Trial, draw_moment
from rtl_dist.cli import main
from rtl_dist.core.errors import RtlDistError
from rtl_dist.records.hashes import differing, newest_checkpoint, run_hashes, table

TIMEOUT_S = 150
PACE = Pace(start_s=3.0, work_s=10.0, trained=[(5, 2.0), (10, 4.0), (20, 9.0)])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return train(folder, dataset, run__ledger=True, optim={"ema": 0.9})


@pytest.fixture
def config(tmp_path: Path, dataset: Path) -> str:
    changes = {"run__ledger": True, "optim": {"ema": 0.9}}
    return write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run", **changes))


def record_of(folder: Path) -> dict:
    return json.loads((folder / "chaos.json").read_text())


def processes_of(tmp_path: Path) -> list[list[str]]:
    """The command lines of living processes that name a test's folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            if any(str(tmp_path) in word for word in line):
                found.append(line)
    return found


def wait_for(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- whole runs ---


@pytest.mark.launch
def test_kills_change_nothing_and_leave_nothing_running(tmp_path, config, capsys):
    assert main(["chaos", "--config", config, "--kills", "2", "data.workers=1"]) == 0
    record = record_of(tmp_path / "run-chaos")
    assert [kill["killed"] for kill in record["kills"]] == ["all"] * 2
    assert any(kill["work_s"] is not None for kill in record["kills"])
    assert record["different"] == []
    expected = record["hashes"].pop("undisturbed")
    assert all(hashes == expected for hashes in record["hashes"].values())
    for name in ("model", "optimizer", "ema"):
        assert f"checkpoints/step-00000020/{name}.safetensors" in expected
    assert {"best/model.safetensors", "ledger/samples.jsonl"} <= expected.keys()

    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("2 kill(s) changed nothing")
    assert all(f"equal      {value}  {name}" in out for name, value in expected.items())
    assert len(list((tmp_path / "run-chaos" / "logs").glob("killed*"))) == 2 + len(record["hashes"])
    assert not (tmp_path / "run").exists()
    assert not processes_of(tmp_path)


@pytest.mark.launch
@pytest.mark.exhaustive  # what a rank's kill costs: system/kills; that it hits: the last tests here
def test_a_kill_of_one_of_two_ranks_changes_nothing(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(trial, "START_UP_SHARE", 0.0)
    monkeypatch.setattr(trial, "ONE_RANK_SHARE", 1.0)
    stages = [{"name": "all", "steps": 30, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}]
    tree = tiny_config(dataset, tmp_path / "run", stages=stages)
    config = write_config(tmp_path / "c.yaml", tree)
    out = tmp_path / "out"
    arguments = ["--kills", "1", "--processes", "2", "--out", str(out)]
    assert main(["chaos", "--config", config, *arguments]) == 0
    assert [kill["killed"] for kill in record_of(out)["kills"]] == ["one rank"]
    assert "(SIGKILL)" in (out / "logs" / "killed-001.log").read_text()  # torchrun says who
    assert not processes_of(tmp_path)


@pytest.mark.launch
@pytest.mark.parametrize(("name", "processes"), [("SIGTERM", 1), ("SIGINT", 2)])
def test_an_interrupt_leaves_no_process(tmp_path, dataset, name, processes):
    stages = [{"name": "a", "steps": 10**6, "trainable": "all", "lr": 1e-3, "batchnorm": "train"}]
    tree = tiny_config(dataset, tmp_path / "run", stages=stages, data__workers=1)
    config = write_config(tmp_path / "c.yaml", tree)
    command = [sys.executable, "-m", "rtl_dist", "chaos", "--config", config]
    with subprocess.Popen(
        [*command, f"--processes={processes}"], stderr=subprocess.PIPE, text=True
    ) as process:
        metrics = tmp_path / "run-chaos" / "undisturbed" / "metrics.jsonl"
        try:
            wait_for(lambda: metrics.exists() and metrics.stat().st_size, process)
            assert len(processes_of(tmp_path)) > processes
            process.send_signal(getattr(signal, name))
            _, errors = process.communicate(timeout=TIMEOUT_S)
        except BaseException:  # they would train for hours
            for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
                one.kill()
            raise
    assert process.returncode == 75
    assert errors.splitlines()[-1].startswith("rtl-dist: interrupted; start")
    assert not processes_of(tmp_path)


@pytest.mark.launch
def test_what_a_failing_training_says_is_passed_on(tmp_path, config, capsys):
    nowhere = tmp_path / "nowhere"
    assert main(["chaos", "--config", config, f"data.path={nowhere}"]) == 3
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert "the undisturbed run ended with code 3" in last_line
    assert str(nowhere) in last_line
    assert record_of(tmp_path / "run-chaos")["kills"] == []


# --- the verdict ---


@pytest.fixture
def trained_by_copying(finished, monkeypatch):
    """Trainings are copies of one; returns what to do to each that is killed, and how many kills
    find a run alive."""
    after = {"change": lambda run: None, "fired": 10}

    def undisturbed(self, name):
        shutil.copytree(finished, self.folder / name)
        return PACE

    def killed(self, name, pace, kills, *, earlier):
        shutil.copytree(finished, self.folder / name)
        after["change"](self.folder / name)
        kill = {"run": name, "start": 1, "killed": "all", "age_s": 1.0, "saved": 4}
        place = {"phase": None, "stage": "head", "step": 5}
        fired = min(kills, after["fired"])
        after["fired"] -= fired
        self.kills += [kill | place] * fired

    monkeypatch.setattr(Trial, "undisturbed", undisturbed)
    monkeypatch.setattr(Trial, "killed", killed)
    return after


@pytest.mark.usefixtures("trained_by_copying")
def test_an_equal_run_is_told(tmp_path, config, capsys):
    assert main(["chaos", "--config", config]) == 0
    assert "5 kill(s) changed nothing" in capsys.readouterr().out
    assert list(record_of(tmp_path / "run-chaos")["hashes"]) == ["undisturbed", "killed"]


def test_a_run_that_differs_is_told(tmp_path, config, capsys, trained_by_copying):
    trained_by_copying["change"] = lambda run: flip_last_byte(run / "best" / "model.safetensors")
    assert main(["chaos", "--config", config]) == 1
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    assert line.startswith("rtl-dist: best/model.safetensors: different between undisturbed and ")
    assert len(re.findall("^DIFFERENT .* best/model.safetensors", shown.out, re.MULTILINE)) == 2
    record = record_of(tmp_path / "run-chaos")
    assert record["different"] == ["best/model.safetensors"]


def test_kills_that_came_too_late_do_not_count(tmp_path, config, capsys, trained_by_copying):
    trained_by_copying["fired"] = 2
    assert main(["chaos", "--config", config, "--kills", "3"]) == 1
    assert "only 2 of 3 kills found a run alive" in capsys.readouterr().err
    record = record_of(tmp_path / "run-chaos")
    assert len(record["kills"]) == 2
    assert list(record["hashes"])[:3] == ["undisturbed", "killed", "killed-2"]


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_json(path: Path, key: str, value) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def change_last_row(run: Path, key: str) -> None:
    *rows, last = (run / "metrics.jsonl").read_text().splitlines()
    last = json.dumps(json.loads(last) | {key: 0.123})
    (run / "metrics.jsonl").write_text("\n".join([*rows, last]) + "\n")


CHANGES = {
    "checkpoints/step-00000020/model.safetensors": lambda run: flip_last_byte(
        newest_checkpoint(run) / "model.safetensors"
    ),
    "checkpoints/step-00000020/optimizer.safetensors": lambda run: flip_last_byte(
        newest_checkpoint(run) / "optimizer.safetensors"
    ),
    "checkpoints/step-00000020/ema.safetensors": lambda run: (
        newest_checkpoint(run) / "ema.safetensors"
    ).unlink(),
    "best/model.safetensors": lambda run: flip_last_byte(run / "best" / "model.safetensors"),
    "ledger/samples.jsonl": lambda run: flip_last_byte(run / "ledger" / "samples.jsonl"),
    "resolved config": lambda run: change_json(
        newest_checkpoint(run) / "state.json", "identity", {}
    ),
    "metrics.jsonl without times": lambda run: change_last_row(run, "val/loss"),
    "results.json's best and test": lambda run: change_json(run / "results.json", "best", None),
    "names of files": lambda run: (run / "report.html").unlink(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_differs_is_found_and_nothing_else(tmp_path, finished, name):
    other = shutil.copytree(finished, tmp_path / "other")
    CHANGES[name](other)
    hashes = {"one": run_hashes(finished), "other": run_hashes(other)}
    assert differing(hashes) == [name]
    lines = table(hashes).splitlines()
    assert [line for line in lines if not line.startswith("equal ")] == [
        f"DIFFERENT  {hashes[run].get(name, 'missing'):<64}  {name} ({run})" for run in hashes
    ]


def test_times_and_leftovers_of_a_kill_are_no_difference(tmp_path, finished):
    other = shutil.copytree(finished, tmp_path / "other")
    for key in ("elapsed_s", "speed/images_per_second", "speed/data_wait"):
        change_last_row(other, key)
    change_json(other / "results.json", "elapsed_s", 1e6)
    (other / ".config.yaml.123.tmp").touch()
    (other / "heartbeats").mkdir(exist_ok=True)
    (other / "heartbeats" / "rank-00000.json").touch()
    assert run_hashes(other) == run_hashes(finished)
    assert set(CHANGES) <= run_hashes(finished).keys()


# --- what is refused ---


def test_a_folder_that_is_in_use_is_refused(tmp_path, config, capsys, trained_by_copying):
    folder = tmp_path / "run-chaos"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for options in ([], ["--overwrite"]):  # it is none of ours
        assert main(["chaos", "--config", config, *options]) == 2
        assert f"--out: {folder} is not empty; name another" in capsys.readouterr().err
    (folder / "notes.txt").unlink()
    assert main(["chaos", "--config", config]) == 0
    assert main(["chaos", "--config", config]) == 2
    assert "--overwrite" in capsys.readouterr().err

    (folder / "notes.txt").write_text("mine")
    trained_by_copying["fired"] = 10
    assert main(["chaos", "--config", config, "--overwrite"]) == 0
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_cannot_be_repeated_or_makes_no_sense_is_refused(
    tmp_path, config, capsys, monkeypatch
):
    def refusal(*arguments: str) -> str:
        assert main(["chaos", "--config", config, *arguments]) == 2
        return capsys.readouterr().err

    assert "data.backend" in refusal("data.backend=stream", "data.stream_urls=a-{0..1}.tar")
    assert "--kills is 0" in refusal("--kills", "0")
    assert "--processes is 0" in refusal("--processes", "0")
    assert "unknown key stages.0.lrr" in refusal("stages.0.lrr=1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "--processes N" in refusal()
    assert not (tmp_path / "run-chaos").exists()


# --- when ---


def test_moments_lie_within_what_is_left_and_spread_over_it():
    random = Random(0)
    drawn = [draw_moment(PACE, random, step=12, kills_left=1) for _ in range(4000)]
    starts = [moment.after_s for moment in drawn if moment.in_start_up]
    works = [moment.after_s for moment in drawn if not moment.in_start_up]
    assert 0.1 < len(starts) / len(drawn) < 0.2
    for found, longest_s in ((starts, 3.0), (works, 6.0)):
        assert 0 <= min(found) < max(found) <= longest_s
        assert mean(found) == pytest.approx(longest_s / 2, rel=0.1)


def test_the_first_of_several_moments_leaves_room_for_the_others():
    random = Random(0)
    firsts = [draw_moment(PACE, random, step=0, kills_left=4) for _ in range(4000)]
    works = [moment.after_s for moment in firsts if not moment.in_start_up]
    assert mean(works) == pytest.approx(10.0 / 5, rel=0.1)

    random = Random(0)
    halves = [draw_moment(PACE, random, step=0, kills_left=4, earlier=0.5) for _ in firsts]
    works = [moment.after_s for moment in halves if not moment.in_start_up]
    assert mean(works) == pytest.approx(10.0 / 5 / 2, rel=0.1)


def test_nothing_is_left_after_the_last_step():
    assert [PACE.left_s(step) for step in (0, 4, 5, 19, 20)] == [10.0, 10.0, 8.0, 6.0, 1.0]


# --- processes ---

SLEEPER = "import time; time.sleep(600)"
LAUNCHER = """
import os, subprocess, sys, time
ranks = [
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]], start_new_session=True)
    for _ in range(2)
]
open(sys.argv[1] + "/ready", "w").close()
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.01)
for rank in ranks:
    rank.terminate()
sys.exit(1)
"""


@pytest.fixture
def start(tmp_path):
    """Starts Python code as if it were a training into the test's folder."""

    def begin(code: str):
        command = [sys.executable, "-c", code, str(tmp_path)]
        return started(command, run=tmp_path, log=tmp_path / "log", tick=lambda: None)

    return begin


def test_a_kill_reaches_what_has_a_session_of_its_own(tmp_path, start):
    with start(LAUNCHER) as attempt:
        assert attempt.wait((tmp_path / "ready").exists)
        assert len(processes_of(tmp_path)) == 3
        assert attempt.kill()
        assert not processes_of(tmp_path)
    assert not processes_of(tmp_path)


def test_a_kill_of_one_rank_is_over_when_the_launcher_is(tmp_path, start):
    with start(LAUNCHER) as attempt:
        assert attempt.wait((tmp_path / "ready").exists)
        assert attempt.kill_rank(Random(0))
        assert not processes_of(tmp_path)


def test_nothing_outlives_an_error(tmp_path, start):
    with suppress(ZeroDivisionError), start(LAUNCHER) as attempt:
        assert attempt.wait((tmp_path / "ready").exists)
        raise ZeroDivisionError
    assert not processes_of(tmp_path)


def test_a_kill_that_comes_too_late_is_known(start):
    with start("") as attempt:
        assert not attempt.wait()
        assert not attempt.kill()
        attempt.require_success("it")


def test_an_interrupt_waits_until_the_process_can_be_ended(tmp_path, start):
    old = signal.getsignal(signal.SIGTERM)

    def be_interrupted():
        with start(SLEEPER) as attempt:
            os.kill(os.getpid(), signal.SIGTERM)
            assert processes_of(tmp_path)
            attempt.wait()

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert not processes_of(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == old


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        ("import sys; print('rtl-dist: a cure'); print('of a launcher'); sys.exit(3)", 3, "code 3: a cure ("),
        ("raise SystemExit('plain words')", 1, "code 1: plain words ("),
        ("import os; os.kill(os.getpid(), 6)", 1, "SIGABRT: it said nothing ("),
    ],
)  # fmt: skip
def test_a_failure_is_told_in_its_own_words(tmp_path, start, code, exit_code, words):
    with start(code) as attempt, pytest.raises(RtlDistError) as caught:
        attempt.require_success("it")
    assert str(caught.value) == f"it ended with {words}{tmp_path / 'log'})"
    assert caught.value.exit_code == exit_code


def test_start_up_ends_with_the_config_that_this_start_wrote(tmp_path, start):
    (tmp_path / "config.yaml").write_text("of the start before")
    with start(SLEEPER) as attempt:
        assert attempt.work_s is None
        assert not Moment(in_start_up=False, after_s=0.0).has_come(attempt)
        (tmp_path / "new").write_text("of this one")
        (tmp_path / "new").replace(tmp_path / "config.yaml")
        assert attempt.work_s == pytest.approx(0, abs=0.5)
        assert Moment(in_start_up=False, after_s=0.0).has_come(attempt)
        assert not Moment(in_start_up=True, after_s=500.0).has_come(attempt)
