"""What a run began with: config.yaml and environment.json."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rtl_dist import __version__
from rtl_dist.config import Config, to_yaml
from rtl_dist.core.cpus import available_cpus
from rtl_dist.core.files import read_object, write_json, write_text
from rtl_dist.data.images import region
from rtl_dist.distributed.hardware import cpu_name
from rtl_dist.distributed.runtime import Runtime


def describe_run(run: Path, config: Config, runtime: Runtime) -> int:
    """Writes ``config.yaml`` and ``environment.json``; what an earlier start said of its end is not
    true any more. Returns the number of this start among all starts of the run, from 1."""
    (run / "results.json").unlink(missing_ok=True)
    write_text(run / "config.yaml", to_yaml(config))
    earlier = read_object(run / "environment.json")
    starts = earlier.get("start", 1) if earlier else 0
    start = 1 + (starts if isinstance(starts, int) else 1)
    write_json(run / "environment.json", {"start": start} | _environment(runtime))
    return start


def _environment(runtime: Runtime) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "torchvision", "accelerate", "timm", "webdataset", "wandb", "numpy")
    on_gpu = runtime.device.type == "cuda"
    return {
        "rtl_dist": __version__,
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "device": torch.cuda.get_device_name(runtime.device) if on_gpu else cpu_name(),
        "cpus": available_cpus(),
        "precision": runtime.precision,
        "region_decoding": region.available(),
        "world_size": runtime.world_size,
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """The commit of the code in use, and whether it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
