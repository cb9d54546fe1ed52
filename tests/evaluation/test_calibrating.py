"""What is fitted on a split's scores keeps its word on others, and on small splits promises less."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from rtl_dist.config import CalibrateConfig
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.evaluation.calibrating import (
    conformal_quantile,
    fit_calibration,
    fit_temperature,
    lowest_threshold,
    nonconformity,
    threshold_of_best_f1,
)
from rtl_dist.evaluation.metrics import compute_metrics
from rtl_dist.evaluation.predictions import Predictions

WANTED = CalibrateConfig()


def drawn(num_samples, temperature, *, num_classes=6, seed=0, spread=2.0):
    """Logits, and labels drawn by the probabilities that they have at that temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_samples, num_classes)) * spread
    chances = softmax(logits / temperature, axis=1)
    labels = (chances.cumsum(axis=1) < rng.random((num_samples, 1))).sum(axis=1)
    return logits.astype(np.float32), labels.astype(np.int64)


def drawn_labels(num_samples, temperature, *, num_classes=4, seed=0, shift=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_samples, num_classes)) * 2 - shift
    chances = 1 / (1 + np.exp(-logits / temperature))
    labels = (rng.random(logits.shape) < chances).astype(np.uint8)
    return logits.astype(np.float32), labels


def read_by(calibration, logits, labels, task):
    scores = calibration.probabilities(torch.from_numpy(logits), task).numpy()
    raw = Predictions(
        task=task,
        classes=tuple(map(str, range(logits.shape[1]))),
        labels=labels,
        scores=type(calibration)().probabilities(torch.from_numpy(logits), task).numpy(),
    )
    return Predictions(
        task=task,
        classes=raw.classes,
        labels=labels,
        scores=scores,
        calibration=calibration,
        uncalibrated=raw,
    )


@pytest.mark.parametrize(("task", "draw"), [(SINGLE_LABEL, drawn), (MULTI_LABEL, drawn_labels)])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_by_is_found(task, draw, temperature):
    logits, labels = draw(4000, temperature)
    assert fit_temperature(logits, labels, task) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_on_other_images_probabilities_come_true_and_no_top_1_changes(temperature):
    calibration = fit_calibration(*drawn(1000, temperature), SINGLE_LABEL, WANTED)
    figures = compute_metrics(read_by(calibration, *drawn(4000, temperature, seed=1), SINGLE_LABEL))
    assert figures["ece"] < 0.03 < 0.1 < figures["ece_raw"]
    assert figures["loss"] < figures["loss_raw"]
    assert not {"top1_raw", "top5_raw"} & figures.keys()


@pytest.mark.parametrize("num_samples", [20, 270])
def test_a_split_on_which_all_is_right_makes_no_model_certain(num_samples):
    logits, labels = drawn(num_samples, 1.0)
    logits[np.arange(num_samples), labels] += 40
    calibration = fit_calibration(logits, labels, SINGLE_LABEL, WANTED)
    confidence = calibration.probabilities(torch.from_numpy(logits), SINGLE_LABEL).amax(1)
    # as if one more had been seen, and had gone wrong
    assert float(confidence.mean()) == pytest.approx(1 - 1 / (num_samples + 2), abs=0.02)
    assert confidence.mean() < 1 - 0.5 / num_samples


def test_a_split_on_which_all_is_wrong_leaves_no_class_out():
    logits, _ = drawn(50, 0.1)
    calibration = fit_calibration(logits, logits.argmin(axis=1), SINGLE_LABEL, WANTED)
    assert calibration.temperature == pytest.approx(20, rel=1e-3)
    assert calibration.abstain_below is None
    assert calibration.precision_target is None


def test_a_class_that_never_occurs_changes_nothing_for_the_others():
    logits, labels = drawn(2000, 0.5)
    none = np.full((2000, 1), -30, dtype=np.float32)
    more = np.concatenate([logits, none], axis=1)
    found = [fit_temperature(each, labels, SINGLE_LABEL) for each in (logits, more)]
    assert found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_sets_hold_the_truth_as_often_as_stated_on_other_images(coverage):
    wanted = CalibrateConfig(coverage=coverage)
    for task, draw in ((SINGLE_LABEL, drawn), (MULTI_LABEL, drawn_labels)):
        reached = []
        for seed in range(0, 24, 2):
            calibration = fit_calibration(*draw(200, 0.7, seed=seed), task, wanted)
            told = read_by(calibration, *draw(500, 0.7, seed=seed + 1), task)
            figures = compute_metrics(told)
            reached.append(figures["set_coverage"])
            members = calibration.sets_of(told.scores)
            assert figures["set_size"] == pytest.approx(members.sum(axis=1).mean())
        share_right = figures.get("top1", 0)
        assert np.mean(reached) >= coverage - 0.015
        assert np.mean(reached) <= max(coverage, share_right) + 0.03


def test_the_quantile_is_of_one_image_more_than_there_are():
    scores = np.arange(1, 10) / 10
    assert conformal_quantile(scores, 0.9) == 0.9  # the 9th of 9 + 1
    assert conformal_quantile(scores, 0.8) == 0.8
    assert conformal_quantile(scores, 0.91) is None
    assert conformal_quantile(scores[:8], 0.9) is None


def test_how_unlikely_the_truth_seemed():
    rows = np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=np.float32)
    single = nonconformity(rows, np.array([0, 1]), SINGLE_LABEL)
    assert single.tolist() == pytest.approx([0.0, 0.8])
    multi = np.array([[1, 1, 0], [0, 0, 0]], dtype=np.uint8)
    assert nonconformity(rows, multi, MULTI_LABEL).tolist() == pytest.approx([0.7, 0.0])


def test_answers_above_the_threshold_are_right_as_often_as_stated_on_other_images():
    wanted, reached, answered = CalibrateConfig(precision_target=0.9), [], []
    for seed in range(0, 40, 2):
        calibration = fit_calibration(*drawn(300, 0.7, seed=seed), SINGLE_LABEL, wanted)
        figures = compute_metrics(
            read_by(calibration, *drawn(500, 0.7, seed=seed + 1), SINGLE_LABEL)
        )
        reached.append(figures["answered_top1"])
        answered.append(figures["answered"])
    assert figures["top1"] < 0.85
    assert 0.88 < np.mean(reached) < 0.94
    assert 0.4 < np.mean(answered) < 0.95


def test_the_lowest_threshold_counts_one_more_that_is_wrong():
    scores = np.linspace(0.99, 0.5, 30).astype(np.float32)
    right = np.ones(30, dtype=bool)
    assert lowest_threshold(scores, right, 0.95) == scores[-1]
    assert lowest_threshold(scores[:18], right[:18], 0.95) is None  # (0 + 1) / (18 + 1) > 0.05
    assert lowest_threshold(scores[:19], right[:19], 0.95) == scores[18]
    right[[20, 25]] = False
    assert lowest_threshold(scores, right, 0.95) == scores[19]
    tied = np.where(scores > 0.6, np.float32(0.7), scores)  # cannot be told apart
    assert lowest_threshold(tied, right, 0.95) is None


def test_f1_is_best_at_the_threshold():
    logits, labels = drawn_labels(400, 0.5)
    scores, present = 1 / (1 + np.exp(-logits[:, 0])), labels[:, 0] == 1

    def f1(threshold):
        said = scores >= threshold
        return 2 * (said & present).sum() / (said.sum() + present.sum())

    best = threshold_of_best_f1(scores, present)
    assert f1(best) == max(map(f1, scores))


def test_labels_get_thresholds_where_there_are_enough_of_them():
    logits, labels = drawn_labels(300, 0.7)
    labels[:, 1] = 0  # absent
    labels[:, 2] = 1  # always there
    for wanted, unknown in ((WANTED, 0.5), (CalibrateConfig(precision_target=0.8), 1.0)):
        found = fit_calibration(logits, labels, MULTI_LABEL, wanted)
        assert found.abstain_below is None
        assert found.thresholds[1] == unknown
        assert len({*found.thresholds, 0.5, 1.0}) >= 4
        figures = compute_metrics(read_by(found, logits, labels, MULTI_LABEL))
        assert figures["macro_f1_raw"] != figures["macro_f1"]
    said = found.said(found.probabilities(torch.from_numpy(logits), MULTI_LABEL).numpy())
    for number in (0, 3):
        assert labels[said[:, number], number].mean() >= 0.8
