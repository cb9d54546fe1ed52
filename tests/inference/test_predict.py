"""``rtl-dist predict``: every input once, in order, the same bytes however it is run."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from killed_runs import Fault, Kill, Together, require_done, require_killed, run_command
from model_folders import model_folder
from PIL import Image, ImageOps
from remote_helpers import serving
from tiny_runs import damage, make_dataset

from rtl_dist.cli import main
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.inference import part
from rtl_dist.inference.part import Part
from rtl_dist.model.calibration import Calibration


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), val=150)


@pytest.fixture(scope="module")
def images(dataset):
    return dataset.parent / "images" / "val"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def evaluated(model, dataset, tmp_path_factory):
    """The rows of evaluate's predictions.csv."""
    out = tmp_path_factory.mktemp("evaluated")
    words = ["evaluate", str(model), "--data", str(dataset), "--split", "val", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtl_dist.report.evaluation.draw", lambda path, make: None)  # takes longest
        assert main([*words, "--workers", "0"]) == 0
    return table(out / "predictions.csv")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predicted(model, *words, out, code=0):
    assert main(["predict", str(model), *map(str, words), "--out", str(out)]) == code
    return table(out) if out.suffix == ".csv" and out.exists() else []


def said(rows):
    return [(row["label"], row["probability"]) for row in rows]


# --- the same values as an evaluation's, however it is run ---------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_split_has_the_values_of_its_evaluation(model, dataset, evaluated, tmp_path, workers):
    rows = predicted(model, dataset, "--split", "val", "--workers", workers, out=tmp_path / "o.csv")
    assert [row["input"] for row in rows] == [row["key"] for row in evaluated]
    assert said(rows) == [(row["predicted"], row["confidence"]) for row in evaluated]
    assert len(set(said(rows))) > 100  # they tell images apart


@pytest.mark.launch
def test_files_have_the_values_of_their_evaluation_at_any_number_of_processes(
    model, images, evaluated, tmp_path
):
    asked = tmp_path / "asked.csv"  # a table, in the order of the split
    names = [f"{images.parent}/{row['file']}" for row in evaluated]
    asked.write_text("\n".join(["file", *names]) + "\n")
    alone = predicted(model, asked, "--workers", 0, out=tmp_path / "one.csv")
    assert [row["input"] for row in alone] == names
    assert said(alone) == [(row["predicted"], row["confidence"]) for row in evaluated]
    words = ["predict", str(model), str(asked), "--out", str(tmp_path / "two.csv")]
    exits = run_command(words, world_size=2)
    require_done(exits)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert exits[0].last_line == f"{tmp_path}/two.csv: 150 inputs"
    assert "inputs" not in exits[1].output


@dataclass(frozen=True, kw_only=True)
class Often(Fault):
    """Every round is recorded, not one in seconds."""

    def install(self, mark: int) -> None:
        part.RECORDED_EVERY_S = 0.0


@pytest.mark.launch
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_predict_that_was_killed_goes_on(model, images, tmp_path, capfd, world_size):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    words = ["predict", str(model), str(images), "--workers", "0", "--out"]
    # two rows of blocks are written, but only one of them is recorded
    kill = Kill(place=Part.record, call=3)
    exits = run_command(
        [*words, str(out)], world_size=world_size, fault=Together(faults=(Often(), kill))
    )
    require_killed(exits, Together(faults=(kill,)))
    assert not out.exists()
    rows = tmp_path / "out.csv.part" / "rows"
    assert main([*words, str(whole)]) == 0
    assert 0 < rows.stat().st_size < whole.stat().st_size
    capfd.readouterr()
    assert main([*words, str(out)]) == 0
    assert f"going on after {64 * world_size} of 150 inputs" in capfd.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert not rows.parent.exists()


@pytest.fixture
def stopped(model, images, tmp_path, monkeypatch):
    """A predict of which one block is written when it is asked to stop."""
    append = Part.append

    def append_and_ask(self, *given):
        append(self, *given)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "append", append_and_ask)
        predicted(model, images, "--workers", 0, out=tmp_path / "o.csv", code=75)
    return tmp_path / "o.csv"


def test_a_request_to_stop_keeps_what_was_done(stopped, model, images, tmp_path, capsys):
    record = json.loads((tmp_path / "o.csv.part" / "record.json").read_text())
    assert record["blocks"] >= 1
    predicted(model, images, "--workers", 0, out=stopped)
    assert "going on after " in capsys.readouterr().err
    predicted(model, images, "--workers", 0, out=tmp_path / "whole.csv")
    assert stopped.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_nothing_goes_on_with_other_options_inputs_or_weights(
    stopped, model, images, tmp_path, capsys
):
    def refused(a_model, *words):
        predicted(a_model, *words, out=stopped, code=2)
        return capsys.readouterr().err

    told = refused(model, images, "--top", 2)
    assert (
        f"{stopped}.part holds predictions that were begun with another --top (1 then, 2 now)"
        in told
    )
    assert "begun with another list of inputs: finish" in refused(model, images / "red")
    other = model_folder(tmp_path / "other", seed=1)
    assert "begun with another model: finish" in refused(other, images)
    rows = predicted(model, images / "red", "--overwrite", out=stopped)
    assert len(rows) == 50


def test_a_changed_file_is_another_input(stopped, model, images, tmp_path, capsys):
    copy = shutil.copytree(images, tmp_path / "val")
    before = model_folder(tmp_path / "m")
    assert main(["predict", str(before), str(copy), "--out", str(tmp_path / "a.jsonl")]) == 0
    predicted(model, copy, out=stopped, code=2)
    assert "another list of inputs" in capsys.readouterr().err


# --- what cannot be read --------------------------------------------------------------------------


@pytest.fixture
def mixed(images, tmp_path):
    """Two images, a text, one that is cut, and a name that a spreadsheet would run."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    whole = (images / "red" / "000.png").read_bytes()
    for name, content in {
        "=1+1.png": whole,
        "cut.png": whole[:200],
        "red.png": whole,
        "text.jpg": b"no image",
    }.items():
        (folder / name).write_bytes(content)
    return folder


def test_what_cannot_be_read_is_a_row_with_its_reason(model, mixed, tmp_path, capsys):
    out = tmp_path / "o.csv"
    rows = predicted(model, mixed, out=out, code=3)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        f"rtl-dist: 2 of 4 inputs could not be predicted: {mixed}/cut.png cannot"
    )
    assert told.endswith(
        f"; {out} has all inputs, with reasons; --allow-errors 2 makes this no failure"
    )
    assert [row["input"] for row in rows] == [
        f"{mixed}/{name}" for name in ("=1+1.png", "cut.png", "red.png", "text.jpg")
    ]
    assert rows[3] | {"input": ""} == {
        "input": "", "label": "", "probability": "", "error": "is not a JPEG, PNG or WebP",
    }  # fmt: skip
    assert rows[1]["error"].startswith("cannot be decoded: ")
    assert said(rows[:1]) == said(rows[2:3])
    assert rows[0]["error"] == ""
    predicted(model, mixed, "--allow-errors", 1, out=out, code=3)
    predicted(model, mixed, "--allow-errors", 2, out=out)
    assert ": 4 inputs, 2 of them without a prediction: " in capsys.readouterr().out


def test_names_are_no_formulas(model, mixed, tmp_path, monkeypatch):
    monkeypatch.chdir(mixed)
    rows = predicted(model, "=1+1.png", out=tmp_path / "o.csv")
    assert [row["input"] for row in rows] == ["'=1+1.png"]


def test_other_images_of_a_block_do_not_feel_one_that_cannot_be_read(model, images, tmp_path):
    files = sorted((images / "red").glob("*.png"))[:5]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    alone = predicted(model, *files, out=tmp_path / "a.csv")
    beside = predicted(model, *files[:2], bad, *files[2:], out=tmp_path / "b.csv", code=3)
    assert [row for row in beside if not row["error"]] == alone
    assert [row["error"] for row in beside if row["error"]] == ["is empty"]


# --- what is written ------------------------------------------------------------------------------


def test_every_form_says_the_same(model, mixed, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    words = (mixed, "--top", 2, "--allow-errors", 2)
    rows = predicted(model, *words, out=tmp_path / "o.csv")
    for name in ("o.jsonl", "o.parquet"):
        predicted(model, *words, out=tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    of_parquet = parquet.read_table(tmp_path / "o.parquet").to_pylist()
    assert list(of_parquet[0]) == list(rows[0])
    for row, line, values in zip(rows, lines, of_parquet, strict=True):
        assert row["input"] == line["input"] == values["input"]
        assert row["error"] == line.get("error", "") == (values["error"] or "")
        if row["error"]:
            assert values["label"] is None
            continue
        ranked = [(row["label"], row["probability"]), (row["label_2"], row["probability_2"])]
        assert ranked == [(one["label"], f"{one['probability']:.6f}") for one in line["top"]]
        assert ranked[1] == (values["label_2"], f"{values['probability_2']:.6f}")
        assert line["label"] == row["label"]


def test_several_labels_an_image(images, tmp_path):
    model = model_folder(tmp_path / "m", task=MULTI_LABEL)
    files = sorted((images / "red").glob("*.png"))[:6]
    rows = predicted(model, *files, "--top", 3, out=tmp_path / "o.csv")
    strict = predicted(model, *files, "--threshold", 0.9, out=tmp_path / "s.csv")
    lax = predicted(model, *files, "--threshold", 0, out=tmp_path / "l.csv")
    for row, few, every in zip(rows, strict, lax, strict=True):
        all_of = {row[f"label_{i}"]: row[f"probability_{i}"] for i in (1, 2, 3)}
        by_class = [(name, all_of[name]) for name in ("blue", "green", "red")]
        for told, least in ((row, 0.5), (few, 0.9), (every, 0.0)):
            expected = [(name, value) for name, value in by_class if float(value) >= least]
            assert told["labels"] == "|".join(name for name, _ in expected)
            assert told["probabilities"] == "|".join(value for _, value in expected)


def test_the_calibration_is_used_unless_it_is_left_out(images, model, tmp_path):
    calibration = Calibration(temperature=2.0, abstain_below=0.9, set_quantile=0.8)
    calibrated = model_folder(tmp_path / "m", calibration=calibration)
    rows = predicted(calibrated, images / "red", out=tmp_path / "c.csv")
    raw = predicted(calibrated, images / "red", "--raw", out=tmp_path / "r.csv")
    assert raw == predicted(model, images / "red", out=tmp_path / "p.csv")
    assert all(
        float(one["probability"]) <= float(two["probability"])
        for one, two in zip(rows, raw, strict=True)
    )
    assert {row["abstained"] for row in rows} == {"true", "false"}
    for row in rows:
        assert (row["abstained"] == "true") == (float(row["probability"]) < 0.9)
        assert row["label"] in row["set"].split("|")


def test_mirror_images_are_averaged(images, tmp_path):
    model = model_folder(tmp_path / "m", image_size=18)  # of which as much is cut off on each side
    file = images / "red" / "000.png"
    with Image.open(file) as image:
        ImageOps.mirror(image).save(tmp_path / "mirrored.png")
    rows = [
        {row["label"]: float(row["probability"]), row["label_2"]: float(row["probability_2"])}
        for words in ([file], [tmp_path / "mirrored.png"], [file, "--tta", "hflip"])
        for row in predicted(model, *words, "--top", 2, out=tmp_path / "o.csv")
    ]
    plain, mirrored, mean = rows
    common = plain.keys() & mirrored.keys() & mean.keys()
    assert common
    for label in common:
        assert mean[label] == pytest.approx((plain[label] + mirrored[label]) / 2, abs=2e-6)


def test_without_a_file_the_rows_are_printed(model, images, mixed, capsys):
    assert main(["predict", str(model), str(images / "red" / "000.png")]) == 0
    assert capsys.readouterr().out.startswith(f"{images}/red/000.png  ")
    assert main(["predict", str(model), str(mixed), "--json", "--allow-errors", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["input"].rpartition("/")[2] for line in lines] == [
        "=1+1.png",
        "cut.png",
        "red.png",
        "text.jpg",
    ]
    assert main(["predict", str(model), str(mixed)]) == 3
    assert "text.jpg  not predicted: it is not a JPEG, PNG or WebP\n" in capsys.readouterr().out


def test_what_was_done_is_told_as_json(model, mixed, tmp_path, capsys):
    predicted(model, mixed, "--json", "--allow-errors", 2, out=tmp_path / "o.csv")
    assert json.loads(capsys.readouterr().out) == {
        "out": f"{tmp_path}/o.csv",
        "inputs": 4,
        "failed": 2,
    }


def test_a_reader_that_goes_is_told_in_a_line(model, images, monkeypatch, capsys):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["predict", str(model), str(images)]) == 1
    assert capsys.readouterr().err == "rtl-dist: the results cannot be printed: Broken pipe\n"


# --- what is refused ------------------------------------------------------------------------------


def test_a_file_of_others_is_not_replaced(model, images, tmp_path, capsys):
    for name, content in {"o.csv": "a,b\n", "o.jsonl": "{}\n", "o.parquet": "PAR1"}.items():
        out = tmp_path / name
        out.write_text(content)
        predicted(model, images, out=out, code=2)
        assert f"--out: {out} is there and was not written by predict" in capsys.readouterr().err
        assert out.read_text() == content
        assert not (tmp_path / f"{name}.part").exists()
    first = predicted(model, images, "--overwrite", out=tmp_path / "o.csv")
    assert predicted(model, images, out=tmp_path / "o.csv") == first  # it is ours now


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["{model}", "{images}", "--out", "o.txt"], 2, "--out: o.txt must end in .csv, .jsonl or"),
        (["{model}", "{images}", "--out", "/dev/null/o.csv"], 2, "--out: cannot write into /dev/null"),
        (["{model}", "{images}", "--top", "4"], 2, "--top: 4 classes are more than the 3 of "),
        (["{model}", "{images}", "--top", "0"], 2, "--top: 0 classes cannot be told; give 1 or"),
        (["{model}", "{images}", "--threshold", "0.5"], 2, "--threshold is for models of several"),
        (["{model}", "{images}", "--threshold", "2"], 2, "--threshold: 2.0 is no probability"),
        (["{model}", "{images}", "--workers", "-1"], 2, "--workers is -1: give 0 processes or more"),
        (["{model}", "{images}", "--file-column", "x"], 2, "--file-column was given, but no INPUT"),
        (["{images}", "{images}"], 2, "is not a model; give a run folder"),
        (["gone", "{images}"], 2, "gone is not a model; give a run folder"),
        (["{model}", "gone.jpg"], 2, "no such input: gone.jpg; give files, folders, patterns"),
        (["{model}", "{images}/*.tif"], 2, "*.tif fits no file: correct the pattern"),
        (["{model}", "{data}"], 2, "is a data set: say which of its splits with --split"),
        (["{model}", "{data}", "--split", "tset"], 3, "has no split 'tset'"),
        (["{model}", "-", "-"], 2, "- is given twice"),
        (["{model}", "-", "--split", "val"], 2, "with --split, INPUTs are data sets: - is none"),
        (["{model}", "https://a.b/c.jpg?token=1"], 2, "holds a password or token"),
        (["{model}", "empty"], 3, "empty holds no image: there is nothing to predict"),
        (["{model}", "texts"], 3, "texts holds no image (but texts/a.txt): there is nothing to"),
        (["{model}", "texts/a.txt"], 2, "give it on stdin, as in: predict MODEL - < texts/a.txt"),
        (["{model}", "o.csv", "--out", "o.csv"], 2, "--out: o.csv is one of the inputs, which it"),
        (["{model}", "cut.tar"], 3, "cut.tar is no tar, or its first header is damaged (byte 0)"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(
    model, images, dataset, tmp_path, monkeypatch, capsys, words, code, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a.png\n")
    (tmp_path / "o.csv").write_text("input,label\n")
    (tmp_path / "cut.tar").write_bytes(b"x" * 1024)
    before = sorted(tmp_path.rglob("*"))
    filled = [word.format(model=model, images=images, data=dataset) for word in words]
    assert main(["predict", *filled]) == code
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("rtl-dist: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_another_version_is_told_as_one(model, images, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "m")
    description = json.loads((other / "config.json").read_text())
    description["rtl_dist"]["version"] = "9.1"
    description["rtl_dist"]["model"]["attention"] = 3
    (other / "config.json").write_text(json.dumps(description))
    assert main(["predict", str(other), str(images)]) == 2
    told = capsys.readouterr().err
    assert (
        f"{other}/config.json was written by rtl-dist 9.1 and is not understood by this one" in told
    )
    assert told.count("\n") == 1


def test_a_full_disk_costs_nothing_but_time(model, images, tmp_path, monkeypatch, capsys):
    words = (images, "--workers", 0)
    record, calls = Part.record, []

    def full(self):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.rows))
        record(self)

    monkeypatch.setattr(part, "RECORDED_EVERY_S", 0.0)
    monkeypatch.setattr(Part, "record", full)
    predicted(model, *words, out=tmp_path / "o.csv", code=1)
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(
        f"rtl-dist: cannot write {tmp_path}/o.csv.part/rows: No"
    )
    predicted(model, *words, out=tmp_path / "o.csv")
    assert "going on after " in capsys.readouterr().err
    predicted(model, *words, out=tmp_path / "w.csv")
    assert (tmp_path / "w.csv").read_bytes() == (tmp_path / "o.csv").read_bytes()


def test_parquet_without_pyarrow_names_the_cure(model, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    predicted(model, images, out=tmp_path / "o.parquet", code=2)
    assert (
        "pip install 'rtl_dist[parquet]', or choose a .csv or .jsonl file"
        in capsys.readouterr().err
    )


def test_weights_that_diverged_are_named(images, tmp_path, capsys):
    model = model_folder(tmp_path / "m", sharpness=float("nan"))
    predicted(model, images / "red" / "000.png", out=tmp_path / "o.csv", code=3)
    assert (
        "000.png has no finite probabilities: the model's weights diverged"
        in capsys.readouterr().err
    )


# --- data sets elsewhere, and damaged ones --------------------------------------------------------


def test_a_remote_split_is_fetched(model, dataset, evaluated, tmp_path):
    with serving(dataset) as server:
        words = (server.url, "--split", "val", "--cache-dir", tmp_path / "cache", "--workers", 0)
        rows = predicted(model, *words, out=tmp_path / "o.csv")
    assert [row["input"] for row in rows] == [row["key"] for row in evaluated]
    assert said(rows) == [(row["predicted"], row["confidence"]) for row in evaluated]


def test_a_damaged_sample_is_a_row_and_the_others_are_as_they_were(
    model, dataset, evaluated, tmp_path
):
    data = shutil.copytree(dataset, tmp_path / "packed")
    damage(data, "val", 70)
    words = (data, "--split", "val", "--workers", 0)
    rows = predicted(model, *words, "--allow-errors", 1, out=tmp_path / "o.csv")
    assert rows[70]["input"] == evaluated[70]["key"]
    assert rows[70]["error"].startswith("fails its checksum: the shard was altered or damaged")
    as_evaluated = [(row["predicted"], row["confidence"]) for row in evaluated]
    assert said(rows[:70] + rows[71:]) == as_evaluated[:70] + as_evaluated[71:]
    next(data.glob("val/*.tar")).unlink()  # a whole shard is no matter of a row
    predicted(model, *words, "--allow-errors", 150, out=tmp_path / "o.csv", code=3)
