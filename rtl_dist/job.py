"""What every stage of a run works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rtl_dist.config import Config
from rtl_dist.data.dataset import Dataset
from rtl_dist.data.split import Split
from rtl_dist.ema import Average
from rtl_dist.model.classifier import Classifier
from rtl_dist.runtime import Runtime
from rtl_dist.schedule import Every, is_due
from rtl_dist.state import TrainState
from rtl_dist.tracking import Tracker


@dataclass(kw_only=True)
class Job:
    """A run under way: its parts, opened, and how far it has come."""

    config: Config
    runtime: Runtime
    run: Path
    dataset: Dataset
    train: Split
    val: Split
    model: Classifier
    average: Average | None
    tracker: Tracker
    state: TrainState
    micro_batch_size: int
    workers: int

    @property
    def evaluated_model(self) -> Classifier:
        """The averaged weights where there are such, else the trained ones."""
        return self.average.model if self.average else self.model

    @property
    def epoch(self) -> float:
        return self.state.samples_seen / self.train.num_samples

    def is_due(self, every: Every, last: int) -> bool:
        return is_due(
            self.state.step,
            every,
            last=last,
            num_samples=self.train.num_samples,
            global_batch_size=self.config.batch.global_,
        )
