"""The end of a run: calibration, the test split, results.json, the report, the last word."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtl_dist.config import Config, read_run_config
from rtl_dist.core.errors import RtlDistError, StopRequested
from rtl_dist.core.files import sha256_of, write_json
from rtl_dist.core.text import command
from rtl_dist.core.tolerated import tolerated
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.evaluation.calibrate import calibrate_on, too_few
from rtl_dist.model.folder import WEIGHTS, LoadedModel, load_model, write_calibration
from rtl_dist.model.freezing import digest
from rtl_dist.records.checkpoint import load_newest_checkpoint
from rtl_dist.records.identity import how_to_train_on, run_identity
from rtl_dist.records.results import read_results, results_of
from rtl_dist.report.model_evaluation import score_with
from rtl_dist.training.run import Run

LOG = logging.getLogger("rtl_dist")


def already_done(config: Config, runtime: Runtime, folder: Path, dataset: Dataset) -> str | None:
    """What to say of a run that this very config, resolved, has finished; None of any other."""

    def look() -> str | None:
        results = read_results(folder)
        if results.get("status") != "done":
            return None
        snapshot = load_newest_checkpoint(folder)
        if snapshot is None or snapshot.identity != run_identity(config, dataset):
            return None
        if not (folder / "report.html").exists():
            _draw(folder, runtime)  # it was killed meanwhile
        best = results.get("best")
        reached = f" (best {best['metric']} {best['value']:.4f})" if best else ""
        return (
            f"{folder} is already done{reached}: nothing to do. See {folder}/report.html; or"
            f" {how_to_train_on(folder)}{_other_calibration(config, folder)}"
        )

    line: str | None = runtime.from_main(look)
    return line


def _other_calibration(config: Config, folder: Path) -> str:
    """What to say if the run was finished with another ``calibrate`` section."""
    wanted = config.calibrate
    if read_run_config(folder).calibrate == wanted:
        return ""
    words: list[object] = ["--data", config.data.path, "--split", config.data.val]
    words += ["--coverage", wanted.coverage]
    if wanted.precision_target is not None:
        words += ["--precision-target", wanted.precision_target]
    return (
        "; it was calibrated by another calibrate section:"
        f" `{command('calibrate', folder, *words)}` calibrates it by this one"
    )


@contextmanager
def left_in_order(run: Run) -> Iterator[None]:
    """However the block ends: requests to stop are acted on within it, what was being saved is on
    the disk, and ``results.json`` says why a run did not come to its end."""
    runtime = run.runtime
    try:
        with runtime.stops.deferred() if runtime.stops else nullcontext():
            try:
                yield
            except StopRequested:
                run.wait_for_checkpoint()
                raise
    except RtlDistError as error:
        if runtime.is_main:
            results = results_of(
                run.state,
                status="stopped" if isinstance(error, StopRequested) else "failed",
                dataset_fingerprint=run.dataset.fingerprint,
            )
            with suppress(OSError):  # the disk may be what is wrong
                write_json(run.folder / "results.json", results | {"reason": str(error)})
        raise
    finally:
        with runtime.heartbeat.phase("saving", open_ended=runtime.is_main):
            run.writer.join()
        run.tracker.close()


def finish(run: Run) -> str:
    """Calibrates the best weights, evaluates them on the test split, writes ``results.json``, draws
    the report. What is only to be looked at may fail, which is said: the run is done.

    Returns:
        one line: what was reached and what to type next.
    """
    best = run.folder / "best"
    run.wait_for_checkpoint()
    # rank 0's final write of best/ must be there before the others read it
    weights_sha256 = run.runtime.from_main(lambda: sha256_of(best / WEIGHTS))
    loaded = _calibrated(run, best)
    test = _evaluate_test(run, loaded)
    results = results_of(run.state, status="done", dataset_fingerprint=run.dataset.fingerprint) | {
        "calibration": loaded.calibration.to_dict() or None,
        "test": test,
        "frozen_ok": True,  # a frozen weight that moved would have ended the run
        "weights_sha256": digest(run.model.state_dict()),
        "best_weights_sha256": weights_sha256,
    }

    def conclude() -> None:
        run.tracker.flush()
        _write_results(run.folder, results)
        _draw(run.folder, run.runtime)

    run.runtime.from_main(conclude)
    return _last_word(run, test) if run.runtime.is_main else ""


def _write_results(folder: Path, results: dict[str, Any]) -> None:
    """Makes room on a disk that the pictures of the evaluation have filled."""
    try:
        write_json(folder / "results.json", results)
    except OSError as error:
        pictures = list((folder / "evaluation").glob("*/*.png"))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not pictures:
            raise
        LOG.warning("the disk is full: %d picture(s) make room for results.json", len(pictures))
        for picture in pictures:
            picture.unlink()
        write_json(folder / "results.json", results)


def _draw(folder: Path, runtime: Runtime) -> None:
    LOG.info("drawing plots and report.html")
    with (
        runtime.heartbeat.phase("drawing", open_ended=True),
        tolerated(f"{folder}/report.html could not be drawn", but=_done_all_the_same(folder)),
    ):
        from rtl_dist.report.run import draw_run

        draw_run(folder)


def _done_all_the_same(folder: Path) -> str:
    return f"the run is done all the same, and `{command('report', folder)}` tries again"


def _calibrated(run: Run, best: Path) -> LoadedModel:
    """The best weights, whose folder says from now on how their scores are read. A run that was
    killed after it had written that finds the same again."""
    loaded, data = load_model(best), run.config.data
    why = too_few(run.val)
    if data.val == data.train:
        why = f"data.val is {data.train}, which it was trained on"
    if why:
        LOG.info("best/ is not calibrated: %s", why)
        return loaded
    LOG.info("calibrating the best weights on %s", data.val)
    calibration = calibrate_on(
        loaded.model,
        run.dataset,
        run.val,
        run.config.calibrate,
        runtime=run.runtime,
        workers=run.workers,
        kept=run.val_images,
    )
    run.runtime.from_main(lambda: write_calibration(best, calibration))
    LOG.info("calibrated: %s", calibration.told())
    return replace(loaded, calibration=calibration)


def _evaluate_test(run: Run, best: LoadedModel) -> dict[str, float] | None:
    name = run.config.data.test
    if name is None or name not in run.dataset.split_names:
        return None
    LOG.info("evaluating the best weights on %s", name)
    scored = score_with(
        best.model,
        run.dataset,
        name,
        runtime=run.runtime,
        workers=run.workers,
        calibration=best.calibration,
    )
    out = run.folder / "evaluation" / name
    again = command("evaluate", run.folder, "--data", run.config.data.path, "--split", name)

    def write() -> None:
        with tolerated(f"{out} could not be written", but=f"`{again}` tries again"):
            scored.write(out, title=f"{run.folder.name}: {name}")

    with run.runtime.heartbeat.phase("drawing", open_ended=run.runtime.is_main):
        run.runtime.from_main(write)
    return scored.metrics


def _last_word(run: Run, test: dict[str, float] | None) -> str:
    best, data = run.state.best, run.config.data
    reached = ""
    if best is not None:
        where = f"stage {best.stage}, epoch {best.epoch:.1f}"
        reached = f"best {best.metric} {best.value:.4f} ({where})"
    if test is not None:
        name = run.dataset.task.headline
        reached += f", {data.test}/{name} {test[name]:.4f} on {test['num_samples']:,} images"
    return (
        f"done: {reached} in {run.state.elapsed_s:.0f} s. See {run.folder}/report.html; next:"
        f" {command('evaluate', run.folder, '--data', data.path, '--split', data.val)}"
    )
