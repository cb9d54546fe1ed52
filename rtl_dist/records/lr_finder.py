"""A learning-rate range test: where its file is, its curve smoothed, up to where it holds."""

from __future__ import annotations

FOLDER = "lr_finder"  # in the run folder: one file a stage
SMOOTHING = 0.8  # of the moving average of losses
_NEAR = 1.05  # times the lowest smoothed loss: as good as that


def smoothed(losses: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, result = 0.0, []
    for i, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        result.append(average / (1 - SMOOTHING**i))
    return result


def holds_up_to(rates: list[float], losses: list[float]) -> float | None:
    """The largest rate at which the smoothed loss is still near its lowest; None if the loss was a
    number at no rate. It is no advice: which rate trains best is another question
    (docs/recipes.md)."""
    if not losses:
        return None
    values = smoothed(losses)
    near = max(i for i, value in enumerate(values) if value <= _NEAR * min(values))
    return rates[near]
