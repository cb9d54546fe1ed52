"""A solved head: scikit-learn's solution, the choice of its penalty, and who is held out for it."""

import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rtl_dist.config import OptimConfig
from rtl_dist.core.errors import StopRequested
from rtl_dist.optim import solved_head
from rtl_dist.optim.head_problem import head_problem
from rtl_dist.optim.principal_axes import principal_axes
from rtl_dist.optim.solved_head import (
    PENALTIES,
    UNCHOSEN,
    assign_folds,
    choose_penalty,
    few_threads,
    solve,
)


def problem_of(features, labels, **optim):
    several = labels.ndim == 2
    return head_problem(
        features,
        labels,
        OptimConfig(**{"label_smoothing": 0.0} | optim),
        multi_label=several,
        class_counts=tuple((labels.sum(0) if several else labels.bincount()).tolist()),
        is_balanced=False,
    )


def drawn(count, num_features, num_classes, *, signal=1.0, seed=0):
    """Features with ``signal`` times unit spread between classes, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, num_features, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % num_classes
    noise = torch.randn(count, num_features, generator=generator, dtype=torch.float64)
    return signal * centres[labels] + noise, labels


def largest_gradient(problem, solution, penalty):
    return float(problem.value_and_gradient(solution, penalty)[1].abs().max())


@pytest.mark.parametrize(("num_classes", "penalty"), [(2, 0.1), (4, 1e-3), (4, 1.0)])
def test_it_is_scikit_learn_s_solution(num_classes, penalty):
    features, labels = drawn(90, 6, num_classes)
    found = solve(problem_of(features, labels), penalty)
    # two classes: one vector w of scikit-learn's stands for w/2 and -w/2, of half the square
    weight = penalty * (0.5 if num_classes == 2 else 1)
    model = LogisticRegression(C=1 / (90 * weight), tol=1e-10, max_iter=10000)
    model.fit(features.numpy(), labels.numpy())
    theirs = model.decision_function(features.numpy())
    ours = (features @ found[:, :-1].T + found[:, -1]).numpy()
    if num_classes == 2:
        ours = ours[:, 1] - ours[:, 0]
    else:
        ours, theirs = (scores - scores.mean(1, keepdims=True) for scores in (ours, theirs))
        np.testing.assert_allclose(found[:, :-1], model.coef_, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_classes_judged_one_by_one_are_as_many_regressions():
    features, labels = drawn(80, 5, 3)
    several = torch.stack([labels == 0, labels != 1, features[:, 0] > 0], 1).to(torch.uint8)
    found = solve(problem_of(features, several, loss="bce"), 0.05)
    for number in range(3):
        model = LogisticRegression(C=1 / (80 * 0.05), tol=1e-10, max_iter=10000)
        model.fit(features.numpy(), several[:, number].numpy())
        np.testing.assert_allclose(found[number, :-1], model.coef_[0], rtol=0, atol=1e-5)
        assert float(found[number, -1]) == pytest.approx(model.intercept_[0], abs=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_it_does_not_depend_on_where_it_began(penalty):
    features, labels = drawn(90, 6, 4)
    problem = problem_of(features, labels)
    start = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, other = solve(problem, penalty), solve(problem, penalty, start=start)
    assert largest_gradient(problem, one, penalty) < 1e-7
    torch.testing.assert_close(one[:, :-1], other[:, :-1], rtol=0, atol=1e-5)
    # what is added to all biases alike changes nothing
    biases = [solution[:, -1] - solution[:, -1].mean() for solution in (one, other)]
    torch.testing.assert_close(*biases, rtol=0, atol=1e-5)


def test_axes_change_nothing_but_the_way():
    """The solution along principal axes, turned back, is that of the centred features."""
    features, labels = drawn(90, 6, 3)
    features = features * torch.tensor([5.0, 1, 1, 1, 0.1, 0.01]) + 3
    axes = principal_axes(features)
    centred = (features - axes.mean) / axes.scale
    plain = solve(problem_of(centred, labels), 0.01)
    weight, bias = axes.back(solve(problem_of(axes.of(features), labels), 0.01))
    found = features @ weight.T + bias
    torch.testing.assert_close(found, centred @ plain[:, :-1].T + plain[:, -1], rtol=0, atol=1e-5)


# --- the penalty ---


def chosen(features, labels, **optim):
    problem = problem_of(features, labels, **optim)
    return choose_penalty(problem.to(torch.float32), assign_folds(labels, seed=3))


def test_noise_is_given_a_strong_penalty_and_what_separates_a_weak_one():
    noise, labels = drawn(200, 20, 4, signal=0.0)
    assert chosen(noise, labels) >= PENALTIES[1]
    separable, labels = drawn(200, 20, 4, signal=5.0)
    assert chosen(separable, labels) <= 1e-3


def test_so_it_is_with_several_labels():
    noise, _ = drawn(200, 20, 4, signal=0.0)
    several = (torch.rand(200, 4, generator=torch.Generator().manual_seed(1)) < 0.3).long()
    assert chosen(noise, several) >= PENALTIES[1]
    assert chosen(torch.cat([noise, 9.0 * several], 1), several) <= 1e-3


def test_the_choice_is_that_of_a_search_by_hand():
    features, labels = drawn(60, 12, 3, signal=0.5)
    folds, problem = assign_folds(labels, seed=3), problem_of(features, labels)
    losses = []
    for penalty in PENALTIES:
        total = 0.0
        for fold in range(5):
            model = LogisticRegression(C=1 / (float((folds != fold).sum()) * penalty), tol=1e-9)
            model.set_params(max_iter=10000).fit(features[folds != fold], labels[folds != fold])
            said = model.predict_log_proba(features[folds == fold])
            total -= said[range(len(said)), labels[folds == fold]].sum()
        losses.append(total)
    best = PENALTIES[int(np.argmin(losses))]
    assert PENALTIES[0] > best > PENALTIES[-1]
    assert choose_penalty(problem.to(torch.float32), folds) == best


def test_a_large_problem_is_judged_by_one_fold(monkeypatch):
    features, labels = drawn(60, 5, 3)
    solved = []
    monkeypatch.setattr(
        solved_head, "solve", lambda *a, _solve=solve, **k: solved.append(1) or _solve(*a, **k)
    )
    chosen(features, labels)
    assert len(solved) % 5 == 0
    whole = len(solved)
    monkeypatch.setattr(solved_head, "LARGE", 1)
    chosen(features, labels)
    assert len(solved) - whole < whole


# --- who is held out ---


def test_each_part_has_its_share_of_each_class():
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 25, 10]))
    labels = labels[torch.randperm(135, generator=torch.Generator().manual_seed(0))]
    folds = assign_folds(labels, seed=1)
    for label, count in enumerate((100, 25, 10)):
        assert folds[labels == label].bincount().tolist() == [count // 5] * 5
    assert torch.equal(folds, assign_folds(labels, seed=1))
    assert not torch.equal(folds, assign_folds(labels, seed=2))


def test_a_class_that_is_held_out_is_always_learned_from_too():
    labels = torch.arange(40).repeat_interleave(torch.arange(40) % 4 + 1)
    folds, counts = assign_folds(labels, seed=1), labels.bincount()
    assert torch.equal(folds == -1, counts[labels] == 1)
    for fold in range(5):
        assert set(labels[folds == fold].tolist()) <= set(labels[folds != fold].tolist())


def test_several_labels_are_shared_out_as_they_come():
    folds = assign_folds(torch.zeros(23, 4, dtype=torch.uint8), seed=1)
    assert sorted(folds.bincount().tolist()) == [4, 4, 5, 5, 5]
    assert folds.tolist() != sorted(folds.tolist())


# --- hard cases ---


@pytest.mark.parametrize("several", [False, True])
def test_one_image_a_class_is_solved_unchosen(several):
    features, labels = drawn(3, 8, 3)
    if several:
        features, labels = features[:1], torch.ones(1, 2, dtype=torch.uint8)
    problem, folds = problem_of(features, labels), assign_folds(labels, seed=1)
    assert set(folds.tolist()) == {-1}
    assert choose_penalty(problem, folds) == UNCHOSEN
    found = solve(problem, UNCHOSEN)
    assert torch.isfinite(found).all()
    if not several:
        assert (features @ found[:, :-1].T + found[:, -1]).argmax(1).tolist() == [0, 1, 2]


def test_a_thousand_classes_of_one_image_take_seconds():
    features, labels = drawn(1000, 32, 1000)
    began = time.perf_counter()
    problem = problem_of(features, labels)
    found = solve(problem, choose_penalty(problem, assign_folds(labels, seed=1)))
    assert time.perf_counter() - began < 20
    assert largest_gradient(problem, found, UNCHOSEN) < 1e-6


def test_features_that_do_not_change_leave_the_shares_of_the_classes():
    labels = torch.tensor([0] * 30 + [1] * 10)
    features = torch.full((40, 3), 0.7)
    axes = principal_axes(features)
    problem = problem_of(axes.of(features), labels)
    penalty = choose_penalty(problem.to(torch.float32), assign_folds(labels, seed=1))
    weight, bias = axes.back(solve(problem, penalty))
    said = (features.double() @ weight.T + bias).softmax(1)
    torch.testing.assert_close(said, torch.tensor([[0.75, 0.25]]).double().expand(40, 2))


def test_one_constant_feature_is_not_used():
    features, labels = drawn(60, 4, 3)
    features[:, 1] = 2.5
    axes = principal_axes(features)
    weight, _ = axes.back(solve(problem_of(axes.of(features), labels), 0.01))
    torch.testing.assert_close(weight[:, 1], torch.zeros(3).double(), rtol=0, atol=1e-9)


def test_more_features_than_images():
    features, labels = drawn(20, 100, 2)
    problem = problem_of(principal_axes(features).of(features), labels)
    penalty = choose_penalty(problem.to(torch.float32), assign_folds(labels, seed=1))
    found = solve(problem, penalty)
    assert largest_gradient(problem, found, penalty) < 1e-6


def test_it_can_be_given_up():
    features, labels = drawn(20, 4, 2)
    problem, asked = problem_of(features, labels), []

    def give_up() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(StopRequested, match="stopped while solving the head"):
        solve(problem, 0.1, give_up=give_up)
    assert len(asked) == 3
    with pytest.raises(StopRequested):
        choose_penalty(problem, assign_folds(labels, seed=0), give_up=lambda: True)


def test_a_small_problem_is_computed_by_one_thread(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with few_threads(1000):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(solved_head, "SMALL", 1)
        with few_threads(1000):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
