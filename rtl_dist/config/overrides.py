"""``a.b.c=value``, laid over what a config file says."""

from __future__ import annotations

from typing import Any

from rtl_dist.config.convert import REFUSED, Problem, kinds_at
from rtl_dist.config.schema import Config
from rtl_dist.config.yaml_text import YamlFault, is_quoted, read_yaml
from rtl_dist.core.text import brief, did_you_mean, shorten
from rtl_dist.core.urls import is_url, secret_in

_NULLS = ("null", "Null", "NULL", "~")


class Overrides:
    """Overrides laid over a tree of plain values, which is changed; remembers what is from which,
    and those that could not be laid over it."""

    def __init__(self, tree: dict[str, Any], overrides: list[str]) -> None:
        self._refused: list[Problem] = []
        self._assigned: dict[str, str] = {}
        self._made: dict[str, str] = {}
        for override in overrides:
            self._apply(tree, override)

    def cause_of(self, path: str) -> str | None:
        """The override that put the value at a dotted path there, or one that it is within."""
        if path in self._made:
            return self._made[path]
        while path:
            if path in self._assigned:
                return self._assigned[path]
            path = path.rpartition(".")[0]
        return None

    def refused_beside(self, problems: list[Problem]) -> list[Problem]:
        """The overrides that could not be laid over the tree, less those for which the value in
        the way is itself among the problems, as one of the wrong type."""
        wrong = {each.path for each in problems if f"{each.path}: expected " in each.sentence}
        return [each for each in self._refused if each.path not in wrong]

    def _apply(self, tree: dict[str, Any], override: str) -> None:
        given, equals, text = override.partition("=")
        shown = _shown(override)
        if not equals or not given:
            self._refuse(f"{shown} is not an override; write key=value, such as seed=1")
            return
        node: Any = tree
        names, rest = [], given.split(".")
        while True:
            name, rest = rest[0], rest[1:]
            if isinstance(node, list):
                place, rest = _place(node, [name, *rest])
                if place is None:
                    self._refuse(f"{shown}: {_no_place(node, name)}")
                    return
                name = str(place)
            names.append(name)
            if not rest:
                break
            node = self._below(node, names, shown)
            if node is None:
                return
        self._assign(node, names, text, shown)

    def _below(self, node: Any, names: list[str], shown: str) -> Any:
        """The section or list of that path, which is made where there is none; None: no such."""
        name, here = names[-1], ".".join(names)
        if isinstance(node, dict) and node.get(name) is None:
            node[name] = {}
            self._made[here] = shown
        below = node[int(name)] if isinstance(node, list) else node[name]
        if below is not REFUSED and not isinstance(below, dict | list):
            self._refuse(f"{shown}: {here} is not a section", in_the_way=here)
        return below if isinstance(below, dict | list) else None

    def _assign(self, node: Any, names: list[str], text: str, shown: str) -> None:
        path, name = ".".join(names), names[-1]
        try:
            value = _read(text, kinds_at(Config, names))
        except YamlFault as error:
            self._refuse(f"{shown}: the value is not valid YAML: {error}")
            value = REFUSED
        for known in (self._assigned, self._made):
            for below in [key for key in known if f"{key}.".startswith(f"{path}.")]:
                earlier = known.pop(below)
                if known is self._assigned and earlier != shown:
                    self._refuse(f"{shown}: {below} is given twice, before by {earlier}")
        node[int(name) if isinstance(node, list) else name] = value
        self._assigned[path] = shown

    def _refuse(self, sentence: str, *, in_the_way: str = "") -> None:
        self._refused.append(Problem(in_the_way, sentence))


def _place(items: list[Any], names: list[str]) -> tuple[int | None, list[str]]:
    """The position that the first of the names gives in a list, from 0, or the one of the item of
    that name, which may hold dots; and the names that are left."""
    first = names[0]
    if first.isascii() and first.isdecimal() and len(first) < 6 and int(first) < len(items):
        return int(first), names[1:]
    for number, item in enumerate(items):
        own = item.get("name") if isinstance(item, dict) else None
        if isinstance(own, str) and own == ".".join(names[: own.count(".") + 1]):
            return number, names[own.count(".") + 1 :]
    return None, names


def _no_place(items: list[Any], name: str) -> str:
    sentence = f"{brief(name)} is not a position in a list of {len(items)}, counted from 0"
    known = [str(item["name"]) for item in items if isinstance(item, dict) and item.get("name")]
    if not known or name.isdecimal():
        return sentence
    hint = did_you_mean(name, known) or f" (those there: {shorten(known)})"
    return f"{sentence}, and no name in it{hint}"


def _read(text: str, kinds: tuple[Any, ...]) -> Any:
    """What was typed where the schema takes text, else what YAML makes of it.

    Raises:
        YamlFault: the latter is nothing.
    """
    typed = text.strip()
    is_list = list in kinds and typed.startswith("[")
    if str not in kinds or is_list or is_quoted(typed) or typed.startswith("!"):
        return read_yaml(text)
    return None if not typed or (type(None) in kinds and typed in _NULLS) else typed


def _shown(override: str) -> str:
    """As an error names it: a password that a URL may hold belongs into no log."""
    path, _, value = override.partition("=")
    return brief(f"{path}=..." if is_url(value) and secret_in(value) else override)
