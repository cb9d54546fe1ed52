"""What ``benchmarks/accuracy.py`` compares by: sets, scores, figures, and cells that it resumes."""

import importlib
import itertools
import json
import re
import runpy
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from pack_images import REAL_DATA, image_bytes
from sklearn.metrics import average_precision_score
from tiny_runs import CLASSES, ROOT, write_images
from torchvision.models import resnet18

BENCHMARKS = ROOT / "benchmarks"
TINY = ROOT / "rtl_dist/assets/tiny_resnet_cifar10"
OF_OTHERS = {"fastai_loop.py": "fastai", "lightning_loop.py": "lightning"}


@pytest.fixture
def module(monkeypatch):
    """A file of the folder by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a file of the folder; returns what it printed."""

    def run_file(name: str, *arguments: object) -> str:
        monkeypatch.syspath_prepend(BENCHMARKS)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out

    return run_file


def like_a_prepared_set(folder: Path, counts: dict[str, int]) -> Path:
    """Pictures of one colour a class, of which a stem stands for one."""
    for path in write_images(folder, counts).glob("*/*/*"):
        path.rename(path.with_stem(path.parent.name + path.stem))
    return folder


def test_cells_are_run_once_and_tabled(tmp_path, run):
    arguments = ("--out", tmp_path, "--sets", "digits", "--seeds", "3", "--epochs", "1")
    arguments += ("--methods", "logreg", "ours-head", "tutorial")
    first = run("accuracy.py", *arguments)
    assert "digits tutorial: only for photographs of one label, left out" in first
    cells = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert cells.keys() == {"digits.logreg.3.json", "digits.ours-head.3.json"}
    for cell in cells.values():
        assert cell["figures"]["all"]["num_images"] == 270
        assert cell["figures"]["all"]["value"] == max(e["value"] for e in cell["evaluations"])
        assert cell["figures"]["all"]["value"] > 0.92
        assert 0 < cell["evaluations"][0]["cpu_s"] <= cell["cpu_s"]
    assert cells["digits.logreg.3.json"]["num_images"] == 1258 + 270
    of_test = 269
    assert cells["digits.ours-head.3.json"]["num_images"] == 1258 + 270 + of_test
    (tmp_path / "digits.ours-head.3.npz").unlink()
    again = run("accuracy.py", *arguments)
    assert not (tmp_path / "digits.ours-head.3.npz").exists(), "the cell was run again"
    place = r"(\*\*first\*\*|behind: -0\.\d+ ± 0\.000 of logreg)"
    assert re.search(rf"^\| digits \| ours-head \| 1 \|.*\| {place} \|$", again, re.MULTILINE)
    with pytest.raises(SystemExit, match="take another --out"):
        run("accuracy.py", *arguments[:-5], "2", *arguments[-4:])


@pytest.mark.parametrize(
    "name", ["logistic_regression.py", "practitioner_loop.py", "tutorial_loop.py", *OF_OTHERS]
)
def test_a_loop_says_something_of_every_image(tmp_path, run, module, name):
    if name in OF_OTHERS:
        pytest.importorskip(OF_OTHERS[name])
    of_tiny = name in ("logistic_regression.py", "practitioner_loop.py")
    folder, weights = like_a_prepared_set(tmp_path / "images", {"train": 32, "val": 20}), TINY
    if not of_tiny:
        torch.save(resnet18().state_dict(), weights := tmp_path / "resnet18.pth")
    epochs = () if name == "logistic_regression.py" else ("--epochs", "2")
    out = run(
        name,
        *("--data", folder, "--weights", weights, "--image-size", "32", *epochs),
        *("--scores", tmp_path / "scores"),
    )
    told, scores = json.loads(out), module("scores").read_scores(tmp_path / "scores")
    assert scores.keys() == {path.stem for path in folder.glob("val/*/*")}
    assert all(np.isclose(of.sum(), 1, atol=1e-3) for of in scores.values())
    labels = {path.stem: CLASSES.index(path.parent.name) for path in folder.glob("val/*/*")}
    top1 = np.mean([scores[stem].argmax() == label for stem, label in labels.items()])
    assert top1 == pytest.approx(told["best"] if of_tiny else told["best_val_top1"])


def test_the_practitioner_keeps_his_best_evaluation(tmp_path, run, module, monkeypatch):
    figures, said = iter((0.5, 0.9, 0.7)), []

    def metric(scores, targets):
        said.append(scores)
        return next(figures)

    monkeypatch.setattr(module("loop_data"), "metric", metric)
    folder = like_a_prepared_set(tmp_path / "images", {"train": 8, "val": 2})
    out = run(
        "practitioner_loop.py",
        *("--data", folder, "--weights", TINY, "--image-size", "32", "--epochs", "3"),
        *("--scores", tmp_path / "scores"),
    )
    assert json.loads(out)["best"] == 0.9
    kept = list(module("scores").read_scores(tmp_path / "scores").values())
    assert np.array_equal(kept, said[1])
    assert not np.array_equal(said[1], said[2])


@pytest.mark.parametrize("name", ["logistic_regression.py", "practitioner_loop.py"])
def test_several_labels_of_an_image(tmp_path, run, module, name):
    for split in ("train", "val"):
        rows = ["file,sea,sun"]
        for number in range(20):
            (tmp_path / f"{split}{number}.png").write_bytes(image_bytes(number, kind="PNG"))
            rows.append(f"{split}{number}.png,{number % 2},{int(number % 3 > 0)}")
        (tmp_path / f"{split}.csv").write_text("\n".join(rows))
    epochs = () if name == "logistic_regression.py" else ("--epochs", "1")
    out = run(
        name,
        *("--data", tmp_path, "--weights", TINY, "--image-size", "32", *epochs),
        *("--scores", tmp_path / "scores"),
    )
    scores = module("scores").read_scores(tmp_path / "scores")
    truth = [[n % 2, int(n % 3 > 0)] for n in range(20)]
    found = average_precision_score(truth, [scores[f"val{n}"] for n in range(20)], average="macro")
    assert json.loads(out)["best"] == pytest.approx(found, abs=1e-6)


def test_near_copies_are_left_out_of_the_clean_figures(tmp_path, module):
    prepared = module("accuracy_sets").Prepared(
        name="x",
        folder=tmp_path,
        image_size=32,
        is_multi_label=False,
        is_tiny=False,
        classes=("a", "b"),
        num_train=1,
        labels={"p": (0,), "q": (1,), "r": (1,)},
        near_copies=frozenset({"q"}),
    )
    scores = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    module("scores").write_scores(tmp_path / "scores", ["r", "q", "p"], scores)
    found = module("accuracy_figures").figures(prepared, tmp_path / "scores")
    assert (found["all"]["value"], found["all"]["num_images"]) == (pytest.approx(2 / 3), 3)
    assert (found["clean"]["value"], found["clean"]["num_images"]) == (0.5, 2)
    module("scores").write_scores(tmp_path / "scores", ["r", "q"], scores[:2])
    with pytest.raises(ValueError, match="2 images were scored, and val has 3"):
        module("accuracy_figures").figures(prepared, tmp_path / "scores")


def test_the_place_of_ours_is_told_from_pairs(module):
    values = {"ours": (0.80, 0.90, 0.85), "logreg": (0.82, 0.89, 0.86), "ours-head": (1, 1, 1)}

    def cells(**values):
        return {
            ("digits", method, seed): {
                "figures": {"all": {"value": value, "interval": [0, 1], "macro_f1": 0}},
                **{"cpu_s": 1, "num_images": 1, "evaluations": []},
            }
            for method, of_seeds in values.items()
            for seed, value in enumerate(of_seeds)
        }

    def place(table):
        (line,) = re.findall(r"^\| digits \| ours \|.*", table, re.M)
        return line.split(" | ")[-1]

    table = module("accuracy_table").table
    assert place(table(cells(**values))).startswith("**within 1 s.e.**: -0.007 ± 0.009 of logreg")
    values["logreg"] = (0.82, 0.92, 0.87)
    assert place(table(cells(**values))).startswith("behind: -0.020 ± 0.000 of logreg")
    values["logreg"] = (0.8, 0.9, 0.85)
    assert place(table(cells(**values))).startswith("**first**")


def test_a_long_tail_is_drawn_by_the_seed(tmp_path, module):
    sources = module("accuracy_sources")
    assert [sources.long_tail(100)(place) for place in (0, 9)] == [1000, 10]
    assert [sources.long_tail(3)(place) for place in (0, 9)] == [1000, 333]
    with tarfile.open(tmp_path / "cifar10.tar.gz", "w:gz") as archive:
        for split, count in (("train", 20), ("test", 210)):
            for label, number in itertools.product("abcdefghij", range(count)):
                archive.addfile(tarfile.TarInfo(f"{split}/{label}/{number:04d}.jpg"))
    drawn = [sources.cifar10(lambda place: 2 + place)(tmp_path, seed) for seed in (0, 0, 1)]
    names = [{p.name for p in pictures if p.split == "train"} for _, pictures in drawn]
    assert names[0] == names[1] != names[2]
    for _, pictures in drawn:
        sizes = Counter(p.labels for p in pictures if p.split == "train")
        assert sorted(sizes.values()) == list(range(2, 12))
    vals = [[(p.name, p.labels) for p in pictures if p.split == "val"] for _, pictures in drawn]
    assert vals[0] == vals[2]
    assert len(set(vals[0])) == 2000


def test_the_clean_monkeys_are_221(module):
    if not (REAL_DATA / "monkey10.tar.gz").exists():
        pytest.skip("needs the shared data")
    _, pictures = module("accuracy_sources").read_monkeys(REAL_DATA, 0)
    val = [picture for picture in pictures if picture.split == "val"]
    assert (len(val), sum(picture.is_near_copy for picture in val)) == (272, 51)
    assert Path(val[0].name).parts[0] == "val"
