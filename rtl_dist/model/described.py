"""What the ``config.json`` of a model folder says, checked before anything is built of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from rtl_dist import __version__
from rtl_dist.config import DataConfig, ModelConfig, Precision, parse_section
from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import Task
from rtl_dist.core.text import brief
from rtl_dist.model.calibration import Calibration

_MOST_BYTES = 100_000_000  # the names of a million classes


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model as its folder describes it."""

    model: ModelConfig
    """The network, without weights."""
    data: DataConfig
    """How images reach it; of no data set."""
    classes: tuple[str, ...]
    """Names, in the order of the scores."""
    task: Task
    """Of the data that it was trained on."""
    dataset_fingerprint: str
    """Of the data set that it was trained on."""
    precision: Precision
    """That it was trained in."""
    mean_std: tuple[tuple[float, ...], tuple[float, ...]]
    """Of values in 0 to 1, one number a channel each."""
    calibration: Calibration
    """How its scores are read; of a model that was not calibrated: as they are."""


class _Foreign(ValueError):
    """Something that we write is not there, or not as we write it."""


def read_description(where: Path) -> Described:
    """
    Raises:
        UserError: it cannot be read, was not written by rtl-dist or is damaged.
    """
    try:
        if where.stat().st_size > _MOST_BYTES:
            raise _Foreign(f"it has more than {_MOST_BYTES:,} bytes")
        text = where.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{where} was not written by rtl-dist ({reason})") from error
    return parse_description(text, where)


def parse_description(text: str, where: Path) -> Described:
    """
    Args:
        text: JSON, as ``describe_model`` makes it.
        where: it is from, for errors.

    Raises:
        UserError: it was not written by rtl-dist, is damaged or is of another version.
    """
    try:
        return _parsed(text, where)
    except UserError as error:
        version = _version_in(text)
        if version in ("", __version__):
            raise
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{where} was written by rtl-dist {version} and is not understood by this one,"
            f" {__version__}: use that version ({reason})"
        ) from error


def _version_in(text: str) -> str:
    """The version that wrote a description; empty: it does not say."""
    try:
        version = json.loads(text)["rtl_dist"]["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return brief(version).strip("'")


def _parsed(text: str, where: Path) -> Described:
    try:
        content = _section(json.loads(text), "it")
        ours = _section(content.get("rtl_dist"), "rtl_dist")
        view = _section(content.get("pretrained_cfg"), "pretrained_cfg")
        model = _section(ours.get("model"), "rtl_dist.model")
        channels, image_size, _ = _list(view.get("input_size"), int, "input_size", length=3)
        classes = tuple(_list(content.get("label_names"), str, "label_names"))
        if len(set(classes)) != len(classes) or not classes:
            raise _Foreign("label_names must name each class once")
        looks = {"image_size": image_size, "crop_pct": view.get("crop_pct"), "channels": channels}
        task = _one_of(ours.get("task"), tuple(Task), "rtl_dist.task")
        described = Described(
            model=parse_section(
                ModelConfig, {**model, "weights": "none"}, origin=f"{where}: rtl_dist.model"
            ),
            data=parse_section(
                DataConfig, {"path": "", **looks}, origin=f"{where}: pretrained_cfg"
            ),
            classes=classes,
            task=task,
            dataset_fingerprint=_text(ours.get("dataset_fingerprint"), "dataset_fingerprint"),
            precision=_one_of(ours.get("precision"), get_args(Precision), "rtl_dist.precision"),
            mean_std=(
                _per_channel(view.get("mean"), channels, "mean"),
                _per_channel(view.get("std"), channels, "std"),
            ),
            calibration=_calibration(ours.get("calibration", {}), task, len(classes)),
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} was not written by rtl-dist ({error})") from error
    if min(described.mean_std[1]) <= 0:
        raise UserError(f"{where} was not written by rtl-dist (std must be above 0)")
    return described


def _section(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Foreign(f"{name} is no section with keys but {brief(value)}")
    return value


def _list(value: Any, kind: type, name: str, *, length: int | None = None) -> list[Any]:
    is_one = isinstance(value, list) and all(type(item) is kind for item in value)
    if not is_one or (length is not None and len(value) != length):
        count = "" if length is None else f" of {length}"
        raise _Foreign(f"{name} is no list{count} of {kind.__name__} but {brief(value)}")
    return list(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Foreign(f"{name} is no text but {brief(value)}")
    return value


def _one_of(value: Any, known: tuple[Any, ...], name: str) -> Any:
    found = next((each for each in known if isinstance(value, str) and each == value), None)
    if found is None:
        raise _Foreign(f"{name} is none of {', '.join(map(str, known))} but {brief(value)}")
    return found


def _per_channel(value: Any, channels: int, name: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    is_right = all(
        isinstance(each, int | float) and not isinstance(each, bool) and abs(each) <= 1e3
        for each in numbers
    )
    if len(numbers) != channels or not is_right or not all(map(math.isfinite, numbers)):
        raise _Foreign(f"{name} is no number for each of {channels} channels but {brief(value)}")
    return tuple(map(float, numbers))


# The bounds of what is fitted; of a temperature they are wider than the fit's own.
_BOUNDS = {
    "temperature": (1e-3, 1e3),
    "num_samples": (0, 2**53),
    **dict.fromkeys(
        ("precision_target", "abstain_below", "set_quantile", "coverage"),
        (0, 1),
    ),
}


def _calibration(value: Any, task: Task, num_classes: int) -> Calibration:
    """
    Raises:
        _Foreign: it is none that was fitted for such a model.
    """
    name = "rtl_dist.calibration"
    values = dict(_section(value, name))
    known = {field.name for field in fields(Calibration)}
    if unknown := [key for key in values if key not in known]:
        raise _Foreign(f"{name} has the unknown key {brief(unknown[0])}")
    for key, (least, largest) in _BOUNDS.items():
        if key in values:
            values[key] = _number(values[key], least, largest, f"{name}.{key}")
    if type(values.get("num_samples", 0)) is not int:
        raise _Foreign(f"{name}.num_samples is no whole number but {values['num_samples']}")
    for key in ("split", "dataset_fingerprint"):
        _text(values.get(key, ""), f"{name}.{key}")
    if "thresholds" in values:
        found = values["thresholds"]
        if not isinstance(found, list) or len(found) != num_classes:
            raise _Foreign(f"{name}.thresholds is no number for each class but {brief(found)}")
        values["thresholds"] = tuple(_number(each, 0, 1, f"{name}.thresholds") for each in found)
    other = "abstain_below" if task == Task.MULTI_LABEL else "thresholds"
    if other in values:
        raise _Foreign(f"{name}.{other} goes with no {task} model")
    return Calibration(**values)


def _number(value: Any, least: float, largest: float, name: str) -> int | float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= largest:
        raise _Foreign(f"{name} is no number in {least:g} to {largest:g} but {brief(value)}")
    return value
