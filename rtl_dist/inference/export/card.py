"""README.md of an export for Hugging Face: a model card of what was measured."""

from __future__ import annotations

import html
import json

from rtl_dist import __version__
from rtl_dist.core.tasks import METRICS, MULTI_LABEL, Task
from rtl_dist.core.text import shown
from rtl_dist.evaluation.metrics import compute_metrics, per_class_table, wilson_interval
from rtl_dist.evaluation.predictions import Predictions
from rtl_dist.inference.export.origin import Origin
from rtl_dist.model.folder import LoadedModel

_FEW = 30  # images of a class, below which its figures say little


def card_of(
    loaded: LoadedModel,
    origin: Origin,
    scored: Predictions | None,
    *,
    source: str,
    fingerprint: str,
) -> str:
    """
    Args:
        scored: what the export itself said of labelled images; None: there were none.
        source: where these are from, for people.
        fingerprint: of the export.
    """
    parts = [
        _front_matter(origin),
        f"# {loaded.network.name}: {len(loaded.classes):,} classes\n",
        f"Classes: {', '.join(_cell(name) for name in loaded.classes)}.\n",
        _use(loaded),
        "## Measured\n",
        "Not measured: no labelled images were given.\n"
        if scored is None
        else _measured(scored, source),
        _calibration(loaded),
        _limits(loaded, scored, source),
        _origin(loaded, origin, fingerprint),
    ]
    return "\n".join(parts)


def _front_matter(origin: Origin) -> str:
    licence = origin.licence if origin.base and " " not in origin.licence else "other"
    base = f"base_model: {origin.base}\n" if origin.base else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: image-classification\n"
        f"license: {json.dumps(licence)}\n{base}tags: [timm, image-classification, rtl_dist]\n---\n"
    )


def _use(loaded: LoadedModel) -> str:
    view = loaded.model.preprocessing
    several = ", function_to_apply='sigmoid'" if loaded.task == MULTI_LABEL else ""
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        "classify = pipeline('image-classification', model='THIS FOLDER')\n"
        f"classify('photo.jpg'{several})\n```\n\n"
        "Or `timm.create_model('local-dir:THIS FOLDER', pretrained=True)`, or"
        f" `rtl-dist predict`. Images: short side to {view.image_size / view.crop_pct:.0f} pixels"
        f" (bilinear, antialiased), the middle {view.image_size} x {view.image_size}, mean"
        f" {_numbers(view.mean)}, std {_numbers(view.std)}. Turn a photograph upright by its EXIF"
        " orientation first (`PIL.ImageOps.exif_transpose`): the pipeline does, timm does not.\n"
    )


def _measured(scored: Predictions, source: str) -> str:
    metrics = compute_metrics(scored)
    total = len(scored.labels)
    lines = [
        f"By this export, on {total:,} images: {_cell(source)}. Intervals are of 95 % (Wilson).\n",
        "| metric | value | interval |",
        "|---|---|---|",
    ]
    for key, metric in METRICS.items():
        if key not in metrics or key == "top5":
            continue
        interval = ""
        if metric.is_share:
            low, high = wilson_interval(round(metrics[key] * total), total)
            interval = f"{low:.3f} to {high:.3f}"
        lines.append(f"| {metric.name} | {metrics[key]:.4f} | {interval} |")
    lines += ["", "| class | images | precision | recall | F1 |", "|---|---|---|---|---|"]
    lines += [
        f"| {_cell(row.name)} | {row.num_samples:,} | {row.precision:.3f} | {row.recall:.3f} |"
        f" {row.f1:.3f} |"
        for row in per_class_table(scored)
    ]
    return "\n".join([*lines, ""])


def _calibration(loaded: LoadedModel) -> str:
    fitted = loaded.calibration
    if not fitted.num_samples:
        return "## Calibration\n\nNone was fitted: probabilities are the network's own.\n"
    parts = [
        f"Fitted on {fitted.num_samples:,} images of split {_cell(fitted.split)}, which the weights"
        f" were not trained on: a temperature of {fitted.temperature:.4g}, which is in the weights"
        " of the head here."
    ]
    if fitted.thresholds is not None:
        pairs = zip(loaded.classes, fitted.thresholds, strict=True)
        told = ", ".join(f"{_cell(name)} {value:.3f}" for name, value in pairs)
        parts.append(f"A label is meant from these probabilities on: {told}.")
    if fitted.abstain_below is not None:
        parts.append(f"Below a probability of {fitted.abstain_below:.3f} do not believe it.")
    if fitted.set_quantile is not None and fitted.coverage is not None:
        truth = "all that is true" if loaded.task == MULTI_LABEL else "the true one"
        parts.append(
            f"The most probable class and those of at least {1 - fitted.set_quantile:.6f} are a set"
            f" that is to hold {truth} for {100 * fitted.coverage:g} % of images like those."
        )
    return f"## Calibration\n\n{' '.join(parts)}\n"


def _limits(loaded: LoadedModel, scored: Predictions | None, source: str) -> str:
    told = [
        "It says one of its classes of every image, also of one that shows none of them."
        if loaded.task == Task.SINGLE_LABEL
        else "It knows no label but these, and may give none.",
        "The figures are of images like those that it was measured on; other cameras, places and"
        " times of year give other figures.",
    ]
    if scored is not None and source.startswith(f"split {loaded.calibration.split or 'val'} "):
        told.append(
            "The best weights were chosen, and their probabilities calibrated, by a split of this"
            " name: if it is this one, its figures flatter them."
        )
    rows = [] if scored is None else per_class_table(scored)
    if few := [row for row in rows if row.num_samples < _FEW]:
        names = ", ".join(f"{_cell(row.name)} ({row.num_samples})" for row in few[:20])
        told.append(f"Classes measured on fewer than {_FEW} images: {names}.")
    if rows:
        worst = min(rows, key=lambda row: row.recall)
        told.append(f"It finds {_cell(worst.name)} least: a recall of {worst.recall:.3f}.")
    return "## Limits\n\n" + "\n".join(f"- {each}" for each in told) + "\n"


def _origin(loaded: LoadedModel, origin: Origin, fingerprint: str) -> str:
    lines = [
        "## Where it is from\n",
        f"- Network: {_cell(loaded.network.name)}, of rtl_dist {__version__}.",
        f"- It began with {_cell(origin.weights)}. Their licence: {_cell(origin.licence)}.",
        f"- Trained on data of fingerprint `{_cell(loaded.dataset_fingerprint)}`, whose licence"
        " nobody told.",
        f"- Fingerprint of this export: `{fingerprint}`.\n",
        "## Make it again\n",
    ]
    if not origin.training:
        return "\n".join([*lines, "Unknown: it was exported without the folder of its run.\n"])
    return "\n".join(
        [
            *lines,
            "Pack the same images (`rtl-dist pack`; the fingerprint says whether they are), then"
            " `rtl-dist train --config train.yaml run.dir=RUN data.path=DATASET` with:\n",
            f"```yaml\n{origin.training}```\n",
            "and `rtl-dist export RUN --format hf --out FOLDER`.\n",
        ]
    )


def _cell(text: str) -> str:
    """Names from elsewhere, as text and nothing more."""
    plain = html.escape(shown(text), quote=False)
    for sign in ("\\", "|", "`", "*", "_", "[", "]"):
        plain = plain.replace(sign, f"\\{sign}")
    return plain


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
