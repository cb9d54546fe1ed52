"""Which device this process computes on: its GPU, tried before anything is done, or the CPU.

A GPU that is there and cannot be used ends the job with what to do about it: training goes on for
days on a CPU without anyone having asked for it.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rtl_dist.core.errors import UserError
from rtl_dist.core.text import brief
from rtl_dist.distributed.launchers import whole_number

DEVICES = Path("/dev")
_ON_THE_CPU = "to train on the CPU all the same, set CUDA_VISIBLE_DEVICES=-1"
_OTHER_TORCH = "pytorch.org/get-started/previous-versions"
_OF_THE_HARDWARE = (  # in what CUDA says
    "ECC error",
    "NVLink error",
    "hardware",
    "launch failure",
    "busy or unavailable",
    "unknown error",  # as when a GPU has fallen off the bus
)
_OLDEST_OF_CUDA_13 = 75  # compute capability, times ten; older ones were left out of it


def uses_gpu(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process computes on a GPU: where one is visible, unless the launcher was told
    to use CPUs.

    Raises:
        UserError: there is one that cannot be used.
    """
    if _is_told_to_use_cpus(env):
        return False
    with warnings.catch_warnings():  # what torch would warn of is said below
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            _require_usable(local_gpu(env))
            return True
    if not are_hidden(env) and (device := device_that_opens()):
        raise UserError(
            f"there is a GPU here ({device}) and it cannot be used: {why_no_gpu(env)};"
            f" {_ON_THE_CPU}"
        )
    return False


def local_gpu(env: Mapping[str, str] = os.environ) -> int:
    """The number of this process's GPU among those that it sees: that of its own number, or the
    only one (``srun --gpus-per-task=1``, a container for each process)."""
    return whole_number(env, "LOCAL_RANK", 0) % max(1, torch.cuda.device_count())


def gpu_place(device: torch.device) -> tuple[str, str] | None:
    """(machine, place on its bus) of a GPU, by which NCCL too tells GPUs apart; None of a CPU."""
    if device.type != "cuda":
        return None
    has: Any = torch.cuda.get_device_properties(device)  # more than torch's stub says
    numbers = has.pci_domain_id, has.pci_bus_id, has.pci_device_id
    return socket.gethostname(), ":".join(f"{number:02x}" for number in numbers)


def why_not_one_each(places: Sequence[tuple[str, str] | None]) -> str | None:
    """What to say where two ranks have one GPU; None: each has its own, or none has any.

    Args:
        places: of each rank's.
    """
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") != "0":  # since NCCL 2.30
        return None
    for place, count in Counter(filter(None, places)).items():
        if count > 1:
            first, second = [r for r, other in enumerate(places) if other == place][:2]
            host = place[0]
            gpus = len({other for other in places if other and other[0] == host})
            return (
                f"ranks {first} and {second} have the same GPU of {host} (at {place[1]}): start"
                f" {gpus} process(es) there, one for each GPU that they can see, or have the"
                " scheduler give each a GPU of its own; the slices of one (MIG) count as one,"
                " unless NCCL is 2.30 or newer and NCCL_MULTI_RANK_GPU_ENABLE=1 is set"
            )
    return None


def are_hidden(env: Mapping[str, str] = os.environ) -> bool:
    """Whether GPUs are hidden on purpose: CUDA takes none from the first number that is none on."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    first = "" if visible is None else visible.split(",")[0].strip()
    return visible is not None and (first in ("", "NoDevFiles") or first.startswith("-"))


def device_that_opens() -> Path | None:
    """The first device file of a GPU that this process may open; None: there is none. A scheduler
    that has not given a GPU to this job leaves its file there and has it refuse."""
    for path in sorted(DEVICES.glob("nvidia[0-9]*")):
        try:
            os.close(os.open(path, os.O_RDWR))
        except PermissionError:
            continue
        except OSError:  # the driver answers, but not well
            return path
        return path
    return None


def why_no_gpu(env: Mapping[str, str] = os.environ) -> str:
    """What keeps torch from using any, and the cure."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a build with it"
            f" ({_OTHER_TORCH})"
        )
    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001 - whatever the driver says
        said = " ".join(str(error).split()) or type(error).__name__
    else:
        return "the driver shows none to this process (nvidia-smi tells what it has)"
    if "too old" in said:
        return (
            f"{said.partition('. Please')[0]}; update it, or install a torch that is built for an"
            f" older CUDA than {torch.version.cuda} ({_OTHER_TORCH})"
        )
    if "No CUDA GPUs" in said and (visible := env.get("CUDA_VISIBLE_DEVICES")):
        return f"{said}: CUDA_VISIBLE_DEVICES={brief(visible)} names none of them"
    return f"{said.removesuffix('.')} (does nvidia-smi work here?)"


def why_it_failed(error: BaseException | None) -> str | None:
    """What to say of a GPU that fails while it computes; None: it is no fault of the hardware's."""
    said = str(error).split("\n")[0].removeprefix("CUDA error: ")
    is_its_own = isinstance(error, torch.AcceleratorError)
    if not is_its_own or not any(words in said for words in _OF_THE_HARDWARE):
        return None
    number = torch.cuda.current_device()
    return (
        f"GPU {number} ({_name_of(number)}) of {socket.gethostname()} failed: {said}; the kernel's"
        " log may say why (dmesg, Xid); start the same command again, on another GPU if it fails"
        " again"
    )


def _is_told_to_use_cpus(env: Mapping[str, str]) -> bool:
    """By ``accelerate launch --cpu``, or ``use_cpu`` in its file. A value that says neither yes nor
    no is accelerate's to refuse."""
    told = env.get("ACCELERATE_USE_CPU", "").strip().lower()
    return told in ("y", "yes", "t", "true", "on", "1")


def _require_usable(number: int) -> None:
    """Has the GPU compute something, which torch has kernels for or not, and others may prevent.

    Raises:
        UserError: it does not.
    """
    try:
        torch.ones(2, device=torch.device("cuda", number)).add_(1).sum().item()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"GPU {number} ({_name_of(number)}) has no memory left for this process: others have it"
            f" (nvidia-smi shows which); end them, or choose another by CUDA_VISIBLE_DEVICES"
        ) from error
    except Exception as error:
        said = str(error).strip().split("\n")[0].removeprefix("CUDA error: ")
        raise UserError(
            f"GPU {number} ({_name_of(number)}) cannot be used: {said}; {_cure(number, said)};"
            f" {_ON_THE_CPU}"
        ) from error


def _cure(number: int, said: str) -> str:
    if "no kernel image" not in said:
        return "does nvidia-smi work here?"
    has = sorted(int(name.rpartition("_")[2].rstrip("af")) for name in torch.cuda.get_arch_list())
    major, minor = torch.cuda.get_device_capability(number)
    listed = ", ".join(f"{one // 10}.{one % 10}" for one in has)
    what = f"torch {torch.__version__} has kernels for compute capability {listed or 'none'}"
    if 10 * major + minor >= max(has, default=_OLDEST_OF_CUDA_13):
        return f"{what}; install a newer torch"
    return (
        f"{what}; install one that has them for older GPUs: up to 2.14, built for CUDA 12.6"
        f" ({_OTHER_TORCH})"
    )


def _name_of(number: int) -> str:
    try:
        major, minor = torch.cuda.get_device_capability(number)
        return f"{torch.cuda.get_device_name(number)}, compute capability {major}.{minor}"
    except Exception as error:  # noqa: BLE001 - it is only a name
        return type(error).__name__
