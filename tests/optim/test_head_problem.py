"""The problem of a solved head is the training loss of all samples at once."""

import math

import pytest
import torch

from rtl_dist.config import OptimConfig
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.optim import head_problem as room
from rtl_dist.optim.head_problem import head_problem
from rtl_dist.optim.losses import make_loss

COUNTS = (20, 6, 4, 1)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(COUNTS), 5, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels():
    return torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))


@pytest.fixture
def several(features):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(len(features), len(COUNTS), generator=generator) < 0.4).to(torch.uint8)


@pytest.fixture
def solution():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(COUNTS), 6, generator=generator, dtype=torch.float64)


def problem_of(features, labels, *, is_balanced=False, **optim):
    return head_problem(
        features,
        labels,
        OptimConfig(**optim),
        multi_label=labels.ndim == 2,
        class_counts=COUNTS,
        is_balanced=is_balanced,
    )


def wanted(features, labels, solution, penalty, *, weights=None, **optim):
    """Value and gradient by autograd of the loss that steps are taken by; ``weights``: (n,)."""
    task = MULTI_LABEL if labels.ndim == 2 else SINGLE_LABEL
    loss = make_loss(
        OptimConfig(**optim), task=task, class_counts=COUNTS, device=torch.device("cpu")
    )
    solution = solution.clone().requires_grad_()
    losses = loss(features @ solution[:, :-1].T + solution[:, -1], labels)
    if task == MULTI_LABEL or optim.get("loss") == "bce":
        losses = losses * len(COUNTS)  # each class is a problem of its own
    weights = torch.ones(len(losses)) if weights is None else weights
    value = (losses * weights).mean() + penalty / 2 * solution[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(value, solution)
    return float(value.detach()), gradient


SINGLE = [
    {"loss": "cross_entropy"},
    {"loss": "cross_entropy", "class_weights": "balanced"},
    {"loss": "cross_entropy", "logit_adjustment": 1.5},
    {"loss": "bce"},
    {"loss": "bce", "class_weights": "balanced"},
]


def require_equal(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("kind", SINGLE, ids=str)
def test_it_is_the_loss_that_steps_would_be_taken_by(features, labels, solution, kind, smoothing):
    kind = kind | {"label_smoothing": smoothing}
    found = problem_of(features, labels, **kind).value_and_gradient(solution, 0.3)
    require_equal(found, wanted(features, labels, solution, 0.3, **kind))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_with_several_labels_too(features, several, solution, weights, smoothing):
    kind = {"class_weights": weights, "label_smoothing": smoothing}
    found = problem_of(features, several, **kind).value_and_gradient(solution, 0.3)
    require_equal(found, wanted(features, several, solution, 0.3, **kind))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_balanced_sampling_is_a_weight_of_each_sample(features, labels, solution, loss):
    """What a stream shows equally often of each class, the problem weighs so."""
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    share = len(labels) / len(COUNTS) / counts[labels]
    found = problem_of(features, labels, loss=loss, is_balanced=True)
    expected = wanted(features, labels, solution, 0.3, weights=share, loss=loss)
    require_equal(found.value_and_gradient(solution, 0.3), expected)

    shown = torch.cat([torch.full((60,), label) for label in range(len(COUNTS))])
    rows = torch.cat([(labels == label).nonzero().ravel() for label in range(len(COUNTS))])
    rows = torch.cat([rows[labels[rows] == c].repeat(60 // n) for c, n in enumerate(COUNTS)])
    require_equal(expected, wanted(features[rows], shown, solution, 0.3, loss=loss))


def test_without_a_choice_of_loss_several_labels_are_judged_one_by_one(features, several, solution):
    kinds = [problem_of(features, several), problem_of(features, several, loss="bce")]
    assert not any(problem.one_label for problem in kinds)
    values = [problem.value_and_gradient(solution, 0.1)[0] for problem in kinds]
    assert values[0] == values[1]


@pytest.mark.parametrize("kind", [SINGLE[1], SINGLE[4]], ids=str)
def test_rows_computed_in_pieces_make_the_same_sums(features, labels, solution, monkeypatch, kind):
    problem = problem_of(features, labels, **kind)
    whole, judged = problem.value_and_gradient(solution, 0.3), problem.true_loss(solution)
    monkeypatch.setattr(room, "CHUNK", 7)
    require_equal(problem.value_and_gradient(solution, 0.3), whole)
    assert problem.true_loss(solution) == pytest.approx(judged, rel=1e-12)


def test_rows_are_judged_by_their_true_labels(features, labels, solution):
    problem = problem_of(features, labels, label_smoothing=0.3, class_weights="balanced")
    chosen = labels != 0
    expected, _ = wanted(
        features[chosen], labels[chosen], solution, 0, label_smoothing=0, class_weights="balanced"
    )
    assert problem.rows(chosen).true_loss(solution) == pytest.approx(expected, rel=1e-12)


def test_a_class_without_samples_is_no_division_by_zero(features):
    labels = torch.zeros(len(features), dtype=torch.int64)
    problem = head_problem(
        features,
        labels,
        OptimConfig(class_weights="balanced"),
        multi_label=False,
        class_counts=(len(features), 0),
        is_balanced=False,
    )
    value, gradient = problem.value_and_gradient(torch.zeros(2, 6, dtype=torch.float64), 0.1)
    assert torch.isfinite(gradient).all()
    assert value == pytest.approx(math.log(2) * 32 / (2 * 31), rel=1e-12)  # counted as one
