"""What a job computes on, in words that its user can check, and what it was to and does not."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from rtl_dist.config import Precision
from rtl_dist.core.cpus import available_cpus

# What schedulers and users say to ask for GPUs: which, and how many.
_WHICH = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
_HOW_MANY = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
_DEVICE_FILE = Path("/dev/nvidia0")
_PRECISIONS = {
    "no": "float32",
    "bf16": "bfloat16 beside float32",
    "fp16": "float16 beside float32",
    "fp64": "float64",
}


def described(device: torch.device, precision: Precision, *, local_world_size: int) -> str:
    """The device by its name, how much of it there is, and the precision."""
    words = f"precision {precision} ({_PRECISIONS.get(precision, precision)})"
    if device.type == "cuda":
        here = torch.cuda.device_count()
        used = min(local_world_size, here)
        count = f"{used} of {here} GPUs" if here > 1 else "1 GPU"
        return f"{count} ({torch.cuda.get_device_name(device)}), {words}"
    threads, cpus = torch.get_num_threads(), available_cpus()
    each = " each" if local_world_size > 1 else ""
    return f"the CPU ({cpu_name()}), {threads} thread(s){each} of {cpus} CPU(s), {words}"


def shortfall(device: torch.device, *, local_world_size: int) -> list[str]:
    """What is there and not used, or was asked for and is not there, each with what to do."""
    if device.type == "cuda":
        idle = torch.cuda.device_count() - local_world_size
        if idle <= 0:
            return []
        return [
            f"{idle} GPU(s) of this machine are not used: start one process for each, as with"
            f" torchrun --nproc-per-node {torch.cuda.device_count()}, or hide them with"
            " CUDA_VISIBLE_DEVICES"
        ]
    found = []
    if asked := _asked_for_gpu():
        found.append(f"a GPU was asked for ({asked}) and none can be used: {_why_no_gpu()}")
    threads, share = torch.get_num_threads(), max(1, available_cpus() // local_world_size)
    if threads < share:
        by = os.environ.get("OMP_NUM_THREADS")
        why = f"OMP_NUM_THREADS={by}" if by else "torch's own choice"
        found.append(
            f"each process computes with {threads} thread(s) and could use {share} CPUs ({why}):"
            f" set OMP_NUM_THREADS={share}"
        )
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), "CPU")


def _asked_for_gpu() -> str | None:
    """What says that there is to be a GPU; None: nothing does."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return None  # they are hidden on purpose
    for name in (*_WHICH, *_HOW_MANY):
        value = os.environ.get(name, "").strip()
        if value not in ("", "-1", "none", "NoDevFiles") and (name in _WHICH or value != "0"):
            return f"{name}={value}"
    return f"{_DEVICE_FILE} is there" if _DEVICE_FILE.exists() else None


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it"
    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001 - whatever the driver says
        return " ".join(str(error).split()) or type(error).__name__
    return "the driver shows none to this process (nvidia-smi tells what it has)"
