"""Training counts do not depend on how they are split."""

import itertools

import pytest
import torch

from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.optim.counts import TrainTotals, add_counts, non_finite, train_metrics

CPU = torch.device("cpu")


class Alone:
    """A runtime of one process."""

    def sum_over_ranks(self, counts):
        return counts


def test_any_split_and_order_gives_the_same_bits():
    torch.manual_seed(0)
    scores, labels = torch.randn(60, 5), torch.randint(0, 5, (60,))
    losses = torch.rand(60) * 7
    seen = set()
    for cuts in ((60,), (7, 53), (20, 20, 20), (1, 58, 1)):
        edges = [0, *itertools.accumulate(cuts)]
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        for order in itertools.permutations(parts):
            counts: list[int] = []
            for part in order:
                totals = TrainTotals(task=SINGLE_LABEL, device=CPU)
                totals.add(losses[part], scores[part], labels[part])
                totals.accept()
                counts = add_counts(counts, totals.flush(Alone().sum_over_ranks))
            seen.add(tuple(counts))
    assert len(seen) == 1
    metrics = train_metrics(list(seen.pop()), task=SINGLE_LABEL)
    assert metrics["train/loss"] == pytest.approx(losses.double().mean().item(), abs=1e-6)
    assert metrics["train/top1"] == (scores.argmax(1) == labels).double().mean().item()


def test_flush_starts_again_from_zero():
    totals = TrainTotals(task=SINGLE_LABEL, device=CPU)
    totals.add(torch.ones(3), torch.eye(3), torch.arange(3))
    totals.accept()
    first, second = totals.flush(Alone().sum_over_ranks), totals.flush(Alone().sum_over_ranks)
    assert first[0] == 3
    assert second == [0] * len(first)
    assert train_metrics(second, task=SINGLE_LABEL) == {}


def test_losses_that_are_no_number_are_counted_apart():
    totals = TrainTotals(task=SINGLE_LABEL, device=CPU)
    losses = torch.tensor([1.0, float("nan"), float("inf"), 3.0])
    totals.add(losses, torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    totals.accept()
    counts = totals.flush(Alone().sum_over_ranks)
    assert non_finite(counts) == 2
    assert train_metrics(counts, task=SINGLE_LABEL)["train/loss"] == pytest.approx(2.0)


def test_multi_label_f1_is_scikit_learn_s():
    from sklearn.metrics import f1_score

    torch.manual_seed(0)
    scores, labels = torch.randn(30, 4), torch.randint(0, 2, (30, 4)).float()
    totals = TrainTotals(task=MULTI_LABEL, device=CPU)
    totals.add(torch.ones(30), scores, labels)
    totals.accept()
    f1 = train_metrics(totals.flush(Alone().sum_over_ranks), task=MULTI_LABEL)["train/micro_f1"]
    expected = f1_score(labels.numpy(), (scores > 0).numpy(), average="micro")
    assert f1 == pytest.approx(expected)


def test_a_loss_that_explodes_does_not_wrap_around():
    totals = TrainTotals(task=SINGLE_LABEL, device=CPU)
    for sign in (1, -1):
        for _ in range(50):
            totals.add(torch.full((1000,), sign * 1e30), torch.zeros(1000, 2), torch.zeros(1000))
            totals.accept()
        loss = train_metrics(totals.flush(Alone().sum_over_ranks), task=SINGLE_LABEL)["train/loss"]
        assert sign * loss > 1e6


def test_counts_are_plain_averages_and_add_up():
    torch.manual_seed(1)
    counts: list[int] = []
    for part in range(3):
        totals = TrainTotals(task=MULTI_LABEL, device=CPU)
        labels = torch.randint(0, 2, (4, 2)).float()
        totals.add(torch.full((4,), float(part)), labels * 2 - 1, labels)  # all of them right
        totals.accept()
        counts = add_counts(counts, totals.flush(Alone().sum_over_ranks))
    assert train_metrics(counts, task=MULTI_LABEL) == {"train/loss": 1.0, "train/micro_f1": 1.0}
    nothing = TrainTotals(task=MULTI_LABEL, device=CPU)
    nothing.add(torch.ones(2), -torch.ones(2, 3), torch.zeros(2, 3))
    nothing.accept()
    metrics = train_metrics(nothing.flush(Alone().sum_over_ranks), task=MULTI_LABEL)
    assert metrics["train/micro_f1"] == 0.0  # nothing said, nothing to say
    assert non_finite([]) == 0
