"""Packages that stand for W&B's."""

from pathlib import Path


def make_package(tmp_path: Path, code: str) -> Path:
    """A folder with a package wandb of this code."""
    package = tmp_path / "package" / "wandb"
    (package / "proto").mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    (package / "proto" / "__init__.py").touch()
    (package / "proto" / "wandb_internal_pb2.py").write_text("Record = None\n")
    return package.parent
