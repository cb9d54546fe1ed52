"""``a.b.c=value``, laid over what a config file says."""

from __future__ import annotations

from typing import Any

from rtl_dist.config.convert import REFUSED, Problem
from rtl_dist.config.yaml_text import YamlFault, read_yaml
from rtl_dist.core.urls import is_url, secret_in


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
        path, equals, text = override.partition("=")
        shown = _shown(override)
        if not equals or not path:
            self._refuse(f"{shown} is not an override; write key=value, such as seed=1")
            return
        try:
            value = read_yaml(text)
        except YamlFault as error:
            self._refuse(f"{shown}: the value is not valid YAML: {error}")
            value = REFUSED
        *parents, last = path.split(".")
        node: Any = tree
        for depth, name in enumerate(parents):
            here = ".".join(parents[: depth + 1])
            if isinstance(node, dict) and node.get(name) is None:
                node[name] = {}
                self._made[here] = shown
            elif isinstance(node, list) and not self._is_position(node, name, shown):
                return
            node = node[int(name)] if isinstance(node, list) else node[name]
            if node is REFUSED:
                return
            if not isinstance(node, dict | list):
                self._refuse(f"{shown}: {here} is not a section", in_the_way=here)
                return
        if isinstance(node, list) and not self._is_position(node, last, shown):
            return
        node[int(last) if isinstance(node, list) else last] = value
        for known in (self._assigned, self._made):
            for below in [key for key in known if f"{key}.".startswith(f"{path}.")]:
                del known[below]
        self._assigned[path] = shown

    def _is_position(self, items: list[Any], name: str, shown: str) -> bool:
        is_one = name.isdecimal() and int(name) < len(items)
        if not is_one:
            self._refuse(
                f"{shown}: {name!r} is not a position in a list of {len(items)}, counted from 0"
            )
        return is_one

    def _refuse(self, sentence: str, *, in_the_way: str = "") -> None:
        self._refused.append(Problem(in_the_way, sentence))


def _shown(override: str) -> str:
    """As an error names it: a password that a URL may hold belongs into no log."""
    path, _, value = override.partition("=")
    return repr(f"{path}=..." if is_url(value) and secret_in(value) else override)
