"""``rtl-dist predict``, as a story: what is asked for, found, looked at in blocks, and written.

Blocks of ``EVAL_BLOCK`` inputs are shared among the ranks, which go through them in rounds; rank 0
writes the rows of each round in the inputs' order. What is in a block depends on the inputs alone,
so the results are the same at any number of processes and workers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rtl_dist.config import Precision
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.files import write_bytes
from rtl_dist.core.text import and_more, shorten
from rtl_dist.data.loading.blocks import EVAL_BLOCK
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.stopping import StopRequests
from rtl_dist.distributed.terminal import configure_logging
from rtl_dist.inference.asked_inputs import open_inputs
from rtl_dist.inference.blocks import predicted_blocks, predictions_of_batch
from rtl_dist.inference.drawn import Explainer, grid_of
from rtl_dist.inference.inputs import InputMicrobatches, Inputs
from rtl_dist.inference.opening import Opened
from rtl_dist.inference.predictor import Predicting
from rtl_dist.inference.request import Request
from rtl_dist.inference.results import FileResults, PrintedResults, Results
from rtl_dist.inference.rows import Column, columns_of

LOG = logging.getLogger("rtl_dist")


def predict(request: Request) -> str:
    """Predicts every input once, in order; on one process or, under a launcher, on many.

    Returns:
        one line on rank 0, or nothing where results were printed; elsewhere "".

    Raises:
        UserError: no such model or input, or the options do not fit.
        DataError: more inputs than allowed cannot be predicted, or there are none; the results are
            written all the same.
        StopRequested: a rank was asked to stop; the same command goes on.
    """
    request.check()
    opened = Opened(request.model, raw=request.raw)
    top = request.top_of(opened)
    precision = request.precision or opened.precision
    with StopRequests() as stops, Runtime(precision, stops) as runtime:
        configure_logging(is_main=runtime.is_main)
        predictor = opened.predictor(runtime=runtime, tta=request.tta)
        with _results(request, runtime) as results:
            folder = Path(runtime.from_main(lambda: results[0].folder))
            with closing(open_inputs(request, folder, runtime)) as inputs:
                columns = columns_of(predictor.task, predictor.calibration, top=top)
                asked = _asked(request, predictor, inputs, top=top, precision=runtime.precision)
                explainer = runtime.on_every_rank(lambda: _explainer(request, predictor))
                done = runtime.from_main(lambda: _begin(results[0], asked, columns))
                if request.grid is not None:
                    runtime.from_main(partial(_draw_grid, request, request.grid, predictor, inputs))
                with stops.deferred():
                    blocks = predicted_blocks(
                        request,
                        predictor,
                        inputs,
                        columns,
                        explainer=explainer,
                        top=top,
                        done=done,
                        runtime=runtime,
                    )
                    for texts, failed in blocks:
                        runtime.from_main(partial(_append, results, texts, failed))
                return _finished(request, results, len(inputs), runtime)


@contextmanager
def _results(request: Request, runtime: Runtime) -> Iterator[list[Results]]:
    """On rank 0 where results go; nothing elsewhere."""
    made: list[Results] = []

    def make() -> None:
        if request.out is None:
            made.append(PrintedResults())
        else:
            made.append(FileResults(request.out, overwrite=request.overwrite))

    runtime.from_main(make)
    try:
        yield made
    finally:
        for results in made:
            results.close()


def _asked(
    request: Request, predictor: Predicting, inputs: Inputs, *, top: int, precision: Precision
) -> dict[str, Any]:
    """What results depend on, by what it is called in a message."""
    return {
        "model": predictor.fingerprint(),
        "list of inputs": inputs.fingerprint,
        "--top": top,
        "--threshold": request.threshold,
        "--tta": request.tta,
        "--raw": request.raw,
        "--explain": None if request.explain is None else str(request.explain),
        "precision": str(precision),
    }


def _explainer(request: Request, predictor: Predicting) -> Explainer | None:
    return None if request.explain is None else Explainer(request.explain, predictor)


def _draw_grid(request: Request, path: Path, predictor: Predicting, inputs: Inputs) -> None:
    """Of the first block, which is looked at for it: at a start that goes on, it is done.

    Raises:
        UserError: the file cannot be written.
    """
    batch = InputMicrobatches(inputs, predictor.transform, size=EVAL_BLOCK)[0]
    predictions = predictions_of_batch(request, predictor, inputs, 0, batch)
    drawn = grid_of(predictions, batch.inputs, total=len(inputs), title=request.model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, drawn)
    except OSError as error:
        raise UserError(
            f"--grid: cannot write {path}: {error.strerror}; choose another place"
        ) from error


def _begin(results: Results, asked: dict[str, Any], columns: Sequence[Column]) -> int:
    results.begin(asked, columns)
    return results.blocks


def _append(results: list[Results], texts: list[str], failed: list[str]) -> None:
    results[0].append(texts, failed)


def _finished(request: Request, results: list[Results], num_inputs: int, runtime: Runtime) -> str:
    def finish() -> tuple[int, list[str]]:
        failed = results[0].failed, results[0].first_failed
        results[0].finish()
        return failed

    with runtime.heartbeat.phase("writing the results", open_ended=runtime.is_main):
        failed, first_failed = runtime.from_main(finish)
    names = f"{shorten(first_failed)}{and_more(failed - len(first_failed))}"
    if failed > request.allow_errors:
        where = "" if request.out is None else f" {request.out} has all inputs, with reasons;"
        raise DataError(
            f"{failed:,} of {num_inputs:,} inputs could not be predicted: {names};{where}"
            f" --allow-errors {failed} makes this no failure"
        )
    if not runtime.is_main:
        return ""
    if request.out is None:
        if failed:
            LOG.warning("%s of %s inputs could not be predicted", f"{failed:,}", f"{num_inputs:,}")
        return ""
    if request.as_json:
        told = {"out": str(request.out), "inputs": num_inputs, "failed": failed}
        return json.dumps(told, ensure_ascii=False)
    without = f", {failed:,} of them without a prediction: {names}" if failed else ""
    return f"{request.out}: {num_inputs:,} inputs{without}"
