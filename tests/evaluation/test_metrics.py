"""Every figure of rtl_dist.evaluation.metrics against scikit-learn's own (scipy's for the interval)."""

from dataclasses import replace

import numpy as np
import pytest
import sklearn.metrics as reference
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.evaluation import metrics, predictions
from rtl_dist.evaluation.confusion import Confusion, confusion_of
from rtl_dist.evaluation.metrics import (
    average_precisions,
    compute_metrics,
    metrics_from_confusion,
    multi_label_confusion,
    multi_label_metrics,
    per_class_table,
    single_label_metrics,
    wilson_interval,
)
from rtl_dist.evaluation.predictions import Predictions
from rtl_dist.evaluation.reliability import reliability
from rtl_dist.model.calibration import Calibration


def single(num_samples=211, num_classes=7, *, absent=(), decimals=None, seed=0):
    """Random single-label predictions; rounding the scores makes ties."""
    rng = np.random.default_rng(seed)
    present = [c for c in range(num_classes) if c not in absent]
    labels = rng.choice(present, size=num_samples).astype(np.int64)
    logits = rng.normal(size=(num_samples, num_classes))
    logits[np.arange(num_samples), labels] += 1.0
    if decimals is not None:
        logits = logits.round(decimals)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(
        task=SINGLE_LABEL,
        classes=tuple(f"c{c}" for c in range(num_classes)),
        labels=labels,
        scores=scores.astype(np.float32),
    )


def multi(num_samples=211, num_classes=7, *, absent=(), decimals=None, seed=0):
    """Random multi-label predictions; the absent classes occur in neither truth nor decisions."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_samples, num_classes)) < 0.3).astype(np.uint8)
    scores = np.clip(rng.random((num_samples, num_classes)) * 0.8 + labels * 0.15, 0.001, 0.999)
    labels[:, list(absent)] = 0
    scores[:, list(absent)] *= 0.4
    if decimals is not None:
        scores = scores.round(decimals).clip(0.05, 0.95)
    return Predictions(
        task=MULTI_LABEL,
        classes=tuple(f"c{c}" for c in range(num_classes)),
        labels=labels,
        scores=scores.astype(np.float32),
    )


SHAPES = [
    {},
    {"num_samples": 97, "num_classes": 2},
    {"num_samples": 53, "num_classes": 12, "absent": (0, 5, 11)},
    {"num_samples": 301, "num_classes": 9, "decimals": 0},
    {"num_samples": 1, "num_classes": 6},
    {"num_samples": 13, "num_classes": 40, "decimals": 1},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_single_label_figures_equal_sklearns(shape):
    predictions = single(**shape)
    labels, scores = predictions.labels, predictions.scores.astype(np.float64)
    scores /= scores.sum(axis=1, keepdims=True)
    said = scores.argmax(axis=1)
    num_classes = scores.shape[1]
    figures = single_label_metrics(predictions)
    average = {"average": "macro", "zero_division": 0}
    assert figures["top1"] == pytest.approx(reference.accuracy_score(labels, said))
    assert figures["macro_f1"] == pytest.approx(reference.f1_score(labels, said, **average))
    assert figures["macro_precision"] == pytest.approx(
        reference.precision_score(labels, said, **average)
    )
    assert figures["macro_recall"] == pytest.approx(reference.recall_score(labels, said, **average))
    # balanced_accuracy_score warns about predicted classes that are not in the truth; recall over
    # the true classes is its definition.
    assert figures["balanced_accuracy"] == pytest.approx(
        reference.recall_score(labels, said, labels=np.unique(labels), average="macro")
    )
    assert figures["loss"] == pytest.approx(
        reference.log_loss(labels, scores, labels=range(num_classes)), rel=1e-5
    )
    assert compute_metrics(predictions) == figures


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.get("num_classes") != 2])
def test_top5_breaks_ties_by_the_first_class(shape):
    """scikit-learn ranks ties from the last class: mirrored, it is our order exactly."""
    predictions = single(**shape)
    num_classes = predictions.scores.shape[1]
    expected = reference.top_k_accuracy_score(
        num_classes - 1 - predictions.labels,
        predictions.scores[:, ::-1],
        k=5,
        labels=range(num_classes),
    )
    assert single_label_metrics(predictions)["top5"] == pytest.approx(expected)


def test_two_classes_are_always_within_the_top_five():
    assert single_label_metrics(single(50, 2))["top5"] == 1.0


def test_a_tie_for_first_counts_as_argmax_does():
    tied = Predictions(
        task=SINGLE_LABEL,
        classes=("a", "b"),
        labels=np.array([0, 1]),
        scores=np.full((2, 2), 0.5, dtype=np.float32),
    )
    assert single_label_metrics(tied)["top1"] == 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_confusion_and_per_class_table_equal_sklearns(shape):
    predictions = single(**shape)
    labels, said = predictions.labels, predictions.scores.argmax(axis=1)
    classes = range(len(predictions.classes))
    confusion = confusion_of(predictions)
    np.testing.assert_array_equal(
        confusion.matrix(), reference.confusion_matrix(labels, said, labels=classes)
    )
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, said, labels=classes, zero_division=0
    )
    table = per_class_table(predictions)
    assert [row.name for row in table] == list(predictions.classes)
    np.testing.assert_allclose([row.precision for row in table], precision)
    np.testing.assert_allclose([row.recall for row in table], recall)
    np.testing.assert_allclose([row.f1 for row in table], f1)
    np.testing.assert_array_equal([row.num_samples for row in table], support)
    for number, row in enumerate(table):
        if support[number]:
            assert row.average_precision == pytest.approx(
                reference.average_precision_score(labels == number, predictions.scores[:, number])
            )
        else:
            assert row.average_precision is None
    per_class = metrics_from_confusion(confusion)["per_class"]
    np.testing.assert_array_equal(
        per_class["num_predicted"], np.bincount(said, minlength=len(classes))
    )


def test_balanced_accuracy_equals_sklearns_when_all_classes_occur():
    predictions = single(500, 4)
    expected = reference.balanced_accuracy_score(predictions.labels, predictions.predicted)
    figures = metrics_from_confusion(confusion_of(predictions))
    assert figures["balanced_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_ece_equals_sklearns_calibration_curve(shape):
    predictions = single(**shape)
    right = predictions.predicted == predictions.labels
    confidence = predictions.scores.max(axis=1).astype(np.float64)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, pos_label=True)
    result = reliability(predictions)
    some = result.counts > 0
    np.testing.assert_allclose(result.accuracy[some], accuracy)
    np.testing.assert_allclose(result.confidence[some], mean)
    weights = result.counts[some] / result.counts.sum()
    assert result.ece == pytest.approx(float((weights * np.abs(accuracy - mean)).sum()))
    assert result.counts.sum() == predictions.num_samples


@pytest.mark.parametrize("shape", SHAPES)
def test_multi_label_figures_equal_sklearns(shape):
    predictions = multi(**shape)
    labels, scores = predictions.labels, predictions.scores
    said = (scores >= 0.5).astype(np.uint8)
    figures = multi_label_metrics(predictions)
    assert figures["micro_f1"] == pytest.approx(
        reference.f1_score(labels, said, average="micro", zero_division=0)
    )
    occurs = np.flatnonzero(labels.any(axis=0) | said.any(axis=0))
    assert figures["macro_f1"] == pytest.approx(
        reference.f1_score(labels[:, occurs], said[:, occurs], average="macro", zero_division=0)
    )
    assert figures["exact_match"] == pytest.approx(reference.accuracy_score(labels, said))
    have = np.flatnonzero(labels.any(axis=0))
    assert figures["map"] == pytest.approx(
        np.mean([reference.average_precision_score(labels[:, c], scores[:, c]) for c in have])
    )
    columns = [
        reference.log_loss(labels[:, c], scores[:, c].astype(np.float64), labels=[0, 1])
        for c in range(labels.shape[1])
    ]
    assert figures["loss"] == pytest.approx(np.mean(columns), rel=1e-5)
    np.testing.assert_array_equal(
        multi_label_confusion(predictions), reference.multilabel_confusion_matrix(labels, said)
    )
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, said, average=None, zero_division=0
    )
    table = per_class_table(predictions)
    np.testing.assert_allclose([row.precision for row in table], precision)
    np.testing.assert_allclose([row.recall for row in table], recall)
    np.testing.assert_allclose([row.f1 for row in table], f1)
    np.testing.assert_array_equal([row.num_samples for row in table], support)
    assert compute_metrics(predictions) == figures


def test_the_threshold_is_inclusive_and_can_be_set():
    predictions = multi(101, 3, decimals=1)
    for threshold in (0.3, 0.5, 0.8):
        said = predictions.scores >= threshold
        own = replace(predictions, calibration=Calibration(thresholds=(threshold,) * 3))
        assert multi_label_metrics(own)["micro_f1"] == pytest.approx(
            reference.f1_score(predictions.labels, said, average="micro")
        )


def test_no_positives_at_all_is_zero_and_not_nan():
    predictions = Predictions(
        task=MULTI_LABEL,
        classes=("a", "b"),
        labels=np.zeros((3, 2), dtype=np.uint8),
        scores=np.full((3, 2), 0.1, dtype=np.float32),
    )
    figures = multi_label_metrics(predictions)
    assert (figures["map"], figures["micro_f1"], figures["macro_f1"]) == (0.0, 0.0, 0.0)
    assert figures["exact_match"] == 1.0
    assert average_precisions(predictions) == [None, None]


def test_losses_stay_finite_when_probabilities_round_to_zero_and_one():
    hopeless = Predictions(
        task=SINGLE_LABEL,
        classes=("a", "b"),
        labels=np.array([0]),
        scores=np.array([[0.0, 1.0]], dtype=np.float32),
    )
    assert 80 < single_label_metrics(hopeless)["loss"] < 90
    both = Predictions(
        task=MULTI_LABEL,
        classes=("a", "b"),
        labels=np.array([[0, 1]], dtype=np.uint8),
        scores=np.array([[1.0, 1.0]], dtype=np.float32),
    )
    assert multi_label_metrics(both)["loss"] == pytest.approx(25 * np.log(2) / 2)


@pytest.mark.parametrize(
    ("hits", "total"), [(0, 1), (1, 1), (0, 37), (37, 37), (9, 37), (812, 999)]
)
def test_wilson_interval_equals_scipys(hits, total):
    expected = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(hits, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_predictions_are_checked():
    good = single(5, 3)
    nan = good.scores.copy()
    nan[2, 1] = np.nan

    def build(**changes):
        fields = {
            "task": good.task,
            "classes": good.classes,
            "labels": good.labels,
            "scores": good.scores,
        } | changes
        return Predictions(**fields)

    with pytest.raises(UserError, match="sample 2"):
        build(scores=nan)
    with pytest.raises(DataError, match="no samples"):
        build(labels=good.labels[:0], scores=good.scores[:0])
    with pytest.raises(ValueError, match="probabilities"):
        build(scores=good.scores * 9)
    with pytest.raises(ValueError, match="0 to 2"):
        build(labels=good.labels + 2)
    with pytest.raises(ValueError, match="expected int64"):
        build(labels=good.labels[:3])
    with pytest.raises(ValueError, match="float32"):
        build(scores=good.scores.astype(np.float64))
    none = np.zeros(0, dtype=np.int64)
    nothing = Confusion(num_classes=2, truth=none, predicted=none, counts=none)
    with pytest.raises(DataError, match="no sample"):
        metrics_from_confusion(nothing)


@pytest.mark.parametrize("make", [single, multi])
def test_what_a_task_is_said_to_measure_is_measured(make):
    predictions = make()
    assert set(predictions.task.metrics) <= compute_metrics(predictions).keys()


@pytest.mark.parametrize("make", [single, multi])
def test_figures_do_not_depend_on_how_many_scores_are_looked_at_together(make, monkeypatch):
    whole = make()
    expected, ece = compute_metrics(whole), reliability(whole).ece
    monkeypatch.setattr(predictions, "SCORES_AT_ONCE", 100)
    monkeypatch.setattr(metrics, "SCORES_AT_ONCE", 736)  # as large a part as numpy's sum makes
    assert compute_metrics(make()) == expected
    assert reliability(make()).ece == ece


def test_figures_need_no_scores_of_single_labels():
    whole = single(300, 12, decimals=1)
    alone = Predictions(
        task=whole.task,
        classes=whole.classes,
        labels=whole.labels,
        scores=None,
        outcomes=whole.outcomes,
    )
    assert compute_metrics(alone) == compute_metrics(whole)
    assert [row.f1 for row in per_class_table(alone)] == [row.f1 for row in per_class_table(whole)]
    assert average_precisions(alone) == [None] * 12
