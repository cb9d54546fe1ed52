"""Features turned onto their principal axes: the same scores, the same length of weights."""

import pytest
import torch

from rtl_dist.optim import principal_axes as room
from rtl_dist.optim.principal_axes import principal_axes


@pytest.fixture
def features():
    """Correlated, of unequal spread, with means several times that; float32, as from a cache."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator) * torch.tensor([3.0, 1, 1, 0.3, 0.1, 0.01])
    return torch.randn(200, 6, generator=generator) @ mixing + 10


@pytest.fixture
def solution():
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scores(features, solution):
    return features.double() @ solution[:, :-1].T + solution[:, -1]


def test_a_solution_in_the_axes_has_the_same_scores_outside(features, solution):
    axes = principal_axes(features)
    weight, bias = axes.back(solution)
    plain = torch.cat([weight, bias[:, None]], 1)
    torch.testing.assert_close(
        scores(features, plain), scores(axes.of(features), solution), rtol=0, atol=1e-9
    )


def test_along_them_nothing_correlates_and_the_mean_variance_is_1(features):
    turned = principal_axes(features).of(features)
    covariance = turned.T @ turned / len(turned)
    spread = covariance.diagonal()
    torch.testing.assert_close(covariance, spread.diag(), rtol=0, atol=1e-10)
    assert float(spread.mean()) == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(turned.mean(0), torch.zeros(6).double(), rtol=0, atol=1e-9)


def test_they_turn_and_scale_only_so_that_a_penalty_means_the_same(features, solution):
    axes = principal_axes(features)
    weight, _ = axes.back(solution)
    lengths = (weight * axes.scale).square().sum(), solution[:, :-1].square().sum()
    assert float(lengths[0]) == pytest.approx(float(lengths[1]), rel=1e-10)


def test_features_computed_in_pieces_are_the_same(features, monkeypatch):
    whole = principal_axes(features)
    monkeypatch.setattr(room, "CHUNK", 7)
    pieces = principal_axes(features)
    torch.testing.assert_close(pieces.mean, whole.mean)
    torch.testing.assert_close(pieces.scale, whole.scale)
    torch.testing.assert_close(pieces.of(features).abs(), whole.of(features).abs())


def test_more_features_than_images(features, solution):
    axes = principal_axes(features[:4])
    weight, bias = axes.back(solution)
    plain = torch.cat([weight, bias[:, None]], 1)
    found, wanted = scores(features, plain), scores(axes.of(features), solution)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.1, 777.7])
def test_features_that_never_change_are_nought(value, dtype):
    features = torch.full((57, 6), value, dtype=dtype)
    axes = principal_axes(features)
    assert float(axes.scale) == 1
    assert float(axes.of(features).abs().max()) < 1e-9


def test_one_that_never_changes_is_left_alone(features):
    features[:, 2] = 0.1
    turned = principal_axes(features).of(features)
    assert torch.isfinite(turned).all()
    assert float(turned.square().mean()) == pytest.approx(1, rel=1e-9)
