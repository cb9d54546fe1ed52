"""The acceptance run of a GPU: what a CPU can do of it is done, small; its page says what it is."""

import json
import runpy
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from tiny_runs import ROOT

BENCHMARKS = ROOT / "benchmarks"
PAGE, JSON = ROOT / "docs" / "gpu.md", ROOT / "docs" / "gpu.json"


@pytest.fixture
def acceptance(monkeypatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "gpu_acceptance.py")))
    for name in set(sys.modules) - before:
        if name.startswith("gpu_"):
            del sys.modules[name]


def run(acceptance, monkeypatch, tmp_path, *arguments: str) -> tuple[dict, str]:
    kept = {"--json": tmp_path / "gpu.json", "--page": tmp_path / "gpu.md"}
    options = [str(part) for option in kept.items() for part in option]
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--small", *options, *arguments])
    acceptance.main()
    return json.loads(kept["--json"].read_text()), kept["--page"].read_text()


def test_it_runs_small_on_a_cpu(acceptance, monkeypatch, tmp_path, capsys):
    content, page = run(acceptance, monkeypatch, tmp_path, "--checks", "kernels", "speed")
    assert content["environment"]["device"] == "cpu"
    rows = content["findings"]
    assert [row["ok"] for row in rows if row["check"] == "kernels"] == [True] * 3
    speeds = [row for row in rows if row["check"] == "speed"]
    assert len(speeds) == 1
    assert all("images/s" in row["found"] and row["ok"] is None for row in speeds)
    assert "**This run had no GPU**" in page
    printed = capsys.readouterr().out
    for row in rows:
        assert row["found"] in printed
        assert f"| {row['what']} | {row['found']} |" in page


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "check", ["first-command", "quickstart", "ranks", "killed", "shards", "chaos", "tests"]
)
def test_every_check_runs_on_a_cpu(acceptance, monkeypatch, tmp_path, check):
    content, _ = run(acceptance, monkeypatch, tmp_path, "--checks", check)
    assert content["findings"]
    assert all(row["ok"] is not False for row in content["findings"])
    assert not any("not run" in row["found"] for row in content["findings"])


def test_a_check_that_fails_in_itself_is_a_finding_and_the_rest_goes_on(
    acceptance, monkeypatch, tmp_path, capsys
):
    def broken(place):
        raise ZeroDivisionError("no such | device")
        yield

    monkeypatch.setitem(acceptance.CHECKS, "quickstart", broken)
    with pytest.raises(SystemExit) as left:
        run(acceptance, monkeypatch, tmp_path, "--checks", "quickstart", "kernels")
    assert left.value.code == 1
    first, *rest = json.loads((tmp_path / "gpu.json").read_text())["findings"]
    assert (first["ok"], first["found"]) == (False, "ZeroDivisionError('no such | device')")
    assert len(rest) == 3
    assert "no such / device') |  | FAILED |" in (tmp_path / "gpu.md").read_text()


def test_what_the_time_does_not_hold_is_said(acceptance, monkeypatch, tmp_path, capsys):
    arguments = ("--minutes", "0", "--checks", "kernels", "chaos")
    content, _ = run(acceptance, monkeypatch, tmp_path, *arguments)
    assert [row["found"] for row in content["findings"]] == ["not run: the time was over"] * 2


def test_the_page_is_of_what_was_kept(acceptance):
    """Until somebody ran it on a GPU and kept the JSON, it says so and has no figure."""
    content = json.loads(JSON.read_text()) if JSON.exists() else None
    assert PAGE.read_text(encoding="utf-8") == acceptance.page(content)
    if content is None:
        assert "**Not yet run on a GPU.**" in PAGE.read_text(encoding="utf-8")
    else:
        assert content["environment"]["device"] == "cuda"
