"""The precision that a device really computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rtl_dist.config import Precision
from rtl_dist.core.errors import UserError
from rtl_dist.distributed.devices import local_gpu, uses_gpu


def resolve_precision(wanted: Precision, *, on_gpu: bool) -> Precision:
    """The precision this process will run in.

    Args:
        wanted: as the config has it; ``auto`` becomes bf16 where the hardware multiplies it.

    Raises:
        UserError: the device cannot do what is wanted, or only by emulating it.
    """
    if wanted == "fp16" and not on_gpu:
        raise UserError("precision: fp16 needs a GPU; use auto, bf16 or no")
    if wanted == "bf16" and on_gpu and not _gpu_has_bf16():
        name = torch.cuda.get_device_name(local_gpu())
        raise UserError(
            f"precision: bf16 is emulated, and slow, on {name}; set precision=fp16 or precision=no"
            " (a run that was begun in bf16 goes on only where GPUs have it: Ampere and later)"
        )
    if wanted != "auto":
        return wanted
    if on_gpu:
        return "bf16" if _gpu_has_bf16() else "fp16"
    return "bf16" if _cpu_has_bf16() else "no"


def precision_as_trained(trained: Precision) -> Precision:
    """For an evaluation: that of the training, so that its figures come out again, where this
    device has it; else ``auto``.

    Raises:
        UserError: there is a GPU that cannot be used.
    """
    on_gpu = uses_gpu()
    lacks_it = (trained == "fp16" and not on_gpu) or (
        trained == "bf16" and on_gpu and not _gpu_has_bf16()
    )
    return "auto" if lacks_it else trained


def set_tf32(wanted: bool) -> None:
    """Whether GPUs from Ampere on may round the factors of float32 convolutions to TF32. Matrix
    products stay float32, whatever a container's environment says."""
    torch.backends.cudnn.allow_tf32 = wanted
    torch.backends.cuda.matmul.allow_tf32 = False


def set_determinism(wanted: bool) -> None:
    """Whether cuDNN's kernels are deterministic ones chosen by its rules, else the fastest of all,
    found by trying them: what it finds differs between runs."""
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted


@contextmanager
def kernels_set_back() -> Iterator[None]:
    """After the block the process chooses cuDNN's kernels and TF32 as it did before."""
    cudnn: Any = torch.backends.cudnn
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    rounded = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]  # allow_tf32 cannot tell all
    before = [each.fp32_precision for each in rounded]
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        for each, precision in zip(rounded, before, strict=True):
            each.fp32_precision = precision


def computes_in_tf32(device: torch.device) -> bool:
    """Whether float32 convolutions are TF32's there."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cudnn.allow_tf32
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _gpu_has_bf16() -> bool:
    """``torch.cuda.is_bf16_supported()`` is also true where it is emulated and slow, as on a T4."""
    with torch.cuda.device(local_gpu()):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); emulated, it is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux: unknown, so the safe answer
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
