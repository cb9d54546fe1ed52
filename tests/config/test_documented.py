"""Every key of a config says under it what it means."""

import ast
import dataclasses
import inspect
import sys
import typing

import pytest

from rtl_dist.config import Config, ResolvedStage


def sections_of(section):
    """The section and all within it."""
    found = {section}
    for hint in typing.get_type_hints(section).values():
        for kind in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind) and kind.__module__.startswith("rtl_dist.config"):
                found |= sections_of(kind)
    return found


SECTIONS = sorted(
    sections_of(Config) | sections_of(ResolvedStage), key=lambda section: section.__name__
)


def documented(section):
    """Name to docstring, or None, of the fields that a section's own body declares."""
    tree = ast.parse(inspect.getsource(sys.modules[section.__module__]))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    found = {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            found[node.target.id] = below.value.value if is_text else None
    return found


def test_all_sections_are_looked_at():
    names = [section.__name__ for section in SECTIONS]
    assert names == [
        *("AugmentConfig", "BatchConfig", "CheckpointConfig", "Config", "DataConfig"),
        *("EarlyStopConfig", "EvalConfig", "FeaturesConfig", "ModelConfig", "OptimConfig"),
        *("ResolvedStage", "RunConfig", "StageConfig", "StageSpan", "TrackConfig"),
    ]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_says_what_it_means(section):
    docs = documented(section)
    fields = {field.name for field in dataclasses.fields(section)}
    assert docs.keys() <= fields
    inherited = {
        f.name for c in section.__mro__[1:] if c in SECTIONS for f in dataclasses.fields(c)
    }
    assert fields - docs.keys() <= inherited
    assert not [name for name, text in docs.items() if not text or not text.strip()]
