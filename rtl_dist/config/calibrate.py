"""The calibrate section: what is promised of the probabilities of a finished run."""

from __future__ import annotations

from dataclasses import dataclass

from rtl_dist.config.checks import Checks


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """What ``best/`` promises of its probabilities when the run ends, fitted on ``data.val``."""

    coverage: float = 0.9
    """The share of images whose conformal set is to hold what is true of them."""
    precision_target: float | None = None
    """The share of right ones among what the model says: single-label it abstains where it must,
    multi-label each label has its threshold. null: 0.95; multi-label: thresholds for the best F1 of
    each label."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check(0 < self.coverage < 1, f"coverage: must lie between 0 and 1, not {self.coverage}")
            check(
                self.precision_target is None or 0 < self.precision_target < 1,
                f"precision_target: must lie between 0 and 1, not {self.precision_target}; null is"
                " the default",
            )
