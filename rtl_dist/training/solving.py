"""The head of a stage solved before its first step."""

from __future__ import annotations

import logging

import torch

from rtl_dist.config import ResolvedStage
from rtl_dist.core.device_memory import Attempt
from rtl_dist.core.errors import UserError
from rtl_dist.core.keys import Stream, stream_key
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.evaluation.logits import eval_transform
from rtl_dist.features.view import View
from rtl_dist.optim.head_problem import head_problem
from rtl_dist.optim.losses import make_loss
from rtl_dist.optim.principal_axes import principal_axes
from rtl_dist.optim.solved_head import assign_folds, choose_penalty, few_threads, solve
from rtl_dist.training.run import Run
from rtl_dist.training.stage_trainer import StageTrainer

LOG = logging.getLogger("rtl_dist")


def solve_head(stage: ResolvedStage, run: Run, trainer: StageTrainer) -> list[str]:
    """Puts the solution into the model's head; called by all ranks before the stage's first step.
    Rank 0 solves, so the result does not depend on how many there are.

    What the head makes of the training images counts as training since the last evaluation.

    Returns:
        What each damaged training image suffers from, in whose place another one was used.

    Raises:
        StopRequested: on every rank. UserError: on every rank, if some feature is no number.
        RtlDistError: on every rank, if the loader of one failed.
    """
    runtime = run.runtime
    assert trainer.features is not None  # a head has a frozen part below
    view = trainer.features.view_to_solve_on(run.train, eval_transform(run.model))
    with runtime.heartbeat.phase("solving the head", open_ended=True):
        weight, bias = runtime.from_main(lambda: _solution(stage, run, view))
        for model in run.models():
            model.head.take(weight, bias)
        runtime.from_main(lambda: _count(stage, run, trainer, view))
    trainer.totals.accept()
    state = run.state
    # what was evaluated and saved at this step is another head
    state.last_eval, state.eval_was_due = -1, True
    if (
        state.step == 0
    ):  # later there is the stage before to go on from, and this one is found again
        state.last_checkpoint = -1
    return view.bad


@torch.no_grad()
def _solution(stage: ResolvedStage, run: Run, view: View) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 weight (C, F) and bias (C,) of a plain linear layer."""
    if not view.features.isfinite().all():
        raise UserError(
            f"stages.{stage.number}.solve: the features of some image are infinite or not a number;"
            " set precision to bf16 or no, or other weights"
        )
    with Attempt() as attempt:
        return _solved(stage, run, view, run.runtime.device)
    assert attempt.ran_out
    LOG.info("stage %s: the head is solved on the CPU, as the GPU has no room for it", stage.name)
    return _solved(stage, run, view, torch.device("cpu"))


def _solved(
    stage: ResolvedStage, run: Run, view: View, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``_solution``."""
    give_up = run.runtime.is_asked
    labels = torch.from_numpy(run.train.labels(view.used.numpy()))
    folds = assign_folds(labels, seed=stream_key(run.config.seed, Stream.FOLDS) >> 1)
    with few_threads(view.features.numel() * run.dataset.num_classes):
        axes = principal_axes(view.features)
        problem = head_problem(
            axes.of(view.features).to(device),
            labels.to(device),
            stage.optim,
            multi_label=run.dataset.task == MULTI_LABEL,
            class_counts=run.train.class_counts,
            is_balanced=run.config.data.sampling == "balanced",
        )
        penalty = choose_penalty(problem.to(torch.float32), folds.to(device), give_up=give_up)
        found = solve(problem, penalty, give_up=give_up)
        LOG.info("stage %s: head solved, penalty %g on its weights", stage.name, penalty)
        return axes.back(found)


@torch.no_grad()
def _count(stage: ResolvedStage, run: Run, trainer: StageTrainer, view: View) -> None:
    """Counts the loss and hits of the solved head on what it was solved on."""
    device = run.runtime.device
    loss = make_loss(
        stage.optim,
        task=run.dataset.task,
        class_counts=run.train.class_counts,
        device=device,
    )
    head, labels = run.model.head, torch.from_numpy(run.train.labels(view.used.numpy()))
    was_training = head.training
    head.eval()
    for rows in torch.arange(len(labels)).split(4096):
        inputs = view.features[rows].to(device, head.weight.dtype)
        of_rows, scores = labels[rows].to(device), head(inputs)
        trainer.totals.add(loss(scores, of_rows), scores, of_rows)
    head.train(was_training)
