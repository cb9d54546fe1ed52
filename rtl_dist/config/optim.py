"""The optim section: of the run, and the keys of it that a stage may have of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rtl_dist.config.checks import Checks

Schedule = Literal["cosine", "linear", "constant", "step", "plateau"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, the loss, and what becomes of the learning rate within a stage."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay (arXiv 1711.05101). sgd: with ``momentum``."""
    weight_decay: float = 0.05
    """Not applied to biases and norms."""
    momentum: float = 0.9
    """Of sgd (Nesterov when above 0)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    warmup: float = 0.05
    """Linear warm-up of each stage: below 1 a fraction of it, from 1 a number of steps."""
    schedule: Schedule = "cosine"
    """The learning rate after warm-up. cosine, linear: it falls to 0 at the end of the stage. step:
    it is multiplied by ``gamma`` every ``step_size`` epochs. plateau: it is multiplied by
    ``factor`` when evaluations bring nothing better; all others are functions of the step alone."""
    step_size: float | None = None
    """Of step, in epochs after warm-up; may be a fraction (torch's StepLR). It has no default."""
    gamma: float = 0.1
    """Of step: what the rate is multiplied by."""
    factor: float = 0.1
    """Of plateau: what the rate is multiplied by (torch's ReduceLROnPlateau, threshold 0)."""
    patience: int = 2
    """Of plateau: evaluations after warm-up without a better ``early_stop.metric`` that are let
    pass since the last better one, or since the rate fell; at the next the rate falls."""
    min_lr: float = 0.0
    """Of plateau: the head's rate never falls below; those of deeper parts by ``layer_decay``."""
    clip_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""
    label_smoothing: float = 0.1
    """Part of each label that is shared equally among all classes (arXiv 1512.00567); with bce, by
    yes and no."""
    ema: float = 0.0
    """Decay a step of an exponential moving average of the weights, which is then what is
    evaluated and kept as best; 0: none."""
    ema_batchnorm: Literal["reestimated", "averaged"] = "reestimated"
    """Statistics of the averaged weights' BatchNorm layers, where such learn. reestimated: measured
    with those weights on training images before each evaluation. averaged: like the weights."""
    loss: Literal["auto", "cross_entropy", "bce", "focal"] = "auto"
    """auto: cross_entropy, or bce for multi-label data. bce: a yes or no for each class (binary
    cross-entropy). focal: easy samples count less (arXiv 1708.02002)."""
    focal_gamma: float = 2.0
    """Of focal: the loss is multiplied by (1 - p)^gamma; 0: not at all."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the loss of a class is weighted by the inverse of its frequency."""
    logit_adjustment: float = 0.0
    """Adds this times the logarithm of each class's frequency to the scores in the loss (arXiv
    2007.07314), so that small classes are not outvoted; 1 is the paper's choice, 0 none."""
    skip_limit: int = 20
    """A step whose gradient is not finite is not taken. This many in a row end the run."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check.fractions(self, "label_smoothing", "momentum")
            check(
                all(0 <= beta < 1 for beta in self.betas),
                f"betas: must lie in 0 to below 1, not {list(self.betas)}",
            )
            check(0 <= self.ema < 1, f"ema: must lie in 0 to 1, not {self.ema}")
            check(self.weight_decay >= 0, "weight_decay: must be at least 0")
            check(self.warmup >= 0, "warmup: must be at least 0")
            check(
                self.step_size is None or self.step_size > 0,
                "step_size: must be positive, in epochs",
            )
            for name in ("gamma", "factor"):
                value = getattr(self, name)
                check(0 < value < 1, f"{name}: must lie between 0 and 1, not {value}")
            check(self.patience >= 0, "patience: must be at least 0")
            check(self.min_lr >= 0, "min_lr: must be at least 0")
            check(self.focal_gamma >= 0, "focal_gamma: must be at least 0")
            check(self.logit_adjustment >= 0, "logit_adjustment: must be at least 0")
            check(
                self.logit_adjustment == 0 or self.loss in ("auto", "cross_entropy", "focal"),
                "logit_adjustment: needs loss: cross_entropy or focal",
                "loss",
            )
            check(
                self.logit_adjustment == 0 or self.class_weights == "none",
                "logit_adjustment: and class_weights both make up for rare classes; choose one",
                "class_weights",
            )
            check.at_most(self, weight_decay=1000, warmup=10**9, step_size=10**6, min_lr=10**6)
            check.at_most(self, patience=10**6, skip_limit=10**6, focal_gamma=100)
            check.at_most(self, logit_adjustment=100)
            check(self.skip_limit >= 1, "skip_limit: must be at least 1")
            check(
                self.clip_grad_norm is None or self.clip_grad_norm > 0,
                "clip_grad_norm: must be positive or null",
            )
