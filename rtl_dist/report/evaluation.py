"""Everything that is written of one evaluation: tables, pictures and the page that shows them.

``write_evaluation`` is used by ``rtl-dist evaluate`` and, for the final test, by the training job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rtl_dist.core.files import write_csv, write_json, write_text
from rtl_dist.core.tasks import MULTI_LABEL
from rtl_dist.core.text import shown as shown_name
from rtl_dist.data.format.split import Split
from rtl_dist.evaluation.confusion import Confusion, confusion_of
from rtl_dist.evaluation.metrics import (
    ClassScores,
    multi_label_confusion,
    per_class_table,
)
from rtl_dist.evaluation.predictions import Predictions, blocks_of_rows
from rtl_dist.evaluation.reliability import reliability
from rtl_dist.model.classifier import Classifier
from rtl_dist.report import evaluation_plots as plots
from rtl_dist.report.figure import draw
from rtl_dist.report.html import Cell, Page, percent
from rtl_dist.report.mistakes import MISTAKES_SHOWN, Mistake, mistakes_picture
from rtl_dist.report.summary import headline, summary_of, words_of_calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The pictures of an evaluation in the order in which pages show them, with their captions.
PICTURES = {
    "confusion_matrix.png": "Which classes are taken for which.",
    "precision_recall.png": "Precision against recall of each class against all others.",
    "calibration.png": "How far a stated confidence can be believed.",
    "mistakes.png": "The most confident mistakes: what the model said, and what the picture is."
    " Beside each is what the network saw of it: orange speaks for its answer, blue against it.",
}

# Up to this many classes the confusion matrix is written as a matrix.
MATRIX_CLASSES = 2000

# Of those, what shows photographs and not figures.
PHOTOS = ("mistakes.png",)

_ROWS_SHOWN = 40


@dataclass(frozen=True, kw_only=True, eq=False)
class _Verdicts:
    """What to say of each of N samples."""

    truth: list[str]
    """The class's name; multi-label: the names of all that it has, joined by ``|``."""
    predicted: list[str]
    """The same of the prediction."""
    confidence: np.ndarray
    """float64 (N,): the predicted class's probability; multi-label: that of the surest wrong
    decision, or where all are right of the least sure one."""
    right: np.ndarray
    """bool (N,); multi-label: whether all labels are."""
    label: np.ndarray
    """int64 (N,): the class that ``confidence`` is of."""
    was_said: np.ndarray
    """bool (N,): whether that class was said; multi-label: it may be missed."""


def write_evaluation(
    predictions: Predictions,
    out: Path,
    *,
    split: Split,
    metrics: dict[str, float],
    title: str,
    model: Classifier | None = None,
) -> None:
    """Writes an evaluation's files into ``out``, the page ``report.html`` last.

    ``metrics.json`` (see ``summary_of``), ``per_class.csv``, ``confusion_matrix.csv`` (of many
    classes a list of its cells; multi-label: 2x2 counts a class), ``predictions.csv``,
    ``mistakes.csv`` (most confident first; both with the file that was packed, if known), one
    picture for each of ``PICTURES`` (one that cannot be drawn is left out, which is said),
    ``report.html``. Several labels of a sample are joined by ``|``.

    Args:
        model: that was evaluated, for the heatmaps of its mistakes; None: there are none.

    Raises:
        DataError: a shard of the split cannot be opened.
        ValueError: the predictions are not of this split.
    """
    if predictions.num_samples != split.num_samples:
        raise ValueError(
            f"{predictions.num_samples} predictions for {split.num_samples} samples of {split.name}"
        )
    verdicts, keys = _judge(predictions), list(split.keys())
    files = split.files_of(dict(enumerate(keys)))
    wrong = np.flatnonzero(~verdicts.right)
    wrong = wrong[np.argsort(-verdicts.confidence[wrong], kind="stable")]
    table = per_class_table(predictions)
    summary = summary_of(predictions, metrics, int(verdicts.right.sum()))

    write_json(out / "metrics.json", summary)
    write_csv(
        out / "per_class.csv",
        list(asdict(table[0])),
        [tuple(asdict(row).values()) for row in table],
    )
    header = ("sample", "key", "truth", "predicted", "confidence", "file")
    for name, samples in (("predictions", range(len(keys))), ("mistakes", wrong.tolist())):
        write_csv(
            out / f"{name}.csv",
            header,
            (
                (
                    i,
                    keys[i],
                    verdicts.truth[i],
                    verdicts.predicted[i],
                    f"{verdicts.confidence[i]:.6f}",
                    files.get(i),
                )
                for i in samples
            ),
        )

    before = predictions.uncalibrated
    pairs, confusion_figure = _write_confusion(predictions, out)
    surest = wrong[:MISTAKES_SHOWN].tolist()
    figures: dict[str, Callable[[], Figure | bytes]] = {
        "confusion_matrix.png": confusion_figure,
        "precision_recall.png": lambda: plots.precision_recall_figure(predictions, table),
        "calibration.png": lambda: plots.calibration_figure(
            reliability(predictions),
            predictions.task,
            before=reliability(before) if before else None,
        ),
        "mistakes.png": lambda: mistakes_picture(
            split,
            [_mistake(predictions, verdicts, sample) for sample in surest],
            model,
            task=predictions.task,
        ),
    }
    drawn = {name: draw(out / name, make) for name, make in figures.items()}

    page = Page(title, f"Split {split.name}, {split.num_samples:,} samples, each counted once.")
    page.cards(headline(summary))
    for told in words_of_calibration(summary, split.name):
        page.paragraph(told)
    for name, caption in PICTURES.items():
        page.picture(drawn[name], caption, is_photo=name in PHOTOS)
        if name == "confusion_matrix.png" and pairs:
            page.heading("Most frequent confusions", 3)
            page.table(("truth", "predicted", "samples", "share of the true class"), pairs)
        if name == "precision_recall.png":
            _add_class_table(page, table)
        if name == "mistakes.png":
            _add_mistakes(page, verdicts, files, surest)
    page.heading("Files beside this page")
    page.paragraph(
        "metrics.json, per_class.csv, confusion_matrix.csv, predictions.csv (every sample) and"
        f" mistakes.csv ({len(wrong):,} samples, the most confident first)."
    )
    write_text(out / "report.html", page.render())


def _judge(predictions: Predictions) -> _Verdicts:
    classes, said, labels = predictions.classes, predictions.predicted, predictions.labels
    if predictions.task != MULTI_LABEL:
        return _Verdicts(
            truth=[classes[i] for i in labels],
            predicted=[classes[i] for i in said],
            confidence=predictions.of_single_label.confidence.astype(np.float64),
            right=said == labels,
            label=said,
            was_said=np.ones(len(said), dtype=bool),
        )
    scores, confidence, right, label = predictions.of_multi_label, [], [], []
    for rows in blocks_of_rows(scores.shape):
        sure = np.where(said[rows], scores[rows], 1 - scores[rows]).astype(np.float64)
        wrong = said[rows] != (labels[rows] == 1)
        right.append(~wrong.any(axis=1))
        surest_wrong = np.where(wrong, sure, 0.0).argmax(axis=1)
        label.append(np.where(right[-1], sure.argmin(axis=1), surest_wrong))
        confidence.append(np.take_along_axis(sure, label[-1][:, None], axis=1)[:, 0])
    return _Verdicts(
        truth=["|".join(classes[i] for i in np.flatnonzero(row)) for row in labels],
        predicted=["|".join(classes[i] for i in np.flatnonzero(row)) for row in said],
        confidence=np.concatenate(confidence),
        right=np.concatenate(right),
        label=np.concatenate(label),
        was_said=said[np.arange(len(said)), np.concatenate(label)],
    )


def _mistake(predictions: Predictions, verdicts: _Verdicts, sample: int) -> Mistake:
    return Mistake(
        sample=sample,
        truth=verdicts.truth[sample],
        predicted=verdicts.predicted[sample],
        confidence=float(verdicts.confidence[sample]),
        label=int(verdicts.label[sample]),
        label_name=predictions.classes[int(verdicts.label[sample])],
        was_said=bool(verdicts.was_said[sample]),
    )


def _write_confusion(
    predictions: Predictions, out: Path
) -> tuple[list[tuple[Cell, ...]], Callable[[], Figure]]:
    """The confusion table; returns the most frequent confusions (single-label), and the picture."""
    classes = predictions.classes
    if predictions.task == MULTI_LABEL:
        counts = multi_label_confusion(predictions)
        header = ("class", "true_negative", "false_positive", "false_negative", "true_positive")
        rows = ((name, *cell.ravel().tolist()) for name, cell in zip(classes, counts, strict=True))
        write_csv(out / "confusion_matrix.csv", header, rows)
        return [], lambda: plots.outcome_figure(counts, classes)
    confusion = confusion_of(predictions)
    _write_counts(confusion, classes, out / "confusion_matrix.csv")
    shares, wrong = confusion.shares, np.flatnonzero(confusion.truth != confusion.predicted)
    pairs: list[tuple[Cell, ...]] = [
        (
            classes[confusion.truth[cell]],
            classes[confusion.predicted[cell]],
            int(confusion.counts[cell]),
            percent(shares[cell]),
        )
        for cell in wrong[np.argsort(-confusion.counts[wrong], kind="stable")[:10]]
    ]
    return pairs, lambda: plots.confusion_figure(confusion, classes)


def _write_counts(confusion: Confusion, classes: Sequence[str], path: Path) -> None:
    """The matrix; with many classes only its cells that are not 0, one a row."""
    if len(classes) <= MATRIX_CLASSES:
        counts = confusion.matrix().tolist()
        rows = ((name, *row) for name, row in zip(classes, counts, strict=True))
        write_csv(path, (r"truth\predicted", *classes), rows)
        return
    cells = zip(confusion.truth, confusion.predicted, confusion.counts, strict=True)
    listed = ((classes[truth], classes[said], count) for truth, said, count in cells)
    write_csv(path, ("truth", "predicted", "samples"), listed)


def _add_mistakes(
    page: Page, verdicts: _Verdicts, files: dict[int, str], samples: list[int]
) -> None:
    """The mistakes of the picture by the names of their files, where these are known."""
    rows = [
        (
            shown_name(files[i]),
            verdicts.truth[i],
            verdicts.predicted[i],
            percent(float(verdicts.confidence[i])),
        )
        for i in samples
        if i in files
    ]
    if rows:
        page.heading("The same mistakes by file", 3)
        page.table(("file", "truth", "predicted", "confidence"), rows)


def _add_class_table(page: Page, table: Sequence[ClassScores]) -> None:
    page.heading("Classes", 3)
    rows = table
    if len(table) > _ROWS_SHOWN:
        rows = sorted((r for r in table if r.num_samples), key=lambda r: r.f1)[:_ROWS_SHOWN]
        page.paragraph(
            f"The {len(rows)} of {len(table):,} classes with the lowest F1; per_class.csv has all.",
            soft=True,
        )
    page.table(
        ("class", "samples", "precision", "recall", "F1", "average precision"),
        [(r.name, r.num_samples, r.precision, r.recall, r.f1, r.average_precision) for r in rows],
    )
