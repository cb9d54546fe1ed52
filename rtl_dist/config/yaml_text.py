"""YAML as configs are written in it: plain values, in bounded memory and time.

PyYAML finds the structure of a text; what its scalars are is decided here, by YAML 1.2's rules
where 1.1's surprise: whole numbers are decimal (1.1 reads ``010`` as 8), ``1:30`` is no number, and
a date is text. A key is always the text that stands there. No text can grow: aliases are followed
only as far as ``_MOST_VALUES``, and other tags than those of plain values are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.scanner import Scanner

from rtl_dist.core.text import brief

MOST_CHARACTERS = 200_000
_MOST_VALUES = 10_000  # a run's config of a hundred stages has 4,000
_DEEPEST = 20
_MOST_DIGITS = 40  # more make no number of anything; Python reads 4,300

_CORE = "tag:yaml.org,2002:"
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **{form: True for word in ("true", "yes", "on") for form in (word, word.title(), word.upper())},
    **{
        form: False
        for word in ("false", "no", "off")
        for form in (word, word.title(), word.upper())
    },
}
_WHOLE = re.compile(rf"[-+]?[0-9](?:_?[0-9]){{0,{_MOST_DIGITS - 1}}}")
_NUMBER = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?|\.inf|\.Inf"
    r"|\.INF)|\.nan|\.NaN|\.NAN"
)


class YamlFault(ValueError):
    """A text that is no YAML, has a key twice or is not for configs: where, and what is wrong."""


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text; None of an empty one. Raises YamlFault."""
    if len(text) > MOST_CHARACTERS:
        raise YamlFault(
            f"it has {len(text):,} characters, and no config more than {MOST_CHARACTERS:,}"
        )
    try:
        node = _Structure(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise YamlFault(f"{where}{_short(error.problem or error.context)}") from error
    except yaml.YAMLError as error:
        raise YamlFault(_short(error)) from error
    except (ValueError, OverflowError) as error:  # PyYAML's, of an escape that is no character
        raise YamlFault(_short(error)) from error
    return None if node is None else _Values().of(node)


def is_quoted(text: str) -> bool:
    """Whether a YAML text that is one scalar has it in quotes."""
    return text.lstrip()[:1] in ("'", '"')


def write_yaml(value: Any) -> str:
    """Plain values as a text of which ``read_yaml`` makes the same again."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """``yaml.safe_dump``, but what only our own reading would take for a number is quoted too."""


_Dumper.add_implicit_resolver(
    f"{_CORE}int", re.compile(rf"^(?:{_WHOLE.pattern})$"), list("-+0123456789")
)


class _Structure(Reader, Scanner, Parser, Composer):
    """The nodes of a text, each scalar's tag as it is written; None of one without."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        self._depth = self._count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES or self._depth >= _DEEPEST:
            mark = self.peek_event().start_mark
            what = f"more than {_MOST_VALUES:,} values"
            if self._depth >= _DEEPEST:
                what = f"nested more than {_DEEPEST} deep"
            raise yaml.composer.ComposerError(None, None, what, mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    # what PyYAML's own resolver would make of a scalar is decided by ``_scalar``

    def descend_resolver(self, parent: Any, index: Any) -> None:
        pass

    def ascend_resolver(self) -> None:
        pass

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str | None:
        return None


class _Values:
    """Nodes to plain values."""

    def __init__(self) -> None:
        self._count = 0
        self._within: list[yaml.Node] = []

    def of(self, node: yaml.Node) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise _fault(node, f"its aliases unfold to more than {_MOST_VALUES:,} values")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if node in self._within:
            raise _fault(node, "an alias within what it stands for")
        self._within.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                _require_tag(node, "seq")
                return [self.of(item) for item in node.value]
            _require_tag(node, "map")
            return self._mapping(node)
        finally:
            self._within.pop()

    def _mapping(self, node: yaml.Node) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _fault(key_node, "a key must be text")
            self._count += 1
            key = key_node.value
            if key == "<<" and key_node.style is None:
                for each in self._sources(value_node):
                    merged = each | merged  # the first of several counts
            elif key in own:
                raise _fault(key_node, f"the key {brief(key)} is given twice")
            else:
                own[key] = self.of(value_node)
        return merged | own

    def _sources(self, node: yaml.Node) -> list[dict[str, Any]]:
        """What ``<<`` merges into a section: another section, or a list of such."""
        value = self.of(node)
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(source, dict) for source in sources):
            raise _fault(node, "<<: takes a section or a list of sections")
        return sources


def _scalar(node: yaml.ScalarNode) -> Any:
    tag, text = node.tag, str(node.value)
    if tag is None or tag == "!":
        is_plain = node.style is None and tag is None
        return _plain(text) if is_plain else text
    if tag == f"{_CORE}str":
        return text
    value = _plain(text)
    kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool, "null": type(None)}
    kind = kinds.get(tag.removeprefix(_CORE)) if tag.startswith(_CORE) else None
    if kind is None:
        raise _fault(node, f"the tag {brief(tag)} is not for configs")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise _fault(node, f"{brief(text)} is no !!{tag.removeprefix(_CORE)}")
    return value


def _plain(text: str) -> Any:
    """What a scalar without quotes is."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _require_tag(node: yaml.Node, kind: str) -> None:
    if node.tag not in (None, "!", f"{_CORE}{kind}"):
        raise _fault(node, f"the tag {brief(node.tag)} is not for configs")


def _fault(node: yaml.Node, what: str) -> YamlFault:
    mark = node.start_mark
    return YamlFault(f"line {mark.line + 1}, column {mark.column + 1}: {what}")


def _short(error: object) -> str:
    words = " ".join(str(error).split())
    return words if len(words) <= 200 else f"{words[:200]}..."
