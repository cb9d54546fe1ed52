"""How far a run has come: everything but tensors that a resumed run needs to go on exactly."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Best:
    """The best evaluation so far and where it was."""

    value: float
    metric: str
    loss: float
    step: int
    epoch: float
    stage: str


@dataclass(kw_only=True)
class TrainState:
    """Plain numbers, the same on every rank; written to ``state.json`` of a checkpoint.

    step: optimizer steps done. stage: number of the current stage. stage_first_step: ``step`` when
    it began. last_*: ``step`` when it last happened. eval_was_due: an evaluation of this step was
    to come, and is done first when a run goes on, whatever its config says then. since_log,
    since_eval: training counts (whole numbers, see ``totals``) since then. metrics_bytes: the
    length of ``metrics.jsonl`` then. bad_samples: damaged samples replaced so far.

    Of the current stage: stage_best and evals_without_best (its best evaluation, and how many came
    since), lr (where the config says auto), is_compiled (where it says auto; None: not yet judged).
    micro_batch_size: since memory did not hold the config's; None: the config's. halvings: the
    steps from which on smaller ones were used, and their sizes.
    """

    step: int = 0
    stage: int = 0
    stage_first_step: int = 0
    samples_seen: int = 0
    last_log: int = 0
    last_eval: int = 0
    last_checkpoint: int = 0
    eval_was_due: bool = False
    since_log: list[int] = field(default_factory=list)
    since_eval: list[int] = field(default_factory=list)
    best: Best | None = None
    stage_best: Best | None = None
    evals_without_best: int = 0
    stopped_early: bool = False
    lr: float | None = None
    is_compiled: bool | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    micro_batch_size: int | None = None
    halvings: list[list[int]] = field(default_factory=list)
    bad_samples: int = 0
    bad_names: list[str] = field(default_factory=list)
    bad_logged: int = 0
    elapsed_s: float = 0.0
    metrics_bytes: int = 0
    ledger_bytes: int = 0
    wandb_id: str | None = None

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
        self.stage_best = self.lr = self.is_compiled = None
        self.evals_without_best = 0
        self.stopped_early = False
