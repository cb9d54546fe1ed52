"""Inputs predicted in blocks that the ranks share, and their rows, in order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rtl_dist.core.text import shown
from rtl_dist.data.loading.batch import Batch
from rtl_dist.data.loading.blocks import EVAL_BLOCK
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.workers import resolve_workers
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.terminal import progress
from rtl_dist.inference.drawn import Explainer
from rtl_dist.inference.inputs import InputMicrobatches, Inputs
from rtl_dist.inference.prediction import Prediction, predictions_of
from rtl_dist.inference.predictor import Predicting
from rtl_dist.inference.request import Request
from rtl_dist.inference.results import text_of
from rtl_dist.inference.rows import Column

LOG = logging.getLogger("rtl_dist")


def predicted_blocks(
    request: Request,
    predictor: Predicting,
    inputs: Inputs,
    columns: Sequence[Column],
    *,
    explainer: Explainer | None,
    top: int,
    done: int,
    runtime: Runtime,
) -> Iterator[tuple[list[str], list[str]]]:
    """Round by round, the rows of the next blocks in order, and what could not be read of them; on
    other ranks than 0 nothing of either. Called by all ranks.

    Args:
        columns, top: of the rows; see ``text_of``.
        explainer: what draws each input; None: nothing does.
        done: blocks that were predicted at an earlier start.

    Raises:
        RtlDistError: on every rank, if the loader of one failed.
        StopRequested: on every rank, if one was asked to stop.
    """
    firsts = range(0, len(inputs), EVAL_BLOCK)[done:]
    mine = firsts[runtime.rank :: runtime.world_size]
    rounds = len(firsts[:: runtime.world_size])
    workers = resolve_workers(request.workers, cpus=runtime.cpus)
    batches: Iterable[Batch] = make_loader(
        InputMicrobatches(inputs, predictor.transform, size=EVAL_BLOCK),
        mine,
        workers=workers if len(mine) > 1 else 0,
        device=runtime.device,
        ring_bytes=runtime.loader_bytes,
        give_up=runtime.is_asked,
    )
    batches = runtime.heartbeat.while_fetching(batches, are_remote=inputs.is_remote)
    if done and runtime.is_main:
        LOG.info("going on after %s of %s inputs", f"{done * EVAL_BLOCK:,}", f"{len(inputs):,}")
    bar = progress(
        total=rounds,
        what="predicting",
        unit="batch",
        images=EVAL_BLOCK * runtime.world_size,
        silent=not runtime.is_main or (request.out is None and sys.stdout.isatty()),
    )
    with bar:
        turns = iter(mine)
        for batch in runtime.in_rounds(batches, rounds, what="predicting"):
            told: _Told | None = None
            if batch is not None:
                first = next(turns)
                predictions = predictions_of_batch(request, predictor, inputs, first, batch)
                if explainer is not None:
                    explainer.write(first, predictions, batch.inputs)
                text = text_of(predictions, columns, form=request.form, top=top)
                told = _Told(text, [f"{shown(p.source)} {p.error}" for p in predictions if p.error])
            of_ranks = [one for one in runtime.gather_to_main(told) or [] if one is not None]
            bar.update()
            yield [one.text for one in of_ranks], [name for one in of_ranks for name in one.failed]


@dataclass(frozen=True)
class _Told:
    """What becomes of a block."""

    text: str
    failed: list[str]


def predictions_of_batch(
    request: Request, predictor: Predicting, inputs: Inputs, first: int, batch: Batch
) -> list[Prediction]:
    """Predictions of the inputs from number ``first`` on."""
    unread = np.flatnonzero(batch.samples.numpy() < 0).tolist()
    sources = [inputs.name(first + place) for place in range(len(batch.samples))]
    errors = dict(zip(unread, batch.bad, strict=True))
    return predictions_of(predictor, batch.inputs, sources, errors, threshold=request.threshold)
