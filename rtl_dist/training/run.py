"""What every stage of a run works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rtl_dist.config import Config
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import Split
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.evaluation.logits import KeptImages
from rtl_dist.model.average import Average
from rtl_dist.model.classifier import Classifier
from rtl_dist.records.checkpoint_writer import CheckpointWriter
from rtl_dist.records.state import TrainState
from rtl_dist.records.tracking import Tracker


@dataclass(kw_only=True)
class Run:
    """A run under way: its parts, opened, and how far it has come."""

    config: Config
    """Resolved: nothing in it is ``auto`` that is part of the run's identity."""
    runtime: Runtime
    """This rank among the others, and its device."""
    folder: Path
    """The run folder, ``run.dir``."""
    dataset: Dataset
    """That the splits are of, the test split too."""
    train: Split
    """Trained on: ``data.train``."""
    val: Split
    """Judged by: ``data.val``."""
    model: Classifier
    """As it is trained, on this rank's device."""
    average: Average | None
    """Of the model's weights; None unless ``optim.ema``."""
    tracker: Tracker
    """Where rows of metrics go; on other ranks than 0 nowhere."""
    state: TrainState
    """How far the run has come; the same on every rank."""
    stage_best: dict[str, torch.Tensor]
    """Weights of the best evaluation of a stage with patience, on the host, by ``model/<name>`` and
    ``ema/<name>``; empty where there are none."""
    val_images: KeptImages
    """The val split as evaluations look at it, kept by the first one."""
    writer: CheckpointWriter
    """Writes checkpoints beside training, on rank 0."""
    workers: int
    """Loader processes of this rank."""

    @property
    def micro_batch_size(self) -> int:
        """The canonical microbatch; memory may have forced another than the config's."""
        return self.state.micro_batch_size or int(self.config.batch.micro)

    @property
    def evaluated_model(self) -> Classifier:
        """The averaged weights where there are such, else the trained ones."""
        return self.average.model if self.average else self.model

    def models(self) -> list[Classifier]:
        """The trained model, and its average where there is one."""
        return [self.model] + ([self.average.model] if self.average else [])

    @property
    def epoch(self) -> float:
        """How many epochs of samples were trained on so far."""
        return self.state.samples_seen / self.train.num_samples

    def wait_for_checkpoint(self) -> None:
        """Returns once the newest checkpoint is on the disk; called by all ranks.

        Raises:
            RtlDistError: on every rank, if it could not be written.
        """
        with self.runtime.heartbeat.phase("saving", open_ended=self.runtime.is_main):
            self.runtime.from_main(self.writer.wait)

    def keep_as_stage_best(self) -> None:
        """Copies the weights, so that the stage can hand them on when it ends."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        if self.average:
            tensors |= {f"ema/{k}": v for k, v in self.average.model.state_dict().items()}
        self.stage_best = {name: value.to("cpu", copy=True) for name, value in tensors.items()}

    def go_back_to_stage_best(self) -> None:
        """Puts back what ``keep_as_stage_best`` took."""
        models = {"model": self.model} | ({"ema": self.average.model} if self.average else {})
        for kind, model in models.items():
            prefix = f"{kind}/"
            model.load_state_dict(
                {
                    name.removeprefix(prefix): value
                    for name, value in self.stage_best.items()
                    if name.startswith(prefix)
                }
            )
