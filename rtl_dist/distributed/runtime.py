"""The hardware of a job: Accelerator, precision, this rank's device; and the group of its ranks."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed import distributed_c10d as c10d
from tqdm import tqdm

from rtl_dist.config import Precision
from rtl_dist.core.errors import RtlDistError, StopRequested, UserError
from rtl_dist.core.processes import available_cpus
from rtl_dist.distributed.launchers import COLLECTIVE_TIMEOUT, launched_world_size
from rtl_dist.distributed.ranks import Ranks
from rtl_dist.distributed.stopping import StopRequests, was_launched

LOG = logging.getLogger("rtl_dist")
_OF_PEERS = ("onnection", "Timed out waiting", "Gloo", "NCCL")  # in what the collectives raise


class Runtime(Ranks):
    """Use as a context manager; one at a time in a process.

    local_world_size: of this machine. device: this rank's.
    """

    def __init__(
        self,
        precision: Precision,
        stops: StopRequests | None = None,
        *,
        patience: timedelta = COLLECTIVE_TIMEOUT,
    ) -> None:
        """
        Args:
            stops: of this process; None: it is never asked.
            patience: with ranks that are waited for, in what is not the device's.
        """
        self.precision = resolve_precision(precision)
        use_cpu = not torch.cuda.is_available()
        world = launched_world_size()
        self.accelerator = self._meet()
        super().__init__(
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            stops=stops,
        )
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.device: torch.device = self.accelerator.device
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        if world != self.world_size:
            self.close()
            raise UserError(
                f"WORLD_SIZE is {world} but this process found {self.world_size} process(es) in its"
                " group, so each would train alone: launch with torchrun, srun or accelerate and a"
                " file from launch/"
            )
        if self.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # until 2.14
            set_timeout(patience, self._group)  # all have come: patience is with their work
            self._require_one_precision()
        if use_cpu and not _user_chose_threads():
            torch.set_num_threads(max(1, available_cpus() // self.local_world_size))
        torch.backends.cudnn.benchmark = False  # its choice differs between runs
        torch.backends.cudnn.deterministic = True

    def _meet(self) -> Accelerator:
        try:
            return Accelerator(
                # Without this two CPU processes each believe they are alone (accelerate 1.15).
                cpu=not torch.cuda.is_available(),
                mixed_precision=self.precision if self.precision in ("fp16", "bf16") else "no",
                kwargs_handlers=[
                    # BatchNorm buffers are kept equal by StepStatistics, not by broadcasting
                    DistributedDataParallelKwargs(
                        broadcast_buffers=False, gradient_as_bucket_view=True
                    ),
                    InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
                ],
            )
        except dist.DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RtlDistError(
                f"cannot meet the other processes at {address} ({str(error).splitlines()[0]}): its"
                " host must be reachable from all and the port free (MASTER_ADDR, MASTER_PORT)"
            ) from error

    def _require_one_precision(self) -> None:
        """Gradients of several would be averaged, and no run could be repeated."""
        found = sorted(set(self.gather((self.precision, socket.gethostname()))))
        if len({precision for precision, _ in found}) > 1:
            self.close()
            raise UserError(
                "precision: auto is not the same on all machines ("
                + ", ".join(f"{precision} on {host}" for precision, host in found)
                + "); set one that all of them can do, such as precision: no"
            )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast multiplies in; None without autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    @property
    def device_name(self) -> str:
        """What kind of device computes; another one may round otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.backends.cpu.get_cpu_capability()}"

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        agreed = error is None or isinstance(error, StopRequested)
        if agreed:
            self.settle()
        if self.device.type == "cuda" and self._group is not None and not agreed:
            # NCCL's group would wait, on its way down, for ranks that may be waiting for this one
            dist.destroy_process_group(self._group)
        else:
            self.close()  # gloo's group must go, or its threads abort the process at its exit
        if isinstance(error, torch.OutOfMemoryError):
            raise RtlDistError(
                f"out of memory ({str(error).splitlines()[0]}); set batch.micro lower or use a"
                " smaller data.image_size, and start the same command again"
            ) from error
        lost_a_rank = isinstance(error, RuntimeError) and any(w in str(error) for w in _OF_PEERS)
        if self.world_size > 1 and lost_a_rank:
            raise RtlDistError(
                "another process of this job ended; its own last message says why"
            ) from error

    def close(self) -> None:
        self.accelerator.free_memory()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        # a later job in this process may want another precision
        AcceleratorState._reset_state(reset_partial_state=True)
        gc.collect()

    def progress(self, *, total: int, what: str, unit: str, done: int = 0) -> tqdm[Any]:
        """A bar with an ETA on rank 0's terminal; silent on other ranks and off a terminal."""
        return tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            disable=None if self.is_main else True,
            leave=False,
            dynamic_ncols=True,
        )

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor on the device, which it overwrites."""
        if self.world_size > 1:
            with self.heartbeat.waiting():
                dist.all_reduce(values)
        return values / self.world_size


def resolve_precision(wanted: Precision) -> Precision:
    """The precision this hardware will really run.

    ``torch.cuda.is_bf16_supported()`` is true on a T4 by emulation, so emulation is excluded.

    Raises:
        UserError: fp16 without a GPU.
    """
    if wanted == "fp16" and not torch.cuda.is_available():
        raise UserError("precision: fp16 needs a GPU; use auto, bf16 or no")
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _cpu_has_bf16() else "no"


def configure_logging(*, is_main: bool) -> None:
    """Messages of rank 0 on stderr as plain lines; the other ranks' only when they warn."""
    LOG.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO if is_main else logging.WARNING)
    LOG.propagate = False


def _user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS is the user's: accelerate and torchrun set it to 1 by themselves."""
    by_launcher = os.environ.get("OMP_NUM_THREADS") == "1" and was_launched()
    return "OMP_NUM_THREADS" in os.environ and not by_launcher


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); emulated, it is slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux: unknown, so the safe answer
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
