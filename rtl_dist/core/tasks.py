"""What there is to learn, and the figures that say how well it was: each is named here, once.

To add one, name it in ``METRICS``, and in its task's ``metrics`` if a run may be judged by it, and
add its arithmetic to ``evaluation/metrics.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of an evaluation."""

    name: str
    """As a page shows it."""
    is_share: bool = False
    """Whether it counts samples, so that it is shown in percent."""
    is_lower_better: bool = False
    """Whether the best evaluation is that with the lowest."""


METRICS = {
    "top1": Metric(name="top-1 accuracy", is_share=True),
    "top5": Metric(name="top-5 accuracy", is_share=True),
    "map": Metric(name="mean average precision"),
    "exact_match": Metric(name="all labels right", is_share=True),
    "macro_f1": Metric(name="macro F1"),
    "micro_f1": Metric(name="micro F1"),
    "loss": Metric(name="loss (nats)", is_lower_better=True),
    "ece": Metric(name="calibration error"),
    "set_coverage": Metric(name="conformal sets that hold the truth", is_share=True),
    "set_size": Metric(name="classes in a conformal set"),
    "answered": Metric(name="answered, not abstained", is_share=True),
    "answered_top1": Metric(name="top-1 accuracy of the answered", is_share=True),
}
"""By the key that stands in files, in the order in which a page shows them. An evaluation may write
others, which pages show after these."""


class Task(StrEnum):
    """One class an image, or any number of them; the value is what files say."""

    SINGLE_LABEL = "single_label"
    MULTI_LABEL = "multi_label"

    @property
    def headline(self) -> str:
        """The metric by which a run is judged where its config does not say another."""
        return self.metrics[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What every evaluation measures, and ``early_stop.metric`` may name; the headline first.
        It measures more, by which nothing is judged."""
        if self is Task.SINGLE_LABEL:
            return ("top1", "top5", "macro_f1", "loss")
        return ("map", "micro_f1", "macro_f1", "exact_match", "loss")

    @property
    def counted(self) -> str:
        """The metric that training counts as it goes, to be compared with the evaluation's: a mean
        average precision would need the scores of all samples."""
        return "top1" if self is Task.SINGLE_LABEL else "micro_f1"

    @property
    def share_right(self) -> str:
        """The metric that is the share of samples of which all is right."""
        return "top1" if self is Task.SINGLE_LABEL else "exact_match"

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics of the one line that an evaluation ends with."""
        return (*self.metrics[:1], "macro_f1" if self is Task.SINGLE_LABEL else "micro_f1", "loss")


SINGLE_LABEL, MULTI_LABEL = Task
