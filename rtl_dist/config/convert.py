"""Typed sections from the plain values of YAML, and back.

PyYAML reads ``1e-3`` as a string and keeps ``1`` an int in a float field, so values are converted
by the type of the field they are for. Nothing stops at the first mistake: each is collected, and
what cannot be judged because of another is left alone.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rtl_dist.config.checks import SectionError
from rtl_dist.config.meant import which_is_meant
from rtl_dist.config.places import place_at
from rtl_dist.core.intervals import Duration, Every
from rtl_dist.core.text import brief, nearest

REFUSED: Any = object()
"""Stands for a value of which is already said that it is wrong."""

_WRITTEN_AS_TEXT = (Every, Duration)
_MOST_UNKNOWN = 20  # keys of a section that are told one by one
_MOST_ITEMS = 100  # of a list
_LONGEST_TEXT = 4000
_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, ends of lines
_LEAST, _LARGEST = 1e-30, 1e30  # of a number that is not 0: beyond them float32 ends
_TYPE_NAMES = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    Every: "something like '1 epoch'",
    Duration: "something like '30s', '90 minutes' or '11.5h'; a number alone has no unit",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config."""

    path: str
    """The dotted path at fault, as an override takes it."""
    sentence: str
    """What to say of it; names the path."""
    beside: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    """The paths of all that was looked at, itself included; empty where only its own was."""


def to_dict(config: Any) -> Any:
    """The config as plain YAML types; ``parse_config`` reads it back to an equal config."""
    if isinstance(config, _WRITTEN_AS_TEXT):
        return str(config)
    if dataclasses.is_dataclass(config):
        return {_key(f): to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_dict(item) for item in config]
    return config


def build(section: type, tree: Any, path: str, problems: list[Problem]) -> Any:
    """The section that ``tree`` describes, or ``REFUSED`` and what is wrong put to ``problems``."""
    if tree is None:
        tree = {}
    hints = typing.get_type_hints(section, include_extras=True)
    fields = {_key(field): field for field in dataclasses.fields(section)}
    if not isinstance(tree, dict):
        such = f"its first key is {_join(path, next(iter(fields)))}"
        return _refuse(problems, path, f"expected a section with keys, found {brief(tree)}; {such}")
    in_doubt = _refuse_unknown(tree, list(fields), path, problems)
    values = {}
    for key, field in fields.items():
        if key in tree:
            value = _convert(hints[field.name], tree[key], _join(path, key), problems)
            if value is not REFUSED:
                values[field.name] = value
                continue
        elif not _is_required(field):
            continue
        elif key not in in_doubt:
            _refuse(problems, _join(path, key), "is required")
        in_doubt.add(key)
        if _is_required(field):
            values[field.name] = _stand_in(hints[field.name])
    try:
        built = section(**values)
    except SectionError as error:
        for failure in error.failures:
            if not failure.keys & in_doubt:
                key, _, reason = failure.message.partition(": ")
                beside = frozenset(_join(path, key) for key in failure.keys)
                _refuse(problems, _join(path, key), reason, beside)
        return REFUSED
    return REFUSED if in_doubt else built


def _refuse(
    problems: list[Problem], path: str, reason: str, beside: frozenset[str] = frozenset()
) -> Any:
    problems.append(Problem(path, f"{path or 'config'}: {reason}", beside))
    return REFUSED


def _refuse_unknown(
    tree: dict[Any, Any], known: list[str], path: str, problems: list[Problem]
) -> set[str]:
    """The keys that are in doubt: the unknown ones, and those that they may have been meant for."""
    in_doubt = set()
    unknown = [key for key in map(str, tree) if key not in known]
    of_config = path != "" or "stages" in known
    for key in unknown[:_MOST_UNKNOWN]:
        shown = key if key.isprintable() and len(key) <= 100 else brief(key)
        where = _join(path, shown)
        hint = which_is_meant(key, known, of_config=of_config)
        problems.append(Problem(_join(path, key), f"unknown key {where}{hint}"))
        meant = nearest(key, known)
        in_doubt |= {key} if meant is None or meant in tree else {key, meant}
    if more := unknown[_MOST_UNKNOWN:]:
        told = f"{path or 'config'}: {len(more):,} more unknown keys"
        problems.append(Problem(path, told))
    return in_doubt | set(unknown)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _stand_in(kind: Any) -> Any:
    """Some value for a required key that has none, so that the checks of the others can run."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        required = [field.name for field in dataclasses.fields(kind) if _is_required(field)]
        return typing.cast(type, kind)(**{name: _stand_in(hints[name]) for name in required})
    if get_origin(kind) in (Union, types.UnionType):
        return _stand_in(get_args(kind)[0])
    return _stand_in(get_args(kind)[0]) if get_origin(kind) is Annotated else kind()


def _convert(kind: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    """``value`` as an instance of the annotated type, or ``REFUSED``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if value is REFUSED:
        return REFUSED
    if origin is Annotated:
        text = _convert(arguments[0], value, path, problems)
        return REFUSED if text is REFUSED else _place(text, path, problems)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in _WRITTEN_AS_TEXT:
        return build(kind, value, path, problems)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path, problems)
    if origin is Literal:
        # YAML reads no and off as False
        if value is False and "no" in arguments:
            return "no"
        if value is False and "off" in arguments:
            return "off"
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        known = ", ".join(map(str, arguments))
        return _refuse(problems, path, f"must be one of {known}; found {brief(value)}")
    if origin is list:
        if not isinstance(value, list):
            return _refuse(problems, path, f"expected a list, found {brief(value)}")
        if len(value) > _MOST_ITEMS:
            many = f"must have at most {_MOST_ITEMS} items, not {len(value):,}"
            return _refuse(problems, path, many)
        items = [
            _convert(arguments[0], item, _join(path, str(i)), problems)
            for i, item in enumerate(value)
        ]
        return REFUSED if REFUSED in items else items
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            expected = f"expected a list of {len(arguments)} numbers"
            return _refuse(problems, path, f"{expected}, found {brief(value)}")
        pairs = zip(arguments, value, strict=True)
        items = [_convert(argument, item, path, problems) for argument, item in pairs]
        return REFUSED if REFUSED in items else tuple(items)
    return _convert_scalar(kind, value, path, problems)


def _convert_union(
    arguments: tuple[Any, ...], value: Any, path: str, problems: list[Problem]
) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [argument for argument in arguments if argument is not type(None)]
    if len(kinds) == 1:
        return _convert(kinds[0], value, path, problems)
    reasons = []
    for kind in kinds:
        found: list[Problem] = []
        converted = _convert(kind, value, path, found)
        if converted is not REFUSED:
            return converted
        reasons.append(", ".join(each.sentence.removeprefix(f"{path}: ") for each in found))
    return _refuse(problems, path, "; or ".join(reasons))


def _convert_scalar(kind: Any, value: Any, path: str, problems: list[Problem]) -> Any:
    if kind in _WRITTEN_AS_TEXT and isinstance(value, str):
        try:
            return kind.parse(value)
        except ValueError as error:
            return _refuse(problems, path, str(error))
    if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if number == 0 or _LEAST <= abs(number) <= _LARGEST:
            return number
        if math.isfinite(number):
            reason = f"must be 0 or lie in {_LEAST} to {_LARGEST}, not {number}"
            return _refuse(problems, path, reason)
    if kind is str and isinstance(value, str):
        odd = _unwritable(value)
        return value if odd is None else _refuse(problems, path, odd)
    if kind in (int, bool) and type(value) is kind:
        return value
    return _refuse(problems, path, f"expected {_TYPE_NAMES[kind]}, found {brief(value)}")


def _unwritable(text: str) -> str | None:
    """Why a text can be no name and no line of a file; None if it can."""
    if len(text) > _LONGEST_TEXT:
        return f"has {len(text):,} characters; at most {_LONGEST_TEXT:,} are taken"
    odd = next((each for each in text if unicodedata.category(each) in _UNWRITABLE), None)
    return None if odd is None else f"holds {odd!r}, which no name and no line can have"


def _place(text: str, path: str, problems: list[Problem]) -> Any:
    try:
        return place_at(text)
    except ValueError as error:
        return _refuse(problems, path, str(error))


def kinds_at(section: type, names: Sequence[str]) -> tuple[Any, ...]:
    """What the value at a dotted path may be: types, ``list`` and ``tuple`` for those of any items;
    nothing where no such key is."""
    kinds: tuple[Any, ...] = (section,)
    for name in names:
        below: list[Any] = []
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                hints = typing.get_type_hints(kind)
                below += [hints[f.name] for f in dataclasses.fields(kind) if _key(f) == name]
            elif get_origin(kind) is list and name.isdecimal():
                below += get_args(kind)[:1]
        kinds = tuple(each for kind in below for each in _alternatives(kind))
    return tuple(get_origin(kind) or kind for kind in kinds)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
