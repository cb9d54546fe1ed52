"""How far a run has come: everything but tensors that a resumed run needs to go on exactly."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Best:
    """The best evaluation so far and where it was."""

    value: float
    """Of ``metric``."""
    metric: str
    """Its name, such as ``val/top1``."""
    loss: float
    """``val/loss`` of the same evaluation; decides between equal values."""
    step: int
    """Optimizer steps done by then."""
    epoch: float
    """Epochs of samples seen by then, not rounded."""
    stage: str
    """Name of the stage."""


@dataclass(kw_only=True)
class TrainState:
    """Plain numbers, the same on every rank; written to ``state.json`` of a checkpoint."""

    step: int = 0
    """Optimizer steps done, counted over the whole run, skipped ones too."""
    stage: int = 0
    """Number of the current stage, from 0."""
    stage_first_step: int = 0
    """``step`` when the current stage began."""
    samples_seen: int = 0
    """Training samples of the steps done: positions of the stream."""
    last_log: int = 0
    """``step`` when a row was last written to ``metrics.jsonl``."""
    last_eval: int = 0
    """``step`` of the last evaluation."""
    last_checkpoint: int = 0
    """``step`` of the last checkpoint that was asked for."""
    eval_was_due: bool = False
    """An evaluation of this step was to come, and is done first when a run goes on, whatever its
    config says then."""
    since_log: list[int] = field(default_factory=list)
    """Training counts since ``last_log``; whole numbers, see ``optim.counts``."""
    since_eval: list[int] = field(default_factory=list)
    """Training counts since ``last_eval``."""
    best: Best | None = None
    """Of the whole run: what lies in ``best/``."""
    stage_best: Best | None = None
    """Of the current stage, by the stage's own metric."""
    evals_without_best: int = 0
    """Evaluations of the current stage since ``stage_best``."""
    evals_at_rate: int = 0
    """Of them, those since the rate last fell; of ``schedule: plateau`` only."""
    times_lowered: int = 0
    """How often ``schedule: plateau`` had the rate of the current stage fall."""
    stopped_early: bool = False
    """The current stage's patience is over, so it ends at this step."""
    is_compiled: bool | None = None
    """Whether compiling the current stage was found to pay, where the config says auto; None: not
    yet judged."""
    is_cached: bool | None = None
    """Whether the current stage trains on cached features, where the config says auto; None: not
    yet decided."""
    skipped_steps: int = 0
    """Steps not taken so far, as their gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of them came last, one after the other; of the current stage."""
    micro_batch_size: int | None = None
    """Images of a microbatch since memory did not hold the config's; None: the config's."""
    halvings: list[list[int]] = field(default_factory=list)
    """[step, images]: from which steps on smaller microbatches were used, and their size."""
    bad_samples: int = 0
    """Damaged samples replaced so far, each counted once."""
    bad_names: list[str] = field(default_factory=list)
    """Their names and what is wrong, in the order of the steps that met them."""
    bad_logged: int = 0
    """How many of ``bad_names`` have been written to ``metrics.jsonl``."""
    elapsed_s: float = 0.0
    """Seconds that the stages took up to this step, without start-ups and what a kill undid."""
    metrics_bytes: int = 0
    """Length of ``metrics.jsonl``; what an earlier start wrote beyond it is cut off."""
    ledger_bytes: int = 0
    """Length of ``ledger/samples.jsonl``, likewise."""
    wandb_id: str | None = None
    """Of the W&B run that this one is copied to; None: none yet."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        values = dict(values)
        for name in ("best", "stage_best"):
            if values.get(name) is not None:
                values[name] = Best(**values[name])
        return cls(**values)

    def begin_next_stage(self) -> None:
        self.stage += 1
        self.stage_first_step = self.step
        self.stage_best = self.is_compiled = self.is_cached = None
        self.evals_without_best = self.evals_at_rate = self.times_lowered = 0
        self.skipped_in_a_row = 0
        self.stopped_early = False
