"""What is written of one evaluation: every file is there and holds the numbers it should."""

import csv
import json

import numpy as np
import pytest
from report_helpers import (
    assert_drawn,
    assert_no_leftovers,
    assert_self_contained,
    make_predictions,
    make_split,
)

from rtl_dist.core.errors import DataError
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL, Task
from rtl_dist.evaluation.metrics import compute_metrics, wilson_interval
from rtl_dist.evaluation.predictions import Outcomes, Predictions
from rtl_dist.evaluation.reliability import reliability
from rtl_dist.report.evaluation import PICTURES, write_evaluation
from rtl_dist.report.evaluation_plots import calibration_figure

# torchvision 0.29 announces that its decoder will move to another package.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")


def evaluate(tmp_path, predictions, **options):
    split = make_split(tmp_path / "data", predictions.num_samples)
    out = tmp_path / "out"
    metrics = compute_metrics(predictions)
    write_evaluation(predictions, out, split=split, metrics=metrics, title="A title", **options)
    return out, metrics


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_an_evaluation_is_written_whole(tmp_path):
    predictions = make_predictions(137, ("cat", "dog", "<b>$x_1$</b>", "_犬"))
    out, metrics = evaluate(tmp_path, predictions)
    summary = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    hits = int((predictions.predicted == predictions.labels).sum())
    assert summary["num_samples"] == 137
    assert summary["top1"] == metrics["top1"] == hits / 137
    assert summary["top1_interval"] == pytest.approx(wilson_interval(hits, 137))
    for name in PICTURES:
        assert_drawn(out / name)
    text = assert_self_contained(out / "report.html")
    assert f"{100 * metrics['top1']:.2f} %" in text
    assert f"{metrics['macro_f1']:.4f}" in text
    assert "&lt;b&gt;$x_1$&lt;/b&gt;" in text
    assert "<b>$x_1$" not in text
    assert text.count("data:image/png;base64,") == len(PICTURES)
    assert_no_leftovers(out)


def test_every_sample_is_in_predictions_and_the_surest_mistakes_come_first(tmp_path):
    predictions = make_predictions(90, ("a", "b", "c"), skill=0.5)
    out, _ = evaluate(tmp_path, predictions)
    rows = read_csv(out / "predictions.csv")
    assert [int(r["sample"]) for r in rows] == list(range(90))
    assert [r["key"] for r in rows] == [f"k{i:05d}" for i in range(90)]
    names = np.array(predictions.classes)
    assert [r["truth"] for r in rows] == names[predictions.labels].tolist()
    assert [r["predicted"] for r in rows] == names[predictions.predicted].tolist()
    mistakes = read_csv(out / "mistakes.csv")
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    assert {int(r["sample"]) for r in mistakes} == set(wrong.tolist())
    confidence = [float(r["confidence"]) for r in mistakes]
    assert confidence == sorted(confidence, reverse=True)
    assert confidence[0] == pytest.approx(predictions.scores[wrong].max(), abs=1e-6)
    with (out / "confusion_matrix.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0][1:] == list(predictions.classes)
    counts = np.array([row[1:] for row in table[1:]], dtype=int)
    assert counts.sum() == 90
    assert np.trace(counts) == 90 - len(wrong)
    per_class = read_csv(out / "per_class.csv")
    assert [r["name"] for r in per_class] == list(predictions.classes)
    assert sum(int(r["num_samples"]) for r in per_class) == 90


def test_multi_label_evaluation(tmp_path):
    predictions = make_predictions(60, ("sea", "sunset", "boat"), task=MULTI_LABEL)
    out, metrics = evaluate(tmp_path, predictions)
    summary = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert summary["map"] == metrics["map"]
    low, high = summary["exact_match_interval"]
    assert low <= summary["exact_match"] <= high
    rows = read_csv(out / "confusion_matrix.csv")
    assert [r["class"] for r in rows] == list(predictions.classes)
    outcomes = ("true_negative", "false_positive", "false_negative", "true_positive")
    assert all(sum(int(r[name]) for name in outcomes) == 60 for r in rows)
    truth = [r["truth"] for r in read_csv(out / "predictions.csv")]
    assert truth[7] == "|".join(
        name for name, here in zip(predictions.classes, predictions.labels[7], strict=True) if here
    )
    for name in PICTURES:
        assert_drawn(out / name)
    assert f"{metrics['map']:.4f}" in assert_self_contained(out / "report.html")


@pytest.mark.parametrize("task", list(Task))
def test_a_thousand_classes(tmp_path, task):
    classes = [f"class number {i} with a rather long name" for i in range(1000)]
    predictions = make_predictions(120, classes, task=task, skill=3.0)
    out, _ = evaluate(tmp_path, predictions)
    for name in PICTURES:
        assert_drawn(out / name)
    assert_self_contained(out / "report.html")
    assert len(read_csv(out / "per_class.csv")) == 1000


def test_no_mistakes_and_one_sample(tmp_path):
    predictions = Predictions(
        task=SINGLE_LABEL,
        classes=("a", "b"),
        labels=np.array([1]),
        scores=np.array([[0.1, 0.9]], dtype=np.float32),
    )
    split = make_split(tmp_path / "data", 1, num_shards=1)
    write_evaluation(
        predictions, tmp_path, split=split, metrics=compute_metrics(predictions), title="t"
    )
    assert read_csv(tmp_path / "mistakes.csv") == []
    assert_drawn(tmp_path / "mistakes.png")


def test_a_damaged_picture_does_not_stop_the_report(tmp_path):
    predictions = make_predictions(12, ("a", "b"), skill=-9.0)  # all wrong: every picture is shown
    split = make_split(tmp_path / "data", 12)
    split.index["crc32"][3] ^= 1
    write_evaluation(
        predictions, tmp_path, split=split, metrics=compute_metrics(predictions), title="t"
    )
    assert_drawn(tmp_path / "mistakes.png")


def test_predictions_of_another_split_are_refused(tmp_path):
    split = make_split(tmp_path / "data", 5)
    predictions = make_predictions(6, ("a", "b"))
    with pytest.raises(ValueError, match="6 predictions for 5 samples"):
        write_evaluation(predictions, tmp_path / "out", split=split, metrics={}, title="t")
    assert not (tmp_path / "out").exists()


def test_split_keys_equal_key_and_name_a_missing_shard(tmp_path):
    split = make_split(tmp_path / "data", 20)
    assert list(split.keys()) == [split.key(i) for i in range(20)]
    split.files.close()
    split.shard_path(1).unlink()
    with pytest.raises(DataError, match=r"shard-1\.tar"):
        list(split.keys())


def test_many_classes_are_listed_and_not_squared(tmp_path):
    """33,000 classes, whose matrix would take 9 GB, without the scores."""
    classes = tuple(f"class {i}" for i in range(33_000))
    labels = np.arange(50)
    said = np.where(labels % 5 == 0, labels + 30_000, labels)
    sure = np.full(50, 0.5, dtype=np.float32)
    outcomes = Outcomes(
        predicted=said,
        confidence=sure,
        truth_score=sure,
        truth_rank=0 * said,
        set_size=1 + 0 * said,
    )
    predictions = Predictions(
        task=SINGLE_LABEL, classes=classes, labels=labels, scores=None, outcomes=outcomes
    )
    out, metrics = evaluate(tmp_path, predictions)
    assert metrics["top1"] == 0.8
    cells = read_csv(out / "confusion_matrix.csv")
    assert len(cells) == 50
    assert cells[5] == {"truth": "class 5", "predicted": "class 30005", "samples": "1"}
    for name in PICTURES:
        assert_drawn(out / name)
    assert (out / "report.html").stat().st_size < 2**20


@pytest.mark.parametrize("task", list(Task))
def test_the_reliability_diagram_shows_what_was_before_calibration(task):
    after, before = (
        reliability(make_predictions(200, ("a", "b", "c"), task=task, skill=skill))
        for skill in (3.0, 0.5)
    )
    figure = calibration_figure(after, task, before=before)
    top, bottom = figure.axes
    title = f"Calibration: expected error {after.ece:.3f} ({before.ece:.3f} before)"
    assert top.get_title(loc="left") == title
    shown = {line.get_label(): line.get_xdata() for line in top.lines}
    np.testing.assert_array_equal(shown["before calibration"], before.confidence[before.counts > 0])
    assert len(bottom.lines) == 1
    alone = calibration_figure(after, task).axes[0]
    assert "before calibration" not in {line.get_label() for line in alone.lines}
