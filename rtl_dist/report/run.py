"""``rtl-dist report RUN``: a run's plots and its page, drawn from the run's files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtl_dist.core.files import write_text
from rtl_dist.core.tasks import METRICS
from rtl_dist.core.text import duration
from rtl_dist.records.results import read_results
from rtl_dist.report import plots
from rtl_dist.report.evaluation import PHOTOS, PICTURES
from rtl_dist.report.figure import draw
from rtl_dist.report.history import History, read_history
from rtl_dist.report.html import Cell, Page, percent
from rtl_dist.report.rates import falling_stages
from rtl_dist.report.summary import headline, read_summary, words_of_calibration

REPORT = "report.html"

_PLOTS = {
    "loss.png": "Loss on the training images as augmented, and on the validation split.",
    "accuracy.png": "Training against validation; the shaded gap shows how far the model fits what"
    " it saw better than what it did not. Training is scored on augmented images while the model"
    " still learns, so the gap can be negative.",
    "learning_rate.png": "The learning rate of each parameter group.",
    "throughput.png": "Images a second over all processes, and the share of time spent waiting."
    " Each point covers the time since the point before, with waiting for data and saving"
    " checkpoints in it, but without evaluations.",
}


def draw_run(run: Path) -> Path:
    """Writes ``plots/*.png`` and ``report.html`` into a run folder; returns the page's path.

    Works on a finished run, on one that is still going and on one that was killed: whatever of
    ``results.json``, ``config.yaml``, ``environment.json`` and ``evaluation/<split>/`` is there is
    shown. A picture that cannot be drawn is left out, which is said.

    Raises:
        UserError: ``metrics.jsonl`` is missing or has no whole row yet.
        OSError: the folder cannot be written.
    """
    history = read_history(run)
    results = read_results(run)
    best = _best(history, results)
    figures = {
        "loss.png": lambda: plots.loss_figure(history),
        "accuracy.png": lambda: plots.accuracy_figure(history, best),
        "learning_rate.png": lambda: plots.learning_rate_figure(history, falling_stages(run)),
        "throughput.png": lambda: plots.throughput_figure(history),
    }
    drawn = {name: draw(run / "plots" / name, make) for name, make in figures.items()}

    page = Page(f"Run {run.resolve().name}", _state(history, results))
    page.cards(_cards(history, results, best))
    _add_notes(page, history, results)
    page.heading("Curves")
    for name, caption in _PLOTS.items():
        page.picture(drawn[name], caption)
    page.heading("Stages")
    _add_stage_table(page, history)
    _add_evaluations(page, run, results)
    _add_details(page, run, results)
    write_text(run / REPORT, page.render())
    return run / REPORT


def _best(history: History, results: dict[str, Any]) -> tuple[float, float] | None:
    """Epoch and value of the best weights by the headline metric.

    ``results.json`` says which evaluation was chosen; before it is written, or when the choice was
    by another metric whose epoch was not evaluated, the highest value so far.
    """
    found = _dict(results, "best")
    epoch, stage = found.get("epoch"), found.get("stage")
    # a head that was solved is evaluated at the epoch at which the stage before it ended
    of_stage = [part for part in history.parts if part.rows[0].get("stage") == stage]
    epochs, values = (of_stage or [history])[0].series(f"val/{history.headline}")
    if isinstance(epoch, int | float) and len(epochs):
        place = int(abs(epochs - epoch).argmin())
        if abs(epochs[place] - epoch) < 1e-3:
            return float(epochs[place]), float(values[place])
    return history.best()


def _state(history: History, results: dict[str, Any]) -> str:
    last = history.rows[-1]
    where = f"step {int(last['step']):,}, epoch {last['epoch']:.4g}"
    status = results.get("status", "running, or stopped before it could say how it ended")
    return f"Status: {status}. Last row: {where}, stage {last.get('stage', 'training')}."


def _cards(
    history: History, results: dict[str, Any], best: tuple[float, float] | None
) -> list[tuple[str, str, str]]:
    name = METRICS[history.headline].name
    cards = []
    test = _test_figures(results)
    if history.headline in test:
        cards.append((percent(test[history.headline]), f"test {name}", "the best weights"))
    if best is not None:
        stage = _dict(results, "best").get("stage")
        where = f"stage {stage}, " if isinstance(stage, str) else ""
        cards.append((percent(best[1]), f"best validation {name}", f"{where}epoch {best[0]:.4g}"))
    stages = history.stages
    if stages[-1].gap is not None:
        cards.append((f"{100 * stages[-1].gap:+.2f}", "gap", "train minus validation, points"))
    cards.append((duration(sum(s.seconds for s in stages)), "time", f"{len(stages)} stages"))
    if isinstance(seen := results.get("samples_seen"), int):
        cards.append((f"{seen:,}", "samples seen", "by the optimizer"))
    speed = history.series("speed/images_per_second")[1]
    if len(speed):
        cards.append((f"{speed[-1]:,.0f}", "images a second", "when last measured"))
    if isinstance(frozen := results.get("frozen_ok"), bool):
        cards.append(("yes" if frozen else "NO", "frozen stayed frozen", "proved by hashes"))
    return cards


def _test_figures(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of ``results.json``'s test, by their bare names."""
    return {
        name.rpartition("/")[2]: value
        for name, value in _dict(results, "test").items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _add_notes(page: Page, history: History, results: dict[str, Any]) -> None:
    lost = [r["step"] for r in history.rows if r.get("train/loss") != r.get("train/loss")]
    if lost:
        page.paragraph(
            f"The training loss was not a number in {len(lost)} rows, first at step"
            f" {lost[0]}; such rows are left out of the curves."
        )
    if history.unreadable:
        lines = ", ".join(map(str, history.unreadable[:10]))
        page.paragraph(f"Lines of metrics.jsonl that could not be read: {lines}.")
    bad = _dict(results, "bad_samples")
    if bad.get("count"):
        names = bad.get("names")
        shown = "; ".join(map(str, names[:5])) if isinstance(names, list) else ""
        page.paragraph(
            f"{bad['count']} damaged samples were replaced by others: {shown}. See rtl-dist verify."
        )
    if skipped := results.get("skipped_steps") or history.rows[-1].get("train/skipped_steps"):
        page.paragraph(
            f"{skipped} {'step was' if skipped == 1 else 'steps were'} not taken, as the gradient"
            " was infinite or not a number."
        )
    if halvings := _halvings(results):
        page.paragraph(
            "Microbatches were made smaller when memory did not hold them:"
            f" {', '.join(f'{size} from step {step}' for step, size in halvings)}. The global batch"
            " stayed as it was."
        )
    if results.get("frozen_ok") is False:
        page.paragraph("A frozen part of the model moved: do not trust this run.")


def _halvings(results: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The steps from which microbatches were smaller, and their sizes."""
    found = results.get("microbatch_halvings")
    items = [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []
    return [(item.get("from_step"), item.get("micro")) for item in items]


def _add_stage_table(page: Page, history: History) -> None:
    rows: list[Sequence[Cell]] = [
        (
            stage.name,
            f"{stage.end - stage.start:.4g}",
            stage.steps,
            _share(stage.best),
            None if stage.best_epoch is None else f"{stage.best_epoch:.4g}",
            _share(stage.final),
            stage.final_loss,
            _share(stage.train),
            None if stage.gap is None else f"{100 * stage.gap:+.2f}",
            duration(stage.seconds),
        )
        for stage in history.stages
    ]
    header = (
        "stage",
        "epochs",
        "steps",
        "best validation",
        "at epoch",
        "final validation",
        "final loss",
        "final train",
        "gap (points)",
        "time",
    )
    page.table(header, rows)
    judged, compared = METRICS[history.headline].name, METRICS[history.compared].name
    what = f"{judged}; train and gap are of {compared}" if judged != compared else judged
    page.paragraph(f"Validation is {what}. The gap is train minus validation.", soft=True)
    if any(stage.steps == 0 for stage in history.stages):
        page.paragraph(
            "A head that was solved takes no steps; its training figures are of the images as"
            " evaluations see them.",
            soft=True,
        )


def _add_evaluations(page: Page, run: Path, results: dict[str, Any]) -> None:
    """The pictures of each ``evaluation/<split>/``, or at least the test figures of the results."""
    folders = sorted(p for p in (run / "evaluation").glob("*") if p.is_dir())
    summaries = [(p, s) for p in folders if (s := read_summary(p)) is not None]
    for folder, summary in summaries:
        page.heading(f"Evaluation on {folder.name}")
        page.paragraph(f"{summary.get('num_samples', 0):,} samples, each counted once.", soft=True)
        page.cards(headline(summary))
        for told in words_of_calibration(summary, folder.name):
            page.paragraph(told)
        for name, caption in PICTURES.items():
            if (folder / name).is_file():
                page.picture((folder / name).read_bytes(), caption, is_photo=name in PHOTOS)
        page.paragraph(f"All of it: evaluation/{folder.name}/{REPORT}", soft=True)
    if not summaries and (test := _test_figures(results)):
        page.heading("Test")
        page.cards(headline(test))


def _add_details(page: Page, run: Path, results: dict[str, Any]) -> None:
    page.heading("How it was made")
    facts = {
        "data set": results.get("dataset_fingerprint"),
        "final weights": results.get("weights_sha256"),
        "best weights' file": results.get("best_weights_sha256"),
    }
    shown = [(name, value) for name, value in facts.items() if isinstance(value, str)]
    if shown:
        page.table(("what", "sha256"), shown)
    for name in ("config.yaml", "environment.json", "results.json"):
        try:
            text = (run / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            page.paragraph(f"{name} is not there.", soft=True)
        else:
            page.preformatted(text.strip(), folded=name)


def _share(value: float | None) -> str | None:
    return None if value is None else percent(value)


def _dict(results: dict[str, Any], key: str) -> dict[str, Any]:
    value = results.get(key)
    return value if isinstance(value, dict) else {}
