"""What a job computes on, in words that its user can check, and what it was to and does not."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from rtl_dist.config import Precision
from rtl_dist.core.cpus import available_cpus
from rtl_dist.distributed.devices import are_hidden, why_no_gpu
from rtl_dist.distributed.precision import computes_in_tf32

# What schedulers and users say to ask for GPUs: which, and how many.
_WHICH = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
_HOW_MANY = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
_CORES_A_GPU, _FEW_CORES = 8, 4  # what a GPU is asked for, and below which it is said
_PRECISIONS = {
    "no": "float32",
    "bf16": "bfloat16 beside float32",
    "fp16": "float16 beside float32",
    "fp64": "float64",
}


def described(device: torch.device, precision: Precision, *, local_world_size: int) -> str:
    """The device by its name, how much of it there is, and the precision."""
    words = f"precision {precision} ({_PRECISIONS.get(precision, precision)}"
    if precision == "no" and computes_in_tf32(device):
        words += ", convolutions in TF32: tf32=false keeps them from it"
    if device.type == "cuda":
        if torch.backends.cudnn.benchmark:
            words += ", the fastest kernels (deterministic: false)"
        here = torch.cuda.device_count()
        used = min(local_world_size, here)
        count = f"{used} of {here} GPUs" if here > 1 else "1 GPU"
        each = " each" if here == 1 < local_world_size else ""
        return f"{count}{each} ({torch.cuda.get_device_name(device)}), {words})"
    threads, cpus = torch.get_num_threads(), available_cpus()
    each = " each" if local_world_size > 1 else ""
    return f"the CPU ({cpu_name()}), {threads} thread(s){each} of {cpus} CPU(s), {words})"


def shortfall(device: torch.device, *, local_world_size: int, cpus: int) -> list[str]:
    """What is there and not used, or was asked for and is not there, each with what to do.

    Args:
        cpus: this rank's share.
    """
    if device.type == "cuda":
        return [*_idle_gpus(local_world_size), *_few_cores(local_world_size, cpus)]
    found = []
    if (asked := _asked_for_gpu()) and not torch.cuda.is_available():
        found.append(f"a GPU was asked for ({asked}) and none can be used: {why_no_gpu()}")
    threads = torch.get_num_threads()
    if threads < cpus:
        by = os.environ.get("OMP_NUM_THREADS")
        why = f"OMP_NUM_THREADS={by}" if by else "torch's own choice"
        found.append(
            f"each process computes with {threads} thread(s) and could use {cpus} CPUs ({why}):"
            f" set OMP_NUM_THREADS={cpus}"
        )
    return found


def _idle_gpus(local_world_size: int) -> list[str]:
    here = torch.cuda.device_count()
    if here <= local_world_size:
        return []
    return [
        f"{here - local_world_size} GPU(s) of this machine are not used: start one process for"
        f" each, as with torchrun --nproc-per-node {here}, or hide them with CUDA_VISIBLE_DEVICES"
    ]


def _few_cores(local_world_size: int, cpus: int) -> list[str]:
    """Only of what can be asked for: a machine has the cores that it has."""
    if cpus >= _FEW_CORES or "SLURM_JOB_ID" not in os.environ:
        return []
    wanted = _CORES_A_GPU * local_world_size
    return [
        f"{cpus} CPU(s) read and decode images for each GPU, which may wait for them: ask SLURM for"
        f" {_CORES_A_GPU} a GPU (sbatch --cpus-per-task={wanted} slurm/...)"
    ]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), "CPU")


def _asked_for_gpu() -> str | None:
    """What says that there is to be a GPU; None: nothing does."""
    if are_hidden():
        return None
    for name in (*_WHICH, *_HOW_MANY):
        value = os.environ.get(name, "").strip()
        if value not in ("", "-1", "none", "NoDevFiles") and (name in _WHICH or value != "0"):
            return f"{name}={value}"
    return None
