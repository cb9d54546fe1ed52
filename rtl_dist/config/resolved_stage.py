"""A stage with the run's defaults filled in, and its place in the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Literal

from rtl_dist.config.optim import OptimConfig, Schedule
from rtl_dist.config.schema import Config
from rtl_dist.config.stage import AugmentConfig, EarlyStopConfig, StageConfig

_LR_OF_SOLVED = 1e-3  # from an optimum there is not far to go


@dataclass(frozen=True)
class StageSpan:
    """The steps ``[first_step, end_step)`` of one stage."""

    first_step: int
    """Counted over the whole run."""
    end_step: int
    """The first step that is no longer its own."""

    @property
    def num_steps(self) -> int:
        return self.end_step - self.first_step


def stage_spans(
    epochs: list[float | None], steps: list[int | None], *, num_samples: int, global_batch_size: int
) -> list[StageSpan]:
    """Lays the stages end to end over one stream of samples.

    A stage measured in epochs ends at the first step by which its samples have all been seen: the
    tail of an epoch shares a batch with the head of the next, so nothing is dropped or padded.

    Args:
        epochs: per stage, its length in epochs, or None where ``steps`` says.
        steps: per stage, its length in steps, which may be 0, or None where ``epochs`` says.
    """
    spans, first, samples = [], 0, Fraction(0)
    for stage_epochs, stage_steps in zip(epochs, steps, strict=True):
        if stage_epochs is not None:
            samples += Fraction(str(stage_epochs)) * num_samples
            end = max(first + 1, math.ceil(samples / global_batch_size))
        else:
            assert stage_steps is not None
            end = first + stage_steps
            samples = Fraction(end * global_batch_size)
        spans.append(StageSpan(first, end))
        first = end
    return spans


@dataclass(frozen=True, kw_only=True)
class ResolvedStage(StageConfig):
    """One stage as it is trained: what its config leaves to the run's own sections is filled in."""

    number: int
    """Its place among the stages, from 0: ``stages.<number>`` is its address in a config."""
    span: StageSpan
    """Its steps, counted over the whole run."""
    image_size: int
    """Side of the square that it trains on, in pixels."""
    augment: AugmentConfig
    """Its own keys, and the run's for all else."""
    early_stop: EarlyStopConfig
    """Its own keys, and the run's for all else."""
    optim: OptimConfig
    """Its own keys, and the run's for all else; ``schedule`` and ``warmup`` as here."""
    schedule: Schedule
    """Of the learning rate after warm-up."""
    epochs: float | None
    """Length in epochs; None: ``steps`` says, or there is none."""
    lr: float
    """Of the head at the end of warm-up; see ``StageConfig``."""
    warmup: float
    """Below 1 a fraction of the stage, from 1 a number of steps."""
    steps_per_epoch: Fraction
    """Optimizer steps in which each training sample comes once; not rounded."""

    @property
    def patience(self) -> int | None:
        """Evaluations without a better one after which the stage ends; None: it does not."""
        return self.early_stop.patience

    @property
    def num_steps(self) -> int:
        """Optimizer steps; the most, if it may end early."""
        return self.span.num_steps


def resolve_stage(
    number: int, config: Config, span: StageSpan, *, num_samples: int
) -> ResolvedStage:
    """A stage of ``config`` with all that it leaves open filled in.

    num_samples: in the training split.
    """
    stage = config.stages[number]
    optim = stage.optim or config.optim
    optim = replace(
        optim,
        schedule=stage.schedule or optim.schedule,
        warmup=optim.warmup if stage.warmup is None else stage.warmup,
    )
    return ResolvedStage(
        **{f.name: getattr(stage, f.name) for f in fields(StageConfig)}
        | {
            "number": number,
            "span": span,
            "image_size": stage.image_size or config.data.image_size,
            "augment": stage.augment or config.augment,
            "early_stop": stage.early_stop or config.early_stop,
            "optim": optim,
            "epochs": _number(stage.epochs),
            "lr": _LR_OF_SOLVED if stage.lr is None else _number(stage.lr),
            "schedule": optim.schedule,
            "warmup": optim.warmup,
            "steps_per_epoch": Fraction(num_samples, config.batch.total),
        }
    )


def _number(value: float | Literal["auto"] | None) -> float | None:
    assert value != "auto"  # chosen by ``recipe_for`` before
    return value


def resolve_stages(config: Config, *, num_samples: int) -> list[ResolvedStage]:
    """The stages of a run over ``num_samples`` training samples, laid end to end."""
    spans = stage_spans(
        [_number(stage.epochs) or None for stage in config.stages],
        [stage.steps if stage.takes_steps else 0 for stage in config.stages],
        num_samples=num_samples,
        global_batch_size=config.batch.total,
    )
    return [
        resolve_stage(number, config, span, num_samples=num_samples)
        for number, span in enumerate(spans)
    ]
