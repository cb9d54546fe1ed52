"""YAML as configs are written in it: no key twice, and faults that say where they are."""

from __future__ import annotations

from typing import Any

import yaml


class YamlFault(ValueError):
    """A text that is no YAML, or has a key twice: where, and what is wrong there."""


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


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text; None of an empty one. Raises YamlFault."""
    try:
        return yaml.load(text, Loader=_NoKeyTwice)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise YamlFault(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise YamlFault(" ".join(str(error).split())) from error
