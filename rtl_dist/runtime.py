"""The processes and the hardware of a job: Accelerator, precision, agreement.

Collectives that carry decisions or exact counts run on a gloo group beside the device's own, so
they never wait for the GPU.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed import distributed_c10d as c10d
from tqdm import tqdm

from rtl_dist.config import Precision
from rtl_dist.data.processes import available_cpus
from rtl_dist.errors import RtlDistError, StopRequested, UserError
from rtl_dist.heartbeat import Heartbeat
from rtl_dist.launched import COLLECTIVE_TIMEOUT, launched_world_size
from rtl_dist.stopping import StopRequests, was_launched

LOG = logging.getLogger("rtl_dist")
T = TypeVar("T")
_OF_PEERS = ("onnection", "Timed out waiting", "Gloo", "NCCL")  # in what the collectives raise


class Runtime:
    """Use as a context manager; one at a time in a process.

    rank, world_size: of all processes. local_world_size: of this machine. device: this rank's.
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
        self.accelerator = Accelerator(
            # Without this two CPU processes each believe they are alone (accelerate 1.15).
            cpu=use_cpu,
            mixed_precision=self.precision if self.precision in ("fp16", "bf16") else "no",
            kwargs_handlers=[
                # BatchNorm buffers are kept equal by StepStatistics, not by broadcasting rank 0's
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            ],
        )
        self.world_size = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.device: torch.device = self.accelerator.device
        self.dtype = torch.float64 if self.precision == "fp64" else torch.float32
        self.heartbeat = Heartbeat()
        self.stops = stops
        self._control: dist.ProcessGroup | None = None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None
        if world != self.world_size:
            self.close()
            raise UserError(
                f"WORLD_SIZE is {world} but this process found {self.world_size} process(es) in its"
                " group, so each would train alone: launch with torchrun, srun or accelerate and a"
                " file from launch/"
            )
        if self.world_size > 1:
            self._control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # until 2.14
            set_timeout(patience, self._control)  # all have come: patience is with their work
        if use_cpu and not _user_chose_threads():
            torch.set_num_threads(max(1, available_cpus() // self.local_world_size))
        torch.backends.cudnn.benchmark = False  # its choice differs between runs
        torch.backends.cudnn.deterministic = True

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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
        if agreed and self._asked is not None:
            with suppress(RuntimeError):  # another rank may be gone by now
                self._asked[1].wait()
        if self.device.type == "cuda" and self._control is not None and not agreed:
            # NCCL's group would wait, on its way down, for ranks that may be waiting for this one
            dist.destroy_process_group(self._control)
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

    # --- agreement -----------------------------------------------------------------------------

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop. Act on it only where all ranks do."""
        return self._reason is not None

    def asked_to_stop(self) -> bool:
        """Whether some rank had been asked to stop when this was called the last time. Asks again,
        and waits for no rank that is no more than one call behind. Called by all ranks.
        """
        if self._control is None:
            return self.is_asked()
        agreed = False
        if self._asked is not None:
            answer, work = self._asked
            with self.heartbeat.waiting():
                work.wait()
            agreed = bool(answer.item())
        question = torch.tensor(int(self.is_asked()))
        self._asked = question, dist.all_reduce(question, group=self._control, async_op=True)
        return agreed

    @property
    def stop_reason(self) -> str:
        """What to say of a stop that was agreed."""
        return self._reason or "another process's request"

    @property
    def _reason(self) -> str | None:
        return self.stops.reason if self.stops is not None else None

    def agree(self, *, bad_samples: int, failure: Exception | None) -> tuple[bool, int]:
        """One exchange a step: (whether any rank was asked to stop, bad samples of all ranks).

        Raises:
            ``failure`` of the lowest rank that has one, on every rank.
        """
        mine = torch.tensor([int(self.is_asked()), bad_samples, int(failure is not None)])
        stop, bad, failed = self.sum_over_ranks(mine).tolist()
        if failed:
            raise next(error for error in self.gather(failure) if error is not None)
        return stop > 0, bad

    def in_rounds(self, items: Iterable[T], rounds: int, *, what: str) -> Iterator[T | None]:
        """This rank's items, one a round; None once there are no more. Called by all ranks.

        Raises:
            StopRequested: on every rank, if one was asked to stop while doing ``what``.
            RtlDistError: on every rank, that of the lowest rank whose items failed.
        """
        mine = iter(items)
        for _ in range(rounds):
            item, failure = None, None
            try:
                item = next(mine, None)
            except RtlDistError as error:
                failure = error
            if self.agree(bad_samples=0, failure=failure)[0]:
                raise StopRequested(f"stopped while {what}; start the same command again to go on")
            self.heartbeat.beat()
            yield item
        next(mine, None)  # lets it end

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor on the host, in place; of whole numbers it is exact."""
        if self._control is not None:
            with self.heartbeat.waiting():
                dist.all_reduce(values, group=self._control)
        return values

    def mean_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor on the device, which it overwrites."""
        if self.world_size > 1:
            with self.heartbeat.waiting():
                dist.all_reduce(values)
        return values / self.world_size

    def gather(self, item: Any) -> list[Any]:
        """``item`` of every rank, in order of rank, on every rank."""
        if self._control is None:
            return [item]
        items: list[Any] = [None] * self.world_size
        with self.heartbeat.waiting():
            dist.all_gather_object(items, item, group=self._control)
        return items

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on rank 0, on every rank; if it fails there, every rank fails."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = make()
            except RtlDistError as error:
                result[1] = error
            except OSError as error:
                what = "read" if isinstance(error, FileNotFoundError) else "write"
                result[1] = RtlDistError(
                    f"cannot {what} {error.filename or 'a file'}: {error.strerror or error}; free"
                    " space or correct the permissions, then start the same command again"
                )
            except Exception as error:
                self._broadcast([None, RuntimeError(f"rank 0 failed: {error!r}")])
                raise
        self._broadcast(result)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def on_every_rank(self, make: Callable[[], T]) -> T:
        """What ``make`` returns here; if it fails on any rank, every rank fails alike."""
        failure, made = None, []
        try:
            made.append(make())
        except RtlDistError as error:
            failure = error
        self.agree(bad_samples=0, failure=failure)
        return made[0]

    def _broadcast(self, objects: list[Any]) -> None:
        if self._control is not None:
            with self.heartbeat.waiting():
                dist.broadcast_object_list(objects, src=0, group=self._control)

    def gather_to_main(self, item: Any) -> list[Any] | None:
        """``item`` of every rank, in order of rank, on rank 0; None elsewhere."""
        if self._control is None:
            return [item]
        items: list[Any] | None = [None] * self.world_size if self.is_main else None
        with self.heartbeat.waiting():
            dist.gather_object(item, items, dst=0, group=self._control)
        return items

    def require_equal(self, what: str, value: str) -> None:
        """Fails on every rank if ``value`` differs between ranks."""
        values = self.gather(value)
        if len(set(values)) > 1:
            raise RuntimeError(f"ranks disagree on {what}: {dict(enumerate(values))}")


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
