"""From logits to probabilities, and to what is said of them."""

import numpy as np
import pytest
import torch

from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.model.calibration import Calibration


def logits(rows=64, classes=5, spread=4.0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(3)) * spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_none_leaves_probabilities_as_they_are(dtype):
    given = logits().to(dtype)
    assert torch.equal(Calibration().probabilities(given, SINGLE_LABEL), given.float().softmax(1))
    assert torch.equal(Calibration().probabilities(given, MULTI_LABEL), given.float().sigmoid())


def test_logits_are_divided_by_the_temperature():
    given, two = logits(), Calibration(temperature=2.0)
    torch.testing.assert_close(two.probabilities(given, SINGLE_LABEL), (given / 2).softmax(1))
    torch.testing.assert_close(two.probabilities(given, MULTI_LABEL), (given / 2).sigmoid())


@pytest.mark.parametrize("temperature", [0.01, 0.3, 7.0, 900.0])
def test_no_temperature_changes_the_top_1(temperature):
    near = 20 + torch.arange(3) * torch.finfo(torch.float32).eps * 20  # apart by the last bits
    close = torch.stack([near[list(order)] for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0))])
    close = torch.cat([torch.randn(3, 40), close], dim=1)
    for given in (logits(), close):
        plain = Calibration().probabilities(given, SINGLE_LABEL)
        scaled = Calibration(temperature=temperature).probabilities(given, SINGLE_LABEL)
        assert torch.equal(plain.argmax(1), scaled.argmax(1))
        torch.testing.assert_close(scaled, (given / temperature).softmax(1))


def test_a_conformal_set_holds_what_cannot_be_excluded():
    calibration = Calibration(set_quantile=0.75, coverage=0.9)
    rows = np.array([[0.25, 0.45, 0.3], [0.02, 0.9, 0.08], [0.2, 0.2, 0.6]], dtype=np.float32)
    assert [calibration.set_of(row).tolist() for row in rows] == [[1, 2, 0], [1], [2]]
    assert calibration.sets_of(rows).sum(axis=1).tolist() == [3, 1, 1]


def test_a_set_is_never_empty():
    unsure = np.array([0.4, 0.35, 0.25], dtype=np.float32)
    assert Calibration(set_quantile=0.01).set_of(unsure).tolist() == [0]
    assert Calibration().set_of(unsure).tolist() == [0]


def test_a_model_abstains_below_its_threshold_and_not_at_it():
    confidence = np.array([0.49, 0.5, 0.99], dtype=np.float32)
    assert Calibration(abstain_below=0.5).abstains(confidence).tolist() == [True, False, False]
    assert not Calibration().abstains(confidence).any()


def test_each_label_has_its_own_threshold():
    rows = np.array([[0.3, 0.5, 1.0], [0.2, 0.49, 0.999]], dtype=np.float32)
    said = Calibration(thresholds=(0.25, 0.5, 1.0)).said(rows)
    assert said.tolist() == [[True, True, True], [False, False, False]]
    assert Calibration().said(rows[0]).tolist() == [False, True, True]
