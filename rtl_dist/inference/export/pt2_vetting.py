"""A ``.pt2`` file looked at before torch reads it, which would execute what it says.

Sizes are kept as formulas in Python, operations as names of functions, and pickles are fallen back
to. So a file is only read if it holds what ours hold: formulas of whole numbers, operations on
tensors, and plain bytes of weights.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rtl_dist.core.errors import UserError
from rtl_dist.core.text import brief
from rtl_dist.inference.export.metadata import IN_PT2

_ENTRIES = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/(?:version|serialization_id)"
    r"|data/(?:weights/weight|constants/tensor)_\d+"
    r"|data/(?:weights|constants)/(?:model|batch)_(?:weights|constants)_config\.json"
    r"|data/sample_inputs/(?:model|batch)\.pt|models/(?:model|batch)\.json|extra/rtl_dist\.json"
)
_OPERATIONS = re.compile(
    r"torch\.ops\.aten\.[a-z0-9_]+\.[A-Za-z0-9_]+|torch\.sym_(?:min|max|sum|not|ite)"
    r"|_operator\.(?:add|sub|mul|floordiv|mod|neg|eq|ne|lt|le|gt|ge|getitem|and_|pow)"
)
_NOT_FROM_FILES = re.compile(r"from_file|resize_|set_|storage")
_FORMULA_NAMES = {
    *("Symbol", "Integer", "Mul", "Add", "Pow", "Min", "Max", "FloorDiv", "CeilDiv", "Mod"),
    *("PythonMod", "Eq", "Ne", "Equality", "Unequality", "StrictLessThan", "LessThan"),
    *("StrictGreaterThan", "GreaterThan", "Rational", "And", "Or", "Not", "ModularIndexing"),
    *("CleanDiv", "IntTrueDiv", "L", "torch"),
}
_SYMBOL = re.compile(r"[su]\d{1,9}")
_ATTRIBUTES = ("size", "sym_min", "sym_max")
_NODES = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.Subscript),
    *(ast.Attribute, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop),
    *(ast.boolop, ast.cmpop, ast.Tuple),
)
_LONGEST = 20_000  # characters of a formula
_MOST_JSON = 200_000_000  # bytes


def vetted_metadata(path: Path) -> dict[str, str]:
    """What the file says of itself.

    Raises:
        UserError: it is no ``.pt2``, or holds what ``rtl-dist export`` does not write.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {_inner(info): info for info in archive.infolist()}
            roots = {info.filename.partition("/")[0] for info in archive.infolist()}
            if len(entries) != len(archive.infolist()) or len(roots) != 1:
                raise _refused(path, "it holds two files of one name")  # torch may take the other
            _require_plain(entries, path)
            for name, info in entries.items():
                if name.endswith(".json"):
                    _require_harmless(json.loads(archive.read(info)), path)
                elif name.endswith(".pt"):
                    torch.load(io.BytesIO(archive.read(info)), weights_only=True)
            found = json.loads(archive.read(entries[f"extra/{IN_PT2}"]))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path} was not written by rtl-dist ({brief(str(error))})") from error
    except UserError:
        raise
    except Exception as error:  # of unpickling
        raise _refused(path, f"a pickle in it is refused: {type(error).__name__}") from error
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise UserError(f"{path} was not written by rtl-dist (its metadata is no text)")
    return found


def _inner(info: zipfile.ZipInfo) -> str:
    return info.filename.partition("/")[2]


def _require_plain(entries: dict[str, zipfile.ZipInfo], path: Path) -> None:
    for name, info in entries.items():
        if not _ENTRIES.fullmatch(name):
            raise _refused(path, f"it holds {brief(info.filename)}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise _refused(path, f"{brief(info.filename)} is compressed")
        if name.endswith((".json", ".pt")) and info.file_size > _MOST_JSON:
            raise _refused(path, f"{brief(info.filename)} has {info.file_size:,} bytes")


def _require_harmless(content: Any, path: Path) -> None:
    for key, value in _pairs(content):
        if key == "use_pickle" and value is not False:
            raise _refused(path, "it keeps weights as pickles")
        if key in ("custom_obj_values", "metadata_codegen") and value:
            raise _refused(path, "it holds objects that are no tensors")
        if key == "target" and isinstance(value, str) and not _is_operation(value):
            raise _refused(path, f"it calls {brief(value)}")
        formulas = value if key == "guards_code" else [value] if key == "expr_str" else []
        for formula in formulas:
            if not _is_formula(formula):
                raise _refused(path, f"it would compute {brief(formula)}")


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    """Of all objects in it."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _pairs(value)
    elif isinstance(content, list):
        for value in content:
            yield from _pairs(value)


def _is_operation(name: str) -> bool:
    return bool(_OPERATIONS.fullmatch(name)) and not _NOT_FROM_FILES.search(name)


def _is_formula(text: Any) -> bool:
    """Whether it is of whole numbers and sizes, and calls nothing but the likes of ``Max``."""
    if not isinstance(text, str) or len(text) > _LONGEST:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return all(_is_harmless(node) for node in nodes)


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _FORMULA_NAMES or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Attribute):
        return node.attr in _ATTRIBUTES
    if isinstance(node, ast.Constant):
        value = node.value
        is_name = isinstance(value, str) and bool(re.fullmatch(r"[su]\d{1,9}|images?", value))
        return is_name or (isinstance(value, bool | int) and abs(value) < 2**63)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return False
    return isinstance(node, _NODES)


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not read: {why}, which no file of rtl-dist's does")
