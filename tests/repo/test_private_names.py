"""Tests replace things by reference: a private name in a string goes stale unseen."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PRIVATE = re.compile(r"rtl_dist(\.\w+)+[.:](\w+\.)*_[a-zA-Z]\w*")


def private_strings(path: Path) -> set[str]:
    """Private names in the strings of a test: paths, and what ``setattr`` is told to replace."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {match[0] for match in PRIVATE.finditer(node.value)}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            replaced = node.args[1] if node.func.attr == "setattr" and len(node.args) > 1 else None
            name = str(replaced.value) if isinstance(replaced, ast.Constant) else ""
            owner = ast.unparse(node.args[0]) if name else ""
            if re.match(r"_[a-zA-Z]", name) and owner != "os":  # os._exit is for all
                found.add(f"{owner}.{name}")
    return found


def test_no_test_names_what_is_private():
    paths = set(TESTS.rglob("*.py")) - {Path(__file__)}
    found = {str(path.relative_to(TESTS)): private_strings(path) for path in paths}
    assert not {path: names for path, names in found.items() if names}
