"""Features seen along the axes in which they do not correlate, centred, and of a common scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

CHUNK = 8192  # rows that are computed at a time
_ROUNDING = 1e-12  # of a squared mean: what sums of squares leave of no variance at all is less


@dataclass(frozen=True, kw_only=True)
class PrincipalAxes:
    """A change of coordinates. It turns and scales all features alike, so the length of a head's
    weights means the same in both."""

    mean: torch.Tensor
    """float64 (F,), of the features."""
    scale: torch.Tensor
    """float64 (): see ``common_scale``."""
    axes: torch.Tensor
    """float64 (F, F), orthogonal: a column each."""

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """float (n, F) to float64 (n, F)."""
        out = torch.empty(features.shape, dtype=torch.float64)
        for rows, filled in zip(features.split(CHUNK), out.split(CHUNK), strict=True):
            torch.matmul(rows.double() - self.mean, self.axes, out=filled)
        return out.div_(self.scale)

    def back(self, solution: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The plain head's weight (C, F) and bias (C,) of a solution (C, F + 1) in these axes."""
        weight = solution[:, :-1] @ self.axes.T / self.scale
        return weight, solution[:, -1] - weight @ self.mean


def principal_axes(features: torch.Tensor) -> PrincipalAxes:
    """Of features, float (n, F) on the host."""
    mean = sum(rows.double().sum(0) for rows in features.split(CHUNK)) / len(features)
    assert isinstance(mean, torch.Tensor)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for centred in _centred(features, mean):
        covariance.addmm_(centred.T, centred)
    covariance /= len(features)
    return PrincipalAxes(
        mean=mean,
        scale=common_scale(mean, covariance.diagonal()),
        axes=torch.linalg.eigh(covariance).eigenvectors,
    )


def common_scale(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """The root mean square of features' standard deviations, (); 1 if they do not change, but for
    what rounding makes of a mean and a variance, (F,) each."""
    spread = variance.mean()
    return torch.where(spread > _ROUNDING * mean.square().mean(), spread.sqrt(), 1.0)


def _centred(features: torch.Tensor, mean: torch.Tensor) -> Iterator[torch.Tensor]:
    for rows in features.split(CHUNK):
        yield rows.double() - mean
