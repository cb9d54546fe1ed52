"""YAML and ``a.b.c=value`` overrides to a checked ``Config``; every refusal names the dotted path.

PyYAML reads ``1e-3`` as a string and keeps ``1`` an int in a float field, so values are converted
by the type of the field they are for. Unknown keys are refused with the nearest right one.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from rtl_dist.config.schema import Config
from rtl_dist.core.errors import UserError
from rtl_dist.core.intervals import Duration, Every
from rtl_dist.core.text import did_you_mean

_WRITTEN_AS_TEXT = (Every, Duration)


class _NoKeyTwice(yaml.SafeLoader):
    """``yaml.safe_load``, but a key given twice is refused; PyYAML would forget the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies ``key=value`` overrides to it.

    Raises:
        UserError: no such file, not YAML, an unknown key, a wrong type, an impossible combination.
    """
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_NoKeyTwice)
    except FileNotFoundError:
        raise UserError(f"no config file {path}; shipped ones are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as data: and stages:, found {tree!r}")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, origin=str(path))


def parse_config(tree: dict[str, Any], *, origin: str = "config") -> Config:
    """A checked ``Config`` from plain dicts and lists.

    Raises:
        UserError: see ``load_config``.
    """
    try:
        config: Config = _build(Config, _inherited(tree), "")
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    return config


def _inherited(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree in which a stage's own ``augment`` and ``early_stop`` are whole sections: what they
    do not say is as it is for all stages."""
    stages = tree.get("stages")
    if not isinstance(stages, list):
        return tree
    whole = []
    for stage in stages:
        if isinstance(stage, dict):
            sections = {
                name: {**(tree.get(name) or {}), **stage[name]}
                for name in ("augment", "early_stop")
                if isinstance(stage.get(name), dict) and isinstance(tree.get(name) or {}, dict)
            }
            whole.append({**stage, **sections})
        else:
            whole.append(stage)
    return {**tree, "stages": whole}


def to_dict(config: Any) -> Any:
    """The config as plain YAML types; ``parse_config`` reads it back to an equal config."""
    if isinstance(config, _WRITTEN_AS_TEXT):
        return str(config)
    if dataclasses.is_dataclass(config):
        return {_key(f): to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_dict(item) for item in config]
    return config


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def read_run_config(run: str | Path) -> Config:
    """The resolved config of a run folder."""
    return load_config(Path(run) / "config.yaml")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r} is not an override; write key=value, such as seed=1")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{override!r}: the value is not valid YAML: {reason}") from error
    *parents, last = path.split(".")
    node: Any = tree
    for depth, name in enumerate(parents):
        if isinstance(node, list):
            node = node[_list_position(node, name, override)]
        elif isinstance(node, dict):
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise UserError(f"{override!r}: {'.'.join(parents[: depth + 1])} is not a section")
    if isinstance(node, list):
        node[_list_position(node, last, override)] = value
    else:
        node[last] = value


def _list_position(items: list[Any], name: str, override: str) -> int:
    if not name.isdecimal() or int(name) >= len(items):
        raise UserError(f"{override!r}: {name!r} is not a position in a list of {len(items)}")
    return int(name)


def _key(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("key", field.name))


def _build(section: type, tree: Any, path: str) -> Any:
    where = path or "config"
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected a section with keys, found {tree!r}")
    hints = typing.get_type_hints(section)
    fields = {_key(field): field for field in dataclasses.fields(section)}
    for key in tree:
        if key not in fields:
            raise UserError(
                f"unknown key {_join(path, str(key))}{_nearest(str(key), list(fields))}"
            )
    values = {}
    for key, field in fields.items():
        if key in tree:
            values[field.name] = _convert(hints[field.name], tree[key], _join(path, key))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{_join(path, key)}: is required")
    try:
        return section(**values)
    except ValueError as error:
        raise UserError(_join(path, str(error))) from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    """``value`` as an instance of the annotated type, or a ``UserError``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind not in _WRITTEN_AS_TEXT:
        return _build(kind, value, path)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is Literal:
        # YAML reads no and off as False
        if value is False and "no" in arguments:
            return "no"
        if value is False and "off" in arguments:
            return "off"
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise UserError(f"{path}: must be one of {', '.join(map(str, arguments))}; found {value!r}")
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{path}: expected a list, found {value!r}")
        return [_convert(arguments[0], item, _join(path, str(i))) for i, item in enumerate(value)]
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise UserError(f"{path}: expected a list of {len(arguments)} numbers, found {value!r}")
        return tuple(_convert(a, v, path) for a, v in zip(arguments, value, strict=True))
    return _convert_scalar(kind, value, path)


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    refusals = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _convert(argument, value, path)
        except UserError as error:
            refusals.append(str(error).removeprefix(f"{path}: "))
    if len(refusals) == 1 and refusals[0].startswith(path):
        raise UserError(refusals[0])  # of a key within
    raise UserError(f"{path}: " + "; or ".join(refusals))


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if kind in _WRITTEN_AS_TEXT and isinstance(value, str):
        try:
            return kind.parse(value)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if kind in (int, bool, str) and type(value) is kind:
        return value
    names = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        Every: "something like '1 epoch'",
        Duration: "something like '30s', '90 minutes' or '11.5h'",
    }
    raise UserError(f"{path}: expected {names[kind]}, found {value!r}")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _nearest(key: str, known: list[str]) -> str:
    return did_you_mean(key, known) or f"; known here: {', '.join(known)}"
