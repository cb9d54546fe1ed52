"""A label member's bytes to what it says: a class number, a class name, or a list of either."""

from __future__ import annotations

import json
import re
from typing import Any

from rtl_dist.core.errors import DataError
from rtl_dist.prepare.indexing.samples import ChoiceNeededError

Value = int | str
Label = Value | tuple[Value, ...]

MAX_LABEL_BYTES = 1 << 20
DEFAULT_FIELDS = ("label", "labels", "class", "cls", "target")
PICKLED = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten", "tenbin", "mp", "msg")

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_MAX_NAME = 1000


def read_label(content: bytes, extension: str, field: str | None) -> tuple[Label, str | None]:
    """(the label, the JSON field it was found in). A tuple is several labels of one sample.

    In ``.json`` numbers and text are told apart; ``.txt`` is a class's name; in anything else
    digits are a class number.

    Raises:
        DataError: it cannot be understood.
        ChoiceNeededError: its JSON has several fields that may be the label.
    """
    kind = extension.rsplit(".", 1)[-1]
    if kind == "json":
        value, found = _field_of(_parsed(content, extension), extension, field)
        return _from_json(value, extension), found
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"its .{extension} is no text") from error
    if kind != "txt" and _NUMBER.fullmatch(text):
        return _number(int(text), extension), None
    return _name(text, extension), None


def _parsed(content: bytes, extension: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its .{extension} is no JSON") from error


def _field_of(content: Any, extension: str, field: str | None) -> tuple[Any, str | None]:
    if field is not None:
        return _looked_up(content, extension, field), field
    if not isinstance(content, dict):  # the file is the label
        return content, None
    found = [name for name in DEFAULT_FIELDS if name in content]
    if len(found) > 1:
        raise ChoiceNeededError("--field", tuple(found))
    if not found:
        raise DataError(
            f"its .{extension} has none of {', '.join(DEFAULT_FIELDS)}: choose with --field, or"
            " another member with --label"
        )
    return content[found[0]], found[0]


def _looked_up(content: Any, extension: str, field: str) -> Any:
    if isinstance(content, dict) and field in content:  # a name may have a dot in it
        return content[field]
    for name in field.split("."):
        if not isinstance(content, dict) or name not in content:
            raise DataError(f"its .{extension} has no field {field}")
        content = content[name]
    return content


def _from_json(value: Any, extension: str) -> Label:
    if not isinstance(value, list):
        return _one_from_json(value, extension)
    labels = tuple(_one_from_json(one, extension) for one in value)
    if len(set(labels)) < len(labels):
        twice = next(one for one in labels if labels.count(one) > 1)
        hint = ": a list of 0 and 1 for each class is not understood" if {0, 1} >= {*labels} else ""
        raise DataError(f"its .{extension} lists class {twice} twice{hint}")
    return labels


def _one_from_json(value: Any, extension: str) -> Value:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        return _name(value.strip(), extension)
    if isinstance(value, int) and not isinstance(value, bool):
        return _number(value, extension)
    raise DataError(f"its .{extension} holds neither a class number, a name nor a list of them")


def _number(value: int, extension: str) -> int:
    if value == -1:
        raise DataError(f"is not labelled: its .{extension} says -1")
    if not 0 <= value < 10**18:
        raise DataError(f"its .{extension} says {str(value)[:20]}, which is no class number")
    return value


def _name(text: str, extension: str) -> str:
    if not text:
        raise DataError(f"is not labelled: its .{extension} is empty")
    if len(text) > _MAX_NAME or not text.isprintable():
        raise DataError(f"its .{extension} is no class name: it is not one line of printable text")
    return text
