"""What is made of a learning-rate range test's losses."""

import math

import pytest

from rtl_dist.records.lr_finder import holds_up_to, smoothed


def rates_of(count: int) -> list[float]:
    return [10 ** (-6 + 6 * i / (count - 1)) for i in range(count)]


def curve(rates: list[float]) -> list[float]:
    """Flat to 1e-4, down a slope to its lowest at 1e-2, and up again."""
    losses = []
    for rate in rates:
        decades = math.log10(rate) + 4
        losses.append(2.0 if decades < 0 else 2.0 - 0.8 * decades + max(0, decades - 2) * 3)
    return losses


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    losses = [3.0, 1.0, 4.0, 1.0, 5.0]
    for i, value in enumerate(smoothed(losses)):
        weights = [0.8 ** (i - j) for j in range(i + 1)]
        mean = sum(w * x for w, x in zip(weights, losses, strict=False)) / sum(weights)
        assert value == pytest.approx(mean, rel=1e-12)


def test_smoothing_leaves_a_constant_alone():
    assert smoothed([]) == []
    assert smoothed([0.7] * 50) == pytest.approx([0.7] * 50, rel=1e-12)


def test_it_is_the_last_rate_near_the_lowest_loss(monkeypatch):
    monkeypatch.setattr("rtl_dist.records.lr_finder.SMOOTHING", 0.0)
    losses = [2.0, 1.5, 1.0, 1.04, 1.06, 1.02, 3.0]
    assert holds_up_to(rates_of(7), losses) == pytest.approx(1e-1)
    assert holds_up_to(rates_of(7), [2.0, 1.5, 1.0, 1.04, 1.06, 1.2, 3.0]) == pytest.approx(1e-3)


def test_it_lies_at_the_lowest_loss():
    rates = rates_of(80)
    found = holds_up_to(rates, curve(rates))
    assert 3e-3 < found < 3e-2  # the lowest loss is at 1e-2


@pytest.mark.parametrize("size", [0.05, 0.2])
def test_noise_moves_it_little(size):
    rates = rates_of(80)
    plain = holds_up_to(rates, curve(rates))
    noise = [size * math.sin(12.9898 * i * i) for i in range(80)]
    found = holds_up_to(rates, [a + b for a, b in zip(curve(rates), noise, strict=True)])
    assert abs(math.log10(found / plain)) < 0.3


def test_losses_that_only_fall_or_only_grow():
    rates = rates_of(80)
    assert holds_up_to(rates, [2 - 0.02 * i for i in range(80)]) == pytest.approx(rates[-1])
    growing = holds_up_to(rates, [2 + 0.2 * i for i in range(80)])
    assert rates[0] <= growing < rates[3]


def test_few_losses_or_none():
    assert holds_up_to([], []) is None
    assert holds_up_to([1e-6], [2.0]) == pytest.approx(1e-6)
