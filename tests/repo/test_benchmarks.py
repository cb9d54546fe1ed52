"""Benchmarks that a decision rests on still run, here with as little as they take."""

import re
import subprocess
import sys
from pathlib import Path

from pack_images import class_folders

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_png_decoders(tmp_path):
    images = class_folders(tmp_path / "images", {"a": 2})
    arguments = ["--small", images, "--photos", images, "--damages", "60", "--rounds", "1"]
    arguments += ["--images", "2", "--bomb-pixels", "10000"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "png_decoders.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pixels, 3 channel(s)" not in done.stdout, "as colour both decode alike"
    for side in ("checked", "pillow"):
        (line,) = re.findall(rf"^damage, {side} +of 60: (.*); slowest", done.stdout, re.MULTILINE)
        assert "CRASH" not in line
        assert "Error" not in line, "only a DataError may come out"
        counts = [int(count) for count in re.findall(r"(?:^|, )(\d+) ", line)]
        assert sum(counts) == 60
    assert len(re.findall(r"^    checked .* (?:decoded|refused)$", done.stdout, re.MULTILINE)) == 10
    assert len(re.findall(r"^cost, ", done.stdout, re.MULTILINE)) == 2 * 2 * 3
