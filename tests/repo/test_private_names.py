"""Tests name what they replace by reference, and nothing private: names in strings go stale unseen."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PRIVATE = re.compile(r"rtl_dist(\.\w+)+[.:](\w+\.)*_[a-zA-Z]\w*")

# What is left of earlier days, by file. It only shrinks: what is mended leaves this list.
LEFT = {
    "commands/test_find_lr.py": {"rtl_dist.training.lr_finder._STEPS"},
    "conftest.py": {"FeatureMaker._write_blocks"},
    "features/test_feature_store.py": {"rtl_dist.features.store._CHUNK"},
    "system/test_disk_faults.py": {"rtl_dist.features.maker:FeatureMaker._compute"},
    "training/test_compilation.py": {"compilation._LEAST_S", "compilation._time_passes"},
    "training/test_lr_finder.py": {"rtl_dist.records.range_test._SMOOTHING"},
    "training/test_memory.py": {"memory._USABLE", "memory._largest_that_fits"},
    "training/test_stages.py": {"FeatureMaker._write_blocks"},
}


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
    assert {path: names for path, names in found.items() if names} == LEFT
