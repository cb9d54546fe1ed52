"""Every field of a public dataclass or NamedTuple says what it holds, in a docstring under it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rtl_dist"

FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def is_record(node: ast.ClassDef) -> bool:
    """Whether its fields are all there is to it: a dataclass or a NamedTuple."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    names = {ast.unparse(name).rpartition(".")[2] for name in [*decorators, *node.bases]}
    return bool(names & {"dataclass", "NamedTuple"})


def fields_without_docs(source: str) -> Iterator[str]:
    """``Class.field`` of each public field of a public record that no docstring follows."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_") or not is_record(node):
            continue
        for field, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if field.target.id.startswith("_") or "ClassVar" in ast.unparse(field.annotation):
                continue
            if not (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                yield f"{node.name}.{field.target.id}"


@pytest.mark.parametrize("name", FILES)
def test_every_field_says_what_it_holds(name):
    missing = list(fields_without_docs((PACKAGE / name).read_text(encoding="utf-8")))
    assert not missing, "write a docstring under each, with its unit, shape or dtype"


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("@dataclass\nclass A:\n    x: int\n    '''It.'''\n    y: int\n", ["A.y"]),
        ("@dataclasses.dataclass(frozen=True)\nclass A:\n    x: int = 3\n", ["A.x"]),
        ("class A(NamedTuple):\n    x: int\n    y: int\n    '''It.'''\n", ["A.x"]),
        ("@dataclass\nclass A:\n    '''x: it.'''\n    x: int\n    '''It.'''\n", []),
        ("@dataclass\nclass A:\n    _x: int\n    NAME: ClassVar[str] = ''\n", []),
        ("@dataclass\nclass _A:\n    x: int\n", []),
        ("class A:\n    x: int\n", []),
    ],
)
def test_a_field_without_docs_is_found(source, missing):
    assert list(fields_without_docs(source)) == missing
