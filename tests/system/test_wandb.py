"""W&B gets a copy of the metrics, each row once, and can neither stop, change nor hold up a run."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from killed_runs import At, Exit, Fault, Kill, Together, replace_everywhere, run_ranks
from tiny_runs import (
    make_dataset,
    metric_rows,
    require_equal_runs,
    results,
    same,
    tiny_config,
    train,
    train_process,
    weights,
    write_config,
)
from wandb_packages import make_package
from wandb_server import HangingServer, WandbServer

from rtl_dist.records import wandb_copy, wandb_process
from rtl_dist.records.tracking import Tracker
from rtl_dist.records.wandb_process import start_wandb

MARK = "RTL_DIST_TEST"  # an environment variable by which a test knows its W&B's processes
CANARY = "0123deadbeefcafe0123deadbeefcafe01234567"
LOG = Tracker.log  # of rows at steps 3, 5, 6, 9, ..., the checkpoints at 4, 6, 8
STEPS = [3, 5, 6, 9, 10, 12, 15, 18, 20]
LATER = pytest.mark.exhaustive
BOUND_S, SLACK_S = 5.0, 1.5  # that a run may take longer; that a busy machine may need
ENDS_S = 40.0  # in which W&B's processes must be gone, where a test shortens their own limits


# --- faults --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Times(Fault):
    """None: tells how long W&B held up the run, and may change for how long W&B is waited for."""

    last_s: float | None = None
    connect_s: float = 40.0
    finish_s: float = 60.0

    def install(self, mark: int) -> None:
        wandb_process.TIMES.update(connect_s=self.connect_s, finish_s=self.finish_s)
        if self.last_s is not None:
            wandb_process.LAST_S = self.last_s
        for place in (
            start_wandb,
            Tracker.close,
        ):
            replace_everywhere(place, self._timed)

    @staticmethod
    def _timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            result = original(*args)
            sys.stdout.write(f"W&B held up {time.perf_counter() - began:.3f} s\n")
            return result

        return timed


@dataclass(frozen=True, kw_only=True)
class SignalWandb(At):
    """Once W&B's own process is there, it gets a signal.

    and_copy, and_run: so do the process that copies and the training process.
    """

    place: str = LOG
    number: int = signal.SIGKILL
    and_copy: bool = False
    and_run: bool = False

    def happen(self) -> None:
        own = psutil.Process()
        while not any(child.name() == "wandb-core" for child in own.children(recursive=True)):
            time.sleep(0.05)
        time.sleep(1.0)  # in which it takes the first rows
        copy, core = own.children(recursive=True)
        for process, is_meant in ((copy, self.and_copy), (core, True), (own, self.and_run)):
            if is_meant:
                os.kill(process.pid, self.number)


@dataclass(frozen=True, kw_only=True)
class WaitFor(At):
    """Training waits until this is there."""

    place: str = LOG
    folder: Path
    pattern: str

    def happen(self) -> None:
        while not any(self.folder.glob(self.pattern)):
            time.sleep(0.05)


# --- what is run and read ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without W&B."""
    return train(tmp_path_factory.mktemp("undisturbed"), dataset)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run folder of which no process is left in the end."""
    yield tmp_path / "run"
    wait_for_wandb(tmp_path)


@pytest.fixture
def config(tmp_path: Path, dataset: Path, run: Path) -> str:
    return write_config(tmp_path / "c.yaml", tiny_config(dataset, run, track={"wandb": "auto"}))


def environment(tmp_path: Path, mode: str, **more: str) -> dict[str, str]:
    """Of a user without a key, who starts the run from within another W&B run."""
    own = {"NETRC": str(tmp_path / "none"), "WANDB_API_KEY": "", "WANDB_SERVICE": "3-1-unix-/gone"}
    return {MARK: str(tmp_path), "WANDB_MODE": mode} | own | more


def online(tmp_path: Path, url: str) -> dict[str, str]:
    return environment(tmp_path, "online", WANDB_BASE_URL=url, WANDB_API_KEY=CANARY)


def wandb_processes(tmp_path: Path) -> list[psutil.Process]:
    """The process that copies a test's run, and W&B's own."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(tmp_path):
                found.append(process)
    return found


def wait_for_wandb(tmp_path: Path) -> None:
    """Until its processes have ended by themselves."""
    left = psutil.wait_procs(wandb_processes(tmp_path), timeout=ENDS_S)[1]
    left += wandb_processes(tmp_path)  # W&B's own may have started meanwhile
    for process in left:
        process.kill()
    assert not left, f"W&B does not end: {left}"


def train_once(config: str, env: dict[str, str], *faults: Fault, code: int = 0) -> Exit:
    (exit,) = run_ranks(config, fault=Together(faults=faults or (Times(last_s=60),)), env=env)
    assert exit.code == code, exit.output
    return exit


def require_quick(exit: Exit) -> None:
    held_up = [float(found) for found in re.findall(r"W&B held up (\S+) s", exit.output)]
    assert len(held_up) == 2, exit.output
    assert sum(held_up) < BOUND_S + SLACK_S, held_up


def warnings_of(output: str) -> list[str]:
    """Without the time before each."""
    return re.findall(r"^[\d:]{8} (W&B: .*)$", output, re.MULTILINE)


def require_same_weights(run: Path, undisturbed: Path) -> None:
    assert same(weights(run), weights(undisturbed))
    assert results(run)["weights_sha256"] == results(undisturbed)["weights_sha256"]
    assert metric_rows(run) == metric_rows(undisturbed)


def files_of(run: Path) -> list[Path]:
    """W&B's files, oldest first."""
    found = run.glob("wandb/*run-*/*.wandb")
    return sorted(found, key=lambda path: path.parent.name.partition("run-")[2])


def read(file: Path) -> dict[str, list[Any]]:
    """What W&B's own reader finds in a file of its, by kind."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    records: dict[str, list[Any]] = {"history": []}
    for line in found.splitlines():
        record = json.loads(line)
        records.setdefault(record["type"], []).append(record[record["type"]])
    return records


def history_of(file: Path) -> list[dict[str, Any]]:
    return [unmarked(record["item"]) for record in read(file)["history"]]


def unmarked(item: dict[str, Any]) -> dict[str, Any]:
    """A row of W&B's history as it was logged."""
    assert item["_step"] == item["step"]
    return {key: value for key, value in item.items() if not key.startswith("_")}


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("elapsed_s", *SPEED)} for row in rows]


SPEED = ("speed/images_per_second", "speed/data_wait")


def id_of(run: Path) -> str:
    id = json.loads((run / "wandb" / "id.json").read_text())["id"]
    assert [file.stem for file in files_of(run)] == [f"run-{id}"] * len(files_of(run))
    return id


def require_secret(run: Path, *outputs: str) -> None:
    """The key is nowhere below the run folder, nor in what was printed."""
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path
    for output in outputs:
        assert CANARY not in output


# --- offline -------------------------------------------------------------------------------------


@pytest.mark.launch
def test_offline_has_every_row_once_with_config_and_results(tmp_path, run, config):
    often = ["run.log_every=1 step", "eval.every=1 step", "stages.2.steps=14"]
    with HangingServer() as server:
        often.append("track.wandb=offline")
        env = online(tmp_path, server.url)
        (exit,) = run_ranks(config, *often, fault=Times(last_s=60), env=env)
        assert not server.was_asked
    assert (exit.code, warnings_of(exit.output)) == (0, [])
    assert (run / "wandb" / "copy.log").read_bytes() == b""
    (file,) = files_of(run)
    rows = metric_rows(run, timing=True)
    assert [row["step"] for row in rows] == list(range(1, 27))
    records = read(file)
    assert [unmarked(record["item"]) for record in records["history"]] == rows
    recorded = records["run"][0]["config"]["update"]
    resolved = json.loads((run / "wandb" / "config.json").read_text())
    assert recorded["batch"] == {"global": 16, "micro": 4, "sync_batchnorm": False}
    assert {key: recorded[key] for key in resolved} == resolved
    summary: dict[str, Any] = {}
    for record in records["summary"]:
        summary |= record["update"]
    kept = results(run)
    kept.pop("bad_samples")
    assert {key: summary.get(key) for key in kept} == kept
    assert id_of(run)
    require_secret(run, exit.output)
    require_readable_at_any_length(file, run, [row["step"] for row in rows])


def require_readable_at_any_length(file: Path, run: Path, steps: list[int]) -> None:
    """What a killed W&B wrote is read as far as it goes."""
    content = file.read_bytes()
    assert len(content) > 32768, "no record lies across two blocks"
    found = []
    for size in range(0, len(content), 311):
        file.write_bytes(content[:size])
        found.append(wandb_copy._last_recorded_step(run, id_of(run)))
    assert found == sorted(found)
    assert set(found) == {-1, *steps}
    file.write_bytes(content[:20_000] + bytes(len(content) - 20_000))  # as after a power failure
    assert -1 < wandb_copy._last_recorded_step(run, id_of(run)) < 26
    file.write_bytes(content)
    file.parent.rename(f"{file.parent}-1")  # W&B's name for the second of one second
    assert wandb_copy._last_recorded_step(run, id_of(run)) == steps[-1]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("call", "who"),
    [
        pytest.param(
            1, "training, awaited", id="before its first checkpoint, awaited", marks=LATER
        ),
        pytest.param(1, "all", id="before its first checkpoint, all", marks=LATER),
        pytest.param(1, "training", id="before its first checkpoint", marks=LATER),
        pytest.param(4, "training, awaited", id="past a checkpoint, awaited", marks=LATER),
        pytest.param(4, "all", id="past a checkpoint, all"),
        pytest.param(4, "training", id="past a checkpoint"),
    ],
)
def test_killed_and_resumed_it_is_one_run_with_each_step_once(
    tmp_path, run, undisturbed, config, call, who
):
    """awaited: the copy has ended before the run goes on. all: W&B and the copy are killed, too."""
    env = environment(tmp_path, "offline")
    kill = Kill(place=LOG, call=call, after=True)
    if who == "all":
        kill = SignalWandb(call=call, after=True, and_copy=True, and_run=True)
    killed = train_once(config, env, Times(), kill, code=-signal.SIGKILL)
    assert killed.fired
    assert bool(list(run.glob("checkpoints/step-*"))) == (call > 1)
    id = json.loads((run / "wandb" / "id.json").read_text())["id"]
    if who == "training, awaited":
        wait_for_wandb(tmp_path)
        (file,) = files_of(run)
        assert [row["step"] for row in history_of(file)] == STEPS[:call]
    train_once(config, env, Times(last_s=60))
    require_equal_runs(undisturbed, run)
    assert id_of(run) == id
    assert len(files_of(run)) == 2, list((run / "wandb").iterdir())
    copied = [row for file in files_of(run) for row in history_of(file)]
    assert untimed(copied) == metric_rows(undisturbed)


@pytest.mark.launch
def test_a_stop_that_reaches_all_processes_leaves_the_copy_whole(
    tmp_path, run, undisturbed, config
):
    env = environment(tmp_path, "offline")
    stop = SignalWandb(number=signal.SIGTERM, call=2, and_copy=True, and_run=True)
    stopped = train_once(config, env, Times(last_s=60), stop, code=75)
    assert stopped.fired
    copied = [row for file in files_of(run) for row in history_of(file)]
    assert untimed(copied) == metric_rows(run)
    assert len(copied) < len(STEPS)
    train_once(config, env)
    require_equal_runs(undisturbed, run)
    copied = [row for file in files_of(run) for row in history_of(file)]
    assert untimed(copied) == metric_rows(undisturbed)


# --- online --------------------------------------------------------------------------------------


@pytest.mark.launch
def test_online_it_goes_on_as_one_run_with_each_step_once(tmp_path, run, undisturbed, config):
    """Killed twice: with the copy left to end, and with all its processes. Then W&B is away, and
    what was recorded offline meanwhile can be sent."""
    with WandbServer() as server:
        env = online(tmp_path, server.url)
        killed = train_once(config, env, Kill(place=LOG, call=4, after=True), code=-signal.SIGKILL)
        wait_for_wandb(tmp_path)
        (stored,) = server.runs.values()
        assert [unmarked(row)["step"] for row in stored.history] == STEPS[:4]
        everyone = SignalWandb(call=2, after=True, and_copy=True, and_run=True)
        all_killed = train_once(config, env, everyone, code=-signal.SIGKILL)
        away = environment(tmp_path, "offline")
        train_once(config, away, Kill(place=LOG, call=2, after=True), code=-signal.SIGKILL)
        wait_for_wandb(tmp_path)
        recorded = files_of(run)[-1]
        assert recorded.parent.name.startswith("offline-run-")
        assert history_of(recorded)[0]["step"] == 10, "9 is in the file of an earlier start"
        finished = train_once(config, env)
        assert (killed.fired, all_killed.fired) == (True, True)
        assert recorded.with_suffix(".wandb.synced").exists(), "it would be sent once more"
        assert warnings_of(finished.output) == []
        require_equal_runs(undisturbed, run)
        assert list(server.runs) == [id_of(run)]
        assert untimed([unmarked(row) for row in stored.history]) == metric_rows(undisturbed)
        assert stored.config["batch"]["global"] == 16
        assert json.loads(stored.lines("wandb-summary.json")[-1])["status"] == "done"
        assert server.keys == {CANARY}
        assert (run / "wandb" / "copy.log").read_bytes() == b""
    require_secret(run, killed.output, all_killed.output, finished.output)


@pytest.mark.launch
def test_what_was_recorded_offline_is_sent_by_wandb_sync(tmp_path, run, undisturbed, config):
    env = environment(tmp_path, "offline")
    train_once(config, env, Kill(place=LOG, call=4, after=True), code=-signal.SIGKILL)
    train_once(config, env)
    with WandbServer() as server:
        command = [sys.executable, "-m", "wandb", "sync", "--yes"]
        command += [str(file.parent) for file in files_of(run)]
        sync = {**os.environ, **online(tmp_path, server.url), "WANDB_SERVICE": ""}
        subprocess.run(command, env=sync, check=True, timeout=60, capture_output=True)
        (stored,) = server.runs.values()
        assert untimed([unmarked(row) for row in stored.history]) == metric_rows(undisturbed)


@pytest.mark.launch
def test_a_server_that_never_answers_costs_seconds_and_what_it_lacks_is_offline(
    tmp_path, run, undisturbed, config
):
    with HangingServer() as server:
        exit = train_once(config, online(tmp_path, server.url), Times(connect_s=6))
        assert wandb_processes(tmp_path), "nothing was left behind"
        require_quick(exit)
        (line,) = warnings_of(exit.output)
        assert line.startswith("W&B: still busy and left to itself (see ")
        wait_for_wandb(tmp_path)
        assert server.was_asked
    require_same_weights(run, undisturbed)
    assert [len(history_of(file)) for file in files_of(run)] == [0, len(STEPS)]
    assert history_of(files_of(run)[-1]) == metric_rows(run, timing=True)
    assert "what W&B does not have is offline" in (run / "wandb" / "copy.log").read_text()
    require_secret(run, exit.output)


@pytest.mark.launch
def test_refused_it_goes_on_offline_while_the_run_does(tmp_path, run, undisturbed, config):
    with HangingServer() as server:
        url = server.url
    goes_on = WaitFor(call=2, folder=run / "wandb", pattern="offline-run-*")
    exit = train_once(config, online(tmp_path, url), Times(last_s=60, connect_s=4), goes_on)
    assert exit.fired
    (line,) = warnings_of(exit.output)
    assert "connection refused" in line
    assert f"(see {run / 'wandb' / 'copy.log'}); metrics.jsonl has everything" in line
    require_same_weights(run, undisturbed)
    assert history_of(files_of(run)[-1]) == metric_rows(run, timing=True)
    require_secret(run, exit.output)


@pytest.mark.launch
def test_nobody_waits_for_a_copy_that_hangs_and_it_ends_by_itself(tmp_path, dataset, run, config):
    """A caller that reads the run's output until its end, which a process left behind could hold
    open; with the newest form of key."""
    key = "wandb_v1_" + CANARY + CANARY
    with HangingServer() as server:
        env = online(tmp_path, server.url) | {"WANDB_API_KEY": key}
        process = train_process(config, env=env)
        output = process.communicate(timeout=120)
        left = wandb_processes(tmp_path)
        assert process.returncode == 0, output
        assert len(left) == 2, "nothing was left behind, so that nothing is shown"
        assert warnings_of(output[1])
        assert server.was_asked
        require_secret(run, *output)
        for one in left:  # it would end in a minute
            one.kill()


@pytest.mark.launch
@pytest.mark.parametrize(
    "key",
    [
        pytest.param("", id="none", marks=LATER),
        pytest.param("short", marks=LATER),
        pytest.param("no such form " * 5, id="refused offline, too"),
    ],
)
def test_without_a_key_it_is_offline_and_nothing_is_asked(tmp_path, run, config, key):
    env = environment(tmp_path, "online", WANDB_API_KEY=key)
    exit = train_once(config, env, Times(last_s=60))
    (line,) = warnings_of(exit.output)
    assert "API key" in line
    assert history_of(files_of(run)[-1]) == metric_rows(run, timing=True)


# --- a W&B that fails or hangs -------------------------------------------------------------------


@pytest.mark.launch
def test_wandb_killed_in_mid_run_costs_seconds_and_begins_again(tmp_path, run, undisturbed, config):
    fault = SignalWandb(number=signal.SIGKILL, call=4, after=True)
    exit = train_once(config, environment(tmp_path, "offline"), Times(), fault)
    assert exit.fired
    require_quick(exit)
    assert len(warnings_of(exit.output)) == 1
    require_same_weights(run, undisturbed)
    wait_for_wandb(tmp_path)
    copied = [row for file in files_of(run) for row in history_of(file)]
    assert copied == metric_rows(run, timing=True)
    assert id_of(run)


@pytest.mark.launch
def test_wandb_stopped_in_mid_run_costs_seconds_and_is_ended(tmp_path, run, undisturbed, config):
    fault = SignalWandb(number=signal.SIGSTOP, call=4, after=True)
    exit = train_once(config, environment(tmp_path, "offline"), Times(finish_s=6), fault)
    assert exit.fired
    require_quick(exit)
    assert len(warnings_of(exit.output)) == 1
    require_same_weights(run, undisturbed)
    assert len(wandb_processes(tmp_path)) == 2
    wait_for_wandb(tmp_path)
    assert (run / "wandb" / "copy.log").read_text().endswith("gave up, as W&B hangs\n")


IMPORTED = "open(__file__ + '.imported', 'w').close()\n"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('broken on purpose')", "RuntimeError: broken on purpose"),
        (
            "Settings = dict\ndef init(**_): raise RuntimeError('no\\nluck')",
            "RuntimeError: no luck",
        ),
        ("import time\ntime.sleep(1000)", "still busy and left to itself"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
    ],
    ids=["import", "init", "hangs", "dies"],
)
def test_a_broken_wandb_is_told_in_one_line(tmp_path, run, undisturbed, config, code, said):
    package = make_package(tmp_path, IMPORTED + code)
    env = environment(tmp_path, "online", PYTHONPATH=str(package))
    exit = train_once(config, env, Times(finish_s=5))
    assert (package / "wandb" / "__init__.py.imported").exists()
    require_quick(exit)
    (line,) = warnings_of(exit.output)
    assert said in line
    assert line.endswith(f"(see {run / 'wandb' / 'copy.log'}); metrics.jsonl has everything")
    require_same_weights(run, undisturbed)
    wait_for_wandb(tmp_path)


def test_a_process_left_behind_warns_of_nothing(tmp_path, dataset, run, monkeypatch):
    """Neither of a file nor of a process that nobody closed, which would be an error here."""
    monkeypatch.setattr(wandb_process, "LAST_S", 0.1)
    monkeypatch.setattr(wandb_process, "TIMES", {"connect_s": 40.0, "finish_s": 2.0})
    with HangingServer() as server:
        for name, value in online(tmp_path, server.url).items():
            monkeypatch.setenv(name, value)
        stages = [{"name": "head", "steps": 2, "trainable": "head", "lr": 1e-2}]
        train(tmp_path, dataset, track={"wandb": "auto"}, stages=stages)
        assert wandb_processes(tmp_path)
        gc.collect()
        wait_for_wandb(tmp_path)
    gc.collect()


def test_what_cannot_be_written_is_told_and_the_run_goes_on(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 2, "trainable": "head", "lr": 1e-2}]
    run = train(tmp_path, dataset, track={"wandb": "off"}, stages=stages)
    (run / "wandb").write_text("not a folder")
    shutil.rmtree(run / "checkpoints")
    (run / "results.json").unlink()
    train(tmp_path, dataset, track={"wandb": "offline"}, stages=stages)
    assert "W&B is not available" in capsys.readouterr().err


def test_off_starts_nothing(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(wandb_process, "WandbProcess", None)  # which would be called
    stages = [{"name": "head", "steps": 2, "trainable": "head", "lr": 1e-2}]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name, said in (("one", "off"), ("other", "auto")):
        assert not (
            train(tmp_path, dataset, name, track={"wandb": said}, stages=stages) / "wandb"
        ).exists()
