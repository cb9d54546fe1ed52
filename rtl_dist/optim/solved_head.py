"""A linear head solved to its optimum, its penalty chosen by cross-validation.

With the trunk frozen, the loss of a linear head is a convex function of a few thousand numbers. A
quasi-Newton method finds its minimum in a fraction of what the features cost; an optimizer that
steps through batches stops near it, and how near depends on its rate, its length and its clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from rtl_dist.core.errors import StopRequested
from rtl_dist.optim.head_problem import HeadProblem

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)
"""Tried in this order, each from the solution of the one before; of features of unit spread."""
UNCHOSEN = 0.01
"""The penalty where there are too few images to choose by."""
_NUM_FOLDS = 5
_WORSE_IN_A_ROW = 2  # weaker penalties than the best that are tried
_CURVATURE = 0.1  # of the loss along a score: p (1 - p), as it is on the whole
SMALL = 2**28  # images times features times classes: below it one thread is enough
LARGE = 2**31  # the same: from here on one fold is held out, not each in turn
_LOOSE, _TIGHT = 1e-4, 1e-9  # the largest derivative left: to compare penalties; to keep


def solve(
    problem: HeadProblem,
    penalty: float,
    *,
    start: torch.Tensor | None = None,
    precision: float = _TIGHT,
    give_up: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """The solution, float64 (C, F + 1) on the host, by L-BFGS (Liu & Nocedal 1989).

    Each weight is searched in units of what its feature's spread and the penalty make of the loss's
    curvature there, which for features without correlation takes a tenth of the iterations.

    Args:
        penalty: positive.
        start: a solution to begin with; None: zeros.
        precision: the largest derivative that is left, where rounding allows it.
        give_up: asked at every iteration.

    Raises:
        StopRequested: ``give_up`` said so.
    """
    from scipy.optimize import minimize

    shape = problem.targets.shape[1], problem.features.shape[1] + 1
    begin = torch.zeros(shape, dtype=torch.float64) if start is None else start
    curvature = _CURVATURE * problem.features.double().square().mean(0).cpu() + penalty
    units = torch.cat([curvature.rsqrt(), torch.ones(1, dtype=torch.float64)])

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        if give_up():
            raise StopRequested("stopped while solving the head; start the same command to go on")
        solution = (torch.from_numpy(flat).view(shape) * units).to(problem.features)
        value, gradient = problem.value_and_gradient(solution, penalty)
        return value, (gradient.double().cpu() * units).numpy().ravel()

    found = minimize(
        value_and_gradient,
        (begin / units).numpy().ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "gtol": precision, "ftol": 0.0, "maxcor": 20},
    )
    return torch.from_numpy(found.x).view(shape) * units


@contextmanager
def few_threads(size: int) -> Iterator[None]:
    """Within the block a small problem on a CPU is computed by one thread: several would spend
    their time waiting for each other, and round by their number.

    size: images times features times classes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if size < SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_penalty(
    problem: HeadProblem, folds: torch.Tensor, *, give_up: Callable[[], bool] = lambda: False
) -> float:
    """The penalty with the lowest loss on held-out samples.

    Args:
        folds: int64 (n,), see ``assign_folds``.
        give_up: see ``solve``.

    Raises:
        StopRequested: ``give_up`` said so.
    """
    held_out = [fold for fold in folds.unique().tolist() if fold >= 0]
    if problem.features.numel() * problem.targets.shape[1] > LARGE:
        held_out = held_out[:1]
    parts = [(problem.rows(folds != fold), problem.rows(folds == fold)) for fold in held_out]
    if not parts:
        return UNCHOSEN
    starts: list[torch.Tensor | None] = [None] * len(parts)
    losses: list[float] = []
    for penalty in PENALTIES:
        loss = 0.0
        for i, (kept, judged) in enumerate(parts):
            found = starts[i] = solve(
                kept, penalty, start=starts[i], precision=_LOOSE, give_up=give_up
            )
            loss += judged.true_loss(found.to(problem.features)) * judged.num_samples
        losses.append(loss)
        if len(losses) - 1 - int(np.argmin(losses)) >= _WORSE_IN_A_ROW:
            break
    return PENALTIES[int(np.argmin(losses))]


def assign_folds(labels: torch.Tensor, *, seed: int) -> torch.Tensor:
    """In which of five parts each sample is held out, int64 (n,), each part with its share of each
    class; -1: never, as the only sample of a class would then be judged without ever being seen.

    Args:
        labels: int64 (n,), or 0/1 (n, C), which are shared out as they come.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    counts = torch.full((1,), len(labels))
    classes = torch.zeros(len(labels), dtype=torch.int64)
    if labels.ndim == 1:
        counts, classes = labels.bincount(), labels
        order = order[labels[order].argsort(stable=True)]
    folds = torch.empty(len(labels), dtype=torch.int64)
    folds[order] = torch.arange(len(labels)) % _NUM_FOLDS
    return torch.where(counts[classes] < 2, -1, folds)
