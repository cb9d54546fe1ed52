"""The processes of a job on their hardware: they meet, agree on a precision, and part in order."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import warnings
from datetime import timedelta
from types import TracebackType
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.distributed import distributed_c10d as c10d

from rtl_dist.config import Precision
from rtl_dist.core.cpus import container_cpus, own_cpus, share_of_cpus
from rtl_dist.core.errors import RtlDistError, StopRequested, UserError
from rtl_dist.core.memory import available_memory
from rtl_dist.distributed.accelerate_settings import (
    on_the_network_s_own_device,
    only_where_to_compute,
    overruled,
    refuse_other_ways,
)
from rtl_dist.distributed.devices import (
    gpu_place,
    local_gpu,
    uses_gpu,
    why_not_one_each,
)
from rtl_dist.distributed.failures import told_to_the_user
from rtl_dist.distributed.launchers import (
    COLLECTIVE_TIMEOUT,
    allow_forks,
    launched_world_size,
    whole_number,
)
from rtl_dist.distributed.lost_peers import explained, let_go, may_wait_for_lost_peers
from rtl_dist.distributed.precision import resolve_precision, set_determinism, set_tf32
from rtl_dist.distributed.ranks import Ranks
from rtl_dist.distributed.stopping import StopRequests, was_launched
from rtl_dist.distributed.terminal import Progress, progress

LOG = logging.getLogger("rtl_dist")
_SHARE_FOR_DATA = 0.25  # of the host's memory, of all ranks on it together


class Runtime(Ranks):
    """The ranks, each on its device. Use as a context manager; one at a time in a process.

    accelerator: Accelerate's, which wraps the network and its optimizer. precision: what this
    hardware really computes in. dtype: of the weights. device: this rank's. local_world_size: the
    number of ranks on this machine. cpus: this rank's share of its CPUs.
    """

    def __init__(
        self,
        precision: Precision,
        stops: StopRequests | None = None,
        *,
        patience: timedelta = COLLECTIVE_TIMEOUT,
        tf32: bool = True,
        deterministic: bool = True,
    ) -> None:
        """
        Args:
            precision: as the config has it.
            stops: the requests to stop that reach this process; None: it is never asked.
            patience: how long an exchange of decisions and counts waits for the other ranks. One
                on the device, of gradients, waits for ``COLLECTIVE_TIMEOUT``.
            tf32, deterministic: as the config has them.

        Raises:
            UserError: the processes were not told of each other, differ in their precision, have
                one GPU for two of them, or one that cannot be used.
            RtlDistError: the others do not come.
        """
        launched = launched_world_size()  # first: it tells srun's tasks their numbers
        self._on_gpu = uses_gpu()
        if self._on_gpu:
            torch.cuda.set_device(local_gpu())
        if self._on_gpu and launched > 1:
            allow_forks()
        self.precision = resolve_precision(precision, on_gpu=self._on_gpu)
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        self._settings, settings = contextlib.ExitStack(), overruled()
        user_chose_threads = _user_chose_threads()  # before the launcher's variables are hidden
        self.accelerator = self._meet()
        self.device: torch.device = self.accelerator.device
        self._require_all_came(launched)
        super().__init__(
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            stops=stops,
            group=_gloo_group(patience) if self.accelerator.num_processes > 1 else None,
        )
        self._is_let_go = False
        self._require_one_gpu_each()
        self._require_one_precision()
        if self.is_main and settings:
            LOG.warning("not taken from accelerate's settings: %s", ", ".join(settings))
        self.local_world_size = whole_number(os.environ, "LOCAL_WORLD_SIZE", self.world_size)
        self.cpus = self._share_of_cpus()
        if not self._on_gpu and not user_chose_threads:
            torch.set_num_threads(self.cpus)
        self._tf32, self._deterministic = tf32, deterministic
        set_tf32(tf32)
        set_determinism(deterministic)

    def _meet(self) -> Accelerator:
        """Waits for the other processes, and makes the group in which the devices exchange."""
        refuse_other_ways()
        self._settings.enter_context(only_where_to_compute())
        try:
            return Accelerator(
                # Without this two CPU processes each believe they are alone (accelerate 1.15).
                cpu=not self._on_gpu,
                mixed_precision=self.precision if self.precision in ("fp16", "bf16") else "no",
                kwargs_handlers=[
                    # BatchNorm buffers are kept equal by StepStatistics, not by broadcasting
                    DistributedDataParallelKwargs(
                        broadcast_buffers=False, gradient_as_bucket_view=True
                    ),
                    InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
                ],
            )
        except ValueError as error:  # of a variable that says neither yes nor no, or is no number
            self._forget_accelerate()
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the launcher's environment cannot be used ({reason}): see ACCELERATE_USE_CPU,"
                " ACCELERATE_CPU_AFFINITY, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            ) from error
        except dist.DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RtlDistError(
                f"cannot meet the other processes at {address} ({str(error).splitlines()[0]}): its"
                " host must be reachable from all and the port free (MASTER_ADDR, MASTER_PORT)"
            ) from error

    def _require_all_came(self, launched: int) -> None:
        """Fails where the launcher started several processes but this one is alone in its group."""
        found = self.accelerator.num_processes
        if launched != found:
            self.close()
            raise UserError(
                f"WORLD_SIZE is {launched} but this process found {found} process(es) in its"
                " group, so each would train alone: launch with torchrun, srun or accelerate and a"
                " file from launch/"
            )

    def _share_of_cpus(self) -> int:
        """Of the CPUs of this machine, by what each of its ranks may use."""
        mine = socket.gethostname(), own_cpus()
        processes = [cpus for host, cpus in self.gather(mine) if host == mine[0]]
        return share_of_cpus(mine[1], processes, container_cpus())

    def _require_one_gpu_each(self) -> None:
        """Fails where two ranks have one GPU: NCCL would refuse, later and in other words."""
        place = gpu_place(self.device) if self.world_size > 1 else None
        if why := why_not_one_each(self.gather(place)):
            self.close()
            raise UserError(why)

    def _require_one_precision(self) -> None:
        """Fails where ``precision: auto`` gave the machines different ones: gradients of different
        precision would be averaged, and no run could be repeated."""
        found = sorted(set(self.gather((self.precision, socket.gethostname()))))
        if len({precision for precision, _ in found}) > 1:
            self.close()
            raise UserError(
                "precision: auto is not the same on all machines ("
                + ", ".join(f"{precision} on {host}" for precision, host in found)
                + "); set one that all of them can do, such as precision: no"
            )

    @property
    def loader_bytes(self) -> int:
        """Of the host's memory, for the microbatches that one loader of this rank has ready. Two
        may work at a time, one of them for an evaluation."""
        return self._data_bytes // 4

    @property
    def kept_bytes(self) -> int:
        """Of the host's memory, for the images that this rank keeps decoded."""
        return self._data_bytes // 2

    @property
    def _data_bytes(self) -> int:
        return int(available_memory() * _SHARE_FOR_DATA) // self.local_world_size

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast multiplies in; None without autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)

    @property
    def precision_in_words(self) -> str:
        """With what else of the config says how products are rounded."""
        words = self.precision if self._tf32 else f"{self.precision}, without TF32"
        return words if self._deterministic else f"{words}, by the fastest kernels"

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
        if error is None or isinstance(error, StopRequested):  # all end alike
            self.settle()
            self.close()
        else:
            self._close_before_the_others(error)
        if (for_the_user := told_to_the_user(error, world_size=self.world_size)) is not None:
            for_the_user.was_told = self._is_let_go and explained(error) is not None
            raise for_the_user from error

    def let_go(self, error: BaseException) -> None:
        """Before what was opened is closed after a failure: see ``lost_peers``. Once only."""
        if isinstance(error, StopRequested) or self.group is None or self._is_let_go:
            return  # all end alike, or it was done
        if not may_wait_for_lost_peers(self.device):
            return
        self._is_let_go = True
        let_go(error)

    def _close_before_the_others(self, error: BaseException) -> None:
        """Leaves a group whose other ranks may be waiting for this one."""
        self.let_go(error)
        if self.device.type == "cuda" and self.group is not None:
            # Closing NCCL's group would wait for them. The process's end takes it down.
            dist.destroy_process_group(self.group)
        else:
            self.close()  # gloo's threads abort a process that ends before its group is closed

    def wrap(self, network: nn.Module) -> nn.Module:
        """DDP around what is trained, where there are several ranks, and mixed precision."""
        with warnings.catch_warnings(), on_the_network_s_own_device():
            # torch 2.14 renames broadcast_buffers; its old name serves every version we support
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped: nn.Module = self.accelerator.prepare_model(network)
        return wrapped

    def close(self) -> None:
        """Leaves all process groups and forgets what Accelerate keeps for the whole process, so
        that a later job in it may have another precision."""
        self.accelerator.free_memory()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        self._forget_accelerate()
        gc.collect()

    def _forget_accelerate(self) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        self._settings.close()

    def progress(
        self, *, total: int, what: str, unit: str, done: int = 0, images: int = 0
    ) -> Progress:
        """``progress`` on rank 0; other ranks are silent."""
        return progress(
            total=total, what=what, unit=unit, done=done, images=images, silent=not self.is_main
        )

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks of a tensor on the device.

        Args:
            values: of the same shape and dtype on every rank; it is overwritten.

        Returns:
            A new tensor, the same on every rank; with one rank equal to ``values``.
        """
        if self.world_size > 1:
            with self.heartbeat.waiting():
                dist.all_reduce(values)
        return values / self.world_size


def _gloo_group(patience: timedelta) -> dist.ProcessGroup:
    """The group of all ranks in which ``Ranks`` exchanges, made once all have come.

    Args:
        patience: how long an exchange in it waits. While it is made, which needs every rank, the
            limit is ``COLLECTIVE_TIMEOUT``.
    """
    made = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    group = cast(dist.ProcessGroup, made)  # a number only in processes that are not in it
    set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # until torch 2.14
    set_timeout(patience, group)
    return group


def _user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS is the user's: accelerate and torchrun set it to 1 by themselves."""
    by_launcher = os.environ.get("OMP_NUM_THREADS") == "1" and was_launched()
    return "OMP_NUM_THREADS" in os.environ and not by_launcher
