"""Whole runs on remote data: the same as on local data, and clear about what they cannot have."""

import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from killed_runs import Fault, run_ranks
from launched_runs import TIMEOUT_S, finish, start_ranks
from moto.server import ThreadedMotoServer
from remote_helpers import no_double_downloads, serving
from small_sets import order_of
from tiny_runs import make_dataset, tiny_config, write_config

from rtl_dist.cli import main as cli
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.storage import remote
from rtl_dist.report import run as report

# The command, but as ``impatient`` here.
IMPATIENT = (
    "-c",
    "import sys; from rtl_dist.data.storage import remote; remote.FIRST_WAIT_S = 0.01\n"
    "from rtl_dist.report import run; run.draw_run = lambda run: None\n"
    "from rtl_dist.train import main; sys.exit(main())",
)
ALL = {"name": "all", "steps": 6, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}
STAGES = [{"name": "head", "steps": 3, "trainable": "head", "lr": 1e-2, "views": 2}, ALL]
NOISE = (
    "Unclosed",
    "Traceback",
    "Warning",
    "Exception ignored",
    "never awaited",
    "this is a fault",
)


@dataclass(frozen=True, kw_only=True)
class Impatient(Fault):
    """No fault: every rank of a job is as ``impatient`` here."""

    rank: int | None = None

    def install(self, mark: int) -> None:
        remote.FIRST_WAIT_S = 0.01


@pytest.fixture(autouse=True)
def impatient(monkeypatch, undrawn):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """57 training images in 3 shards."""
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def server(dataset):
    with serving(dataset) as server:
        yield server


@pytest.fixture
def copy(dataset, tmp_path):
    """A server of a copy of the data that a test may damage."""
    shutil.copytree(dataset, tmp_path / "copy")
    with serving(tmp_path / "copy") as server:
        yield server


def config_of(tmp_path, data, name="run", **changes):
    changes = {
        "stages": STAGES,
        "run__ledger": True,
        "data__cache_dir": str(tmp_path / "cache"),
    } | changes
    return write_config(tmp_path / f"{name}.yaml", tiny_config(data, tmp_path / name, **changes))


def train(tmp_path, data, name="run", **changes):
    """(ledger, sha256 of the last weights) of a run through the command line."""
    assert cli(["train", "--config", config_of(tmp_path, data, name, **changes)]) == 0
    return outcome(tmp_path / name)


def outcome(run):
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "done"
    return (run / "ledger" / "samples.jsonl").read_bytes(), results["weights_sha256"]


def fails(capsys, tmp_path, data, code, **changes):
    """The last word of a run that must fail."""
    capsys.readouterr()
    assert cli(["train", "--config", config_of(tmp_path, data, **changes)]) == code
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("rtl-dist:") for line in lines) == 1
    assert not noise_in("\n".join(lines))
    return lines[-1]


def noise_in(output):
    return [line for line in output.splitlines() if any(noise in line for noise in NOISE)]


@pytest.fixture(scope="module")
def local(dataset, tmp_path_factory):
    """What runs on the local data give, by the order of samples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_run", lambda run: None)
        return {
            order: train(
                tmp_path_factory.mktemp(order), dataset, data__shuffle=order, data__window=2
            )
            for order in ("full", "window")
        }


# --- the same run ---


@pytest.mark.parametrize(
    ("order", "workers"),
    [
        ("full", 2),
        ("window", 0),
        pytest.param("full", 0, marks=pytest.mark.exhaustive),
        pytest.param("window", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_cold_and_warm_runs_are_the_local_run(local, server, tmp_path, order, workers):
    changes = {"data__shuffle": order, "data__window": 2, "data__workers": workers}
    assert train(tmp_path, server.url, "cold", **changes) == local[order]
    assert no_double_downloads(server, "*.tar")
    assert {Path(r.path).parent.name for r in server.gets("*.tar")} == {"train", "val"}
    server.forget()
    assert train(tmp_path, server.url, "warm", **changes) == local[order]
    assert not server.gets("*.tar")
    assert not server.gets("*.npy")


def test_a_bad_line_changes_nothing_but_the_time(local, server, tmp_path):
    faults = [
        server.fail("*", "status", 503, times=4, heads=True),
        server.fail("*.tar", "drop", 1000, times=3),
        server.fail("*.npy", "drop", 100, times=1),
        server.fail("*.tar", "wrong_bytes", times=1),
        server.fail("*.tar", "slow", 500_000),
        server.fail("val*", "no_ranges"),
    ]
    assert train(tmp_path, server.url, data__workers=2) == local["full"]
    assert [fault.times for fault in faults[:4]] == [0, 0, 0, 0]
    assert server.fired["slow"]
    assert server.fired["no_ranges"]


def test_two_processes_share_one_cache(local, server, tmp_path):
    config = config_of(tmp_path, server.url, data__workers=1)
    for one in run_ranks(config, world_size=2, fault=Impatient()):
        assert one.code == 0, one.output
        assert not noise_in(one.output), one.output
    assert outcome(tmp_path / "run")[0] == local["full"][0]
    assert no_double_downloads(server, "*.tar")
    assert no_double_downloads(server, "*.npy")


def test_a_file_url_serves_as_well(local, dataset, tmp_path):
    assert train(tmp_path, f"file://{dataset}") == local["full"]
    assert len([p for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock"]) == 7


def test_a_trained_model_is_evaluated_on_remote_data(
    dataset, server, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    train(tmp_path, dataset)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    figures = []
    for where in (str(dataset), server.url):
        capsys.readouterr()
        words = ["evaluate", run, "--data", where, "--split", "test", "--out", str(out)]
        assert cli([*words, "--workers", "1"]) == 0
        figures.append((capsys.readouterr().out, (out / "metrics.json").read_text()))
    assert figures[0] == figures[1]
    assert server.gets("test/*.tar")


# --- what cannot be had ---


def test_a_truncated_or_missing_shard_is_found_before_the_first_step(copy, tmp_path, capsys):
    path = next((copy.folder / "train").glob("*2.tar"))
    path.write_bytes(path.read_bytes()[:-512])
    says = fails(capsys, tmp_path, copy.url, 3)
    assert f"{copy.url}/train/{path.name} was truncated" in says
    path.unlink()
    says = fails(capsys, tmp_path, copy.url, 3)
    assert f"{copy.url}/train/{path.name} cannot be opened: it is not there" in says
    assert not (tmp_path / "run" / "ledger").exists()
    assert fails(capsys, tmp_path, f"{copy.url}/no", 3).endswith("correct data.path")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_altered_shard_is_fetched_once_more_and_then_named(copy, tmp_path, capsys, workers):
    path = next((copy.folder / "train").glob("*1.tar"))
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    says = fails(capsys, tmp_path, copy.url, 3, data__workers=workers)
    assert f"{copy.url}/train/{path.name} was altered" in says
    assert len(copy.gets(f"train/{path.name}")) >= 2


def test_forbidden_data_is_said(server, tmp_path, capsys):
    server.fail("*", "status", 403, heads=True)
    assert "dataset.json may not be read" in fails(capsys, tmp_path, server.url, 3)


def test_a_cache_that_is_too_small_is_said_before_the_first_step(server, tmp_path, capsys):
    says = fails(capsys, tmp_path, server.url, 2, data__cache_gb=3e-5)
    assert "data.cache_gb" in says
    assert not (tmp_path / "run" / "ledger").exists()


def hold_later_shards(server, dataset):
    """With window=1, the first step has what it needs; later ones wait."""
    split = open_dataset(dataset).split("train")
    order = order_of(split, seed=5, window=1)
    needed = set(order.shards_of(order.samples_at(0, 16)[0]).tolist())
    assert len(needed) < len(split.shards)
    for number in set(range(len(split.shards))) - needed:
        server.fail(split.shards[number].path, "hold")


WINDOW_1 = {"data__shuffle": "window", "data__window": 1, "stages": [ALL]}


def test_a_server_that_goes_ends_every_rank_with_one_line(dataset, server, tmp_path):
    hold_later_shards(server, dataset)
    config = config_of(tmp_path, server.url, data__workers=1, **WINDOW_1)
    stopped_at = []

    def stop() -> None:
        wait_for(lambda: server.fired["hold"])
        server.stop()
        stopped_at.append(time.monotonic())

    stopper = threading.Thread(target=stop)
    stopper.start()
    exits = run_ranks(config, world_size=2, fault=Impatient())
    stopper.join()
    assert time.monotonic() - stopped_at[0] < 60
    for one in exits:
        assert one.code == 1, one.output
        lines = one.output.splitlines()
        assert [line for line in lines if line.startswith("rtl-dist:")] == lines[-1:], one.output
        assert "cannot read http" in lines[-1]
        assert "(8 attempts)" in lines[-1]
        assert not noise_in(one.output), one.output


def test_a_run_that_ends_does_not_wait_for_what_it_no_longer_needs(dataset, server, tmp_path):
    stages = [ALL | {"steps": 1}]
    config = config_of(tmp_path, server.url, data__test=None, **WINDOW_1 | {"stages": stages})
    hold_later_shards(server, dataset)
    begun = time.monotonic()
    (process,) = start_ranks(["--config", config], 1, program=IMPATIENT)
    code, output = finish(process)
    assert code == 0, output
    assert server.fired["hold"]
    assert time.monotonic() - begun < 50  # what is held is held for 60
    assert not noise_in(output), output


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- S3 ---


@pytest.fixture
def bucket(dataset, monkeypatch):
    """``s3://photos/ds`` on a real server; yields boto3's client of it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="photos")
    for path in sorted(dataset.rglob("*")):
        if path.is_file():
            s3.upload_file(str(path), "photos", f"ds/{path.relative_to(dataset)}")
    yield s3
    server.stop()


def test_s3_serves_as_well_and_says_what_is_missing(local, bucket, tmp_path, capsys):
    assert train(tmp_path, "s3://photos/ds", data__workers=2) == local["full"]
    bucket.put_object(Bucket="photos", Key="ds/train/train-000001.tar", Body=b"short")
    says = fails(capsys, tmp_path, "s3://photos/ds", 3, name="other")
    assert "s3://photos/ds/train/train-000001.tar was truncated: 5 bytes" in says
    bucket.delete_object(Bucket="photos", Key="ds/train/train-000001.tar")
    says = fails(capsys, tmp_path, "s3://photos/ds", 3, name="other")
    assert "s3://photos/ds/train/train-000001.tar cannot be opened: it is not there" in says
    begun = time.monotonic()
    says = fails(capsys, tmp_path, "s3://photos/elsewhere", 3, name="other")
    assert "s3://photos/elsewhere/dataset.json is not there" in says
    says = fails(capsys, tmp_path, "s3://nobodys/ds", 3, name="other")
    assert "s3://nobodys/ds/dataset.json is not there" in says
    assert time.monotonic() - begun < 60  # asked once, not retried for minutes
