"""The programs of ``docs/serving/``, to be tried."""

import importlib.util
from pathlib import Path

SERVING = Path(__file__).resolve().parents[2] / "docs" / "serving"


def example(name):
    """Such a program as a module."""
    spec = importlib.util.spec_from_file_location(name, SERVING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
