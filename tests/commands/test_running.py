"""How a command starts and ends: the collector rests while it imports torch for the first time, and
what it says is what we say."""

import gc
import io
import json
import subprocess
import sys

import pytest
from pack_images import class_folders, image_bytes

from rtl_dist.cli import main
from rtl_dist.commands.running import first_imports, run_command
from rtl_dist.core.errors import DataError
from rtl_dist.distributed.terminal import LOG, configure_logging, progress


@pytest.fixture
def fresh_process(monkeypatch):
    """As if torch had not been imported yet; see also ``pytest_collection_finish``."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("fresh_process")
def test_what_is_imported_is_not_searched_for_garbage():
    with first_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("fresh_process")
def test_a_library_that_cannot_be_imported_is_no_fault_of_ours(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "silly")

    def command():
        with first_imports():
            raise ValueError("Unknown level: 'SILLY'\nand much more")

    assert run_command(command, debug=False) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Unknown level: 'SILLY'; correct" in line
    assert "ACCELERATE_LOG_LEVEL" in line
    assert gc.isenabled()


def test_memory_that_is_not_there_is_no_fault_of_ours(capsys):
    def command():
        raise MemoryError

    assert run_command(command, debug=False) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "memory" in line
    assert "fault" not in line


def test_nothing_is_done_where_torch_is_there_already(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("it was frozen"))
    with first_imports():
        assert gc.isenabled()


@pytest.mark.usefixtures("fresh_process")
def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with first_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


FORGED = "x\x1b[2J\n\rrtl-dist: all is sound\u202e"


def test_an_error_says_no_line_of_somebody_elses(capsys):
    def fail():
        raise DataError(f"{FORGED} is no image")

    assert run_command(fail, debug=False) == 3
    assert capsys.readouterr().err.split("\n") == [
        r"rtl-dist: x\x1b[2J",
        r"  \rrtl-dist: all is sound\u202e is no image",
        "",
    ]


def test_names_of_files_say_no_line_of_somebody_elses(tmp_path, capsys):
    folder = class_folders(tmp_path / "s", {"a": 1, "b": 1})
    (folder / "a" / f"{FORGED}.jpg").write_bytes(b"no image")
    (folder / "a" / f"{FORGED}.png").write_bytes(image_bytes(1, (70, 7)))
    (folder / "b" / "\udcff.jpg").write_bytes(b"no image, and no UTF-8")
    (folder / f"{FORGED}.csv").touch()
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert r"left out: a/x\x1b[2J\n\rrtl-dist: all is sound\u202e.jpg (is not a" in said.out
    assert r"left out: b/\udcff.jpg" in said.out
    assert r"made of a/x\x1b[2J\n\rrtl-dist: all is sound\u202e.png" in said.out
    assert not any(line.startswith("rtl-dist: all") for line in said.out.splitlines())
    assert all(one.isprintable() or one == "\n" for one in said.out + said.err)


def test_a_terminal_need_not_have_every_letter(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    assert run_command(lambda: "gr\u00f6\u00dfe \U0001f41c", debug=False) == 0
    sys.stdout.flush()
    assert content.getvalue() == rb"gr\u00f6\u00dfe \ud83d\udc1c" + b"\n"


def test_closed_streams_fail_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def work() -> str:
        configure_logging(is_main=True)
        with progress(total=1, what="work", unit="step") as bar:
            bar.update()
        LOG.info("done")
        return "done"

    assert run_command(work, debug=False) == 0
    LOG.handlers.clear()
    sys.stdout.close()
    sys.stderr.close()


FINISHES = """
import os, sys
from rtl_dist.commands.running import leave, run_command

def command():
    sys.stderr.write("said\\n")
    with open(sys.argv[1], "w") as file:
        print(file.fileno(), file=file)
    return "the result"

leave(run_command(command, debug=False))
"""


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">&-", "2>&-", ">/dev/full"])
def test_a_command_that_can_tell_nobody_is_done_all_the_same(streams, tmp_path):
    line = f'exec "$1" -c "$2" "$3" {streams}'
    words = ["sh", "-c", line, "sh", sys.executable, FINISHES, str(tmp_path / "made")]
    assert subprocess.run(words, check=False).returncode == 0
    assert int((tmp_path / "made").read_text()) > 2


def test_json_stays_json_where_the_terminal_lacks_letters(monkeypatch):
    told = {"input": "ünï 😀\udcff.jpg"}
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii"))

    def command():
        sys.stdout.write(json.dumps(told, ensure_ascii=False))

    assert run_command(command, debug=False) == 0
    sys.stdout.flush()
    assert json.loads(out.getvalue()) == told
