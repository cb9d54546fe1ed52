"""What is installed: every module, the marker of types, and the files that ship with the package."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = "from setuptools import build_meta; build_meta.build_wheel('built')"
MADE = ("__pycache__", "*.so")  # what is made here is not what is shipped


def test_the_wheel_holds_the_package_whole(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    shutil.copytree(ROOT / "rtl_dist", tmp_path / "rtl_dist", ignore=shutil.ignore_patterns(*MADE))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, check=True, capture_output=True, timeout=300
    )
    (wheel,) = (tmp_path / "built").glob("rtl_dist-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    files = [path for path in (tmp_path / "rtl_dist").rglob("*") if path.is_file()]
    shipped = {str(path.relative_to(tmp_path)) for path in files}
    assert "rtl_dist/py.typed" in installed
    assert "rtl_dist/assets/tiny_resnet_cifar10/model.safetensors" in installed
    assert "rtl_dist/configs/quickstart.yaml" in installed
    assert shipped <= installed
