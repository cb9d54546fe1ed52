"""What is said when an exchange fails, and that a process whose peer is gone leaves at once.

NCCL's errors are quoted as torch 2.15 and NCCL 2.20 to 2.30 raise them; no GPU is needed.
"""

import os
import threading
import time
import warnings
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from killed_runs import Fault, Kill, Together, replace_everywhere, run_ranks
from tiny_runs import make_dataset, tiny_config, write_config

from rtl_dist.core.errors import DataError
from rtl_dist.distributed import lost_peers
from rtl_dist.distributed.lost_peers import (
    abort_group,
    explained,
    let_go,
    may_wait_for_lost_peers,
)
from rtl_dist.training.stage_trainer import StageTrainer
from rtl_dist.training.step_boundary import StepBoundary

PEER = "another process of this job ended; its own last message says why"
AT = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. "
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
SEE = "(run with NCCL_DEBUG=WARN for details), NCCL version 2.30.7\n"
DUPLICATE = "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5000"
PARTITION = (
    "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENABLE=1 to enable"
    " this configuration."
)
SHM = (
    "Error while creating shared memory segment /dev/shm/nccl-kzT8Qe (size 33030528), error: No"
    " space left on device (28)"
)
FRAMES = "\nException raised from create at NCCLUtils.cpp:94 (most recent call first):\nframe #0: c10::Error"


@pytest.mark.parametrize(
    ("text", "said", "cure"),
    [
        (f"{AT}invalid usage {SEE}{USAGE}\nLast error:\n{DUPLICATE}{FRAMES}", DUPLICATE, "no more processes than there are GPUs"),
        (f"{AT}invalid usage {SEE}{USAGE}\nLast error:\n{PARTITION}", PARTITION.rstrip("."), "(MIG) count as one"),
        (f"{AT}unhandled system error {SEE}{SYSTEM}\nLast error:\n{SHM}\n", SHM, "--shm-size=8g"),
        (f"{AT}internal error {SEE}ncclInternalError: Internal check failed.\nLast error:\nBootstrap : no socket interface found", "Bootstrap : no socket interface found", "NCCL_SOCKET_IFNAME"),
        (f"{AT}unhandled system error {SEE}{SYSTEM}\nLast error:\nsocketPollConnect: connect to 172.17.0.2<37149> failed : No route to host", "connect to 172.17.0.2<37149> failed", "NCCL_SOCKET_IFNAME"),
        (f"{AT}unhandled cuda error {SEE}ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 700 'an illegal memory access'", "Cuda failure 700", "NCCL_DEBUG=WARN"),
        (f"{AT}internal error {SEE}ncclInternalError: Internal check failed.\nLast error:\n\n", "ncclInternalError: Internal check failed", "NCCL_DEBUG=WARN"),
    ],
)  # fmt: skip
def test_nccl_s_own_words_are_passed_on_with_a_cure(text, said, cure):
    told = str(explained(torch.distributed.DistBackendError(text)))
    assert told.startswith("NCCL, by which GPUs exchange gradients, failed: ")
    assert said in told
    assert cure in told
    assert "another process" not in told
    assert "\n" not in told
    assert "frame #0" not in told


@pytest.mark.parametrize(
    "text",
    [
        f"{AT}remote process exited or there was a network error, NCCL version 2.30.7\n{REMOTE}\nLast error:\nsocketProgress: Connection closed by remote peer node2<41182>",
        "NCCL communicator was aborted on rank 1.",
        "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but store->get('0') got error: Connection reset by peer",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=93, OpType=ALLREDUCE, NumelIn=11689512, NumelOut=11689512, Timeout(ms)=1800000) ran for 1800011 milliseconds before timing out.",
    ],
)  # fmt: skip
def test_a_peer_that_went_is_told_as_that(text):
    told = str(explained(torch.distributed.DistBackendError(text)))
    assert told.startswith(f"{PEER} (NCCL: ")


def test_gloo_s_and_others_are_told_apart():
    for text in (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4",
        "Timed out waiting 1800000ms for recv operation to complete",
        "Gloo connectFullMesh failed with Connection refused",
    ):
        assert str(explained(RuntimeError(text))) == PEER
    for error in (RuntimeError("mat1 and mat2 shapes"), ValueError("Connection"), None):
        assert explained(error) is None


# --- leaving -------------------------------------------------------------------------------------


class OnGpus(Fault):
    """As on GPUs: what closes a stage waits, for ever, until the group of a lost peer is aborted."""

    def install(self, mark):
        aborted = threading.Event()

        def waits(close):
            def closing(trainer):
                os.write(mark, b"waits\n")
                aborted.wait()  # in cudaHostUnregister, or in what frees memory
                close(trainer)

            return closing

        def aborts(abort):
            def aborting():
                abort()
                aborted.set()

            return aborting

        replace_everywhere(may_wait_for_lost_peers, lambda _: lambda device: True)
        replace_everywhere(abort_group, aborts)
        replace_everywhere(StageTrainer.close, waits)


@dataclass(frozen=True, kw_only=True)
class Strides(Fault):
    """What DDP says once a process of 1 x 1 convolutions on GPUs."""

    def install(self, mark):
        def warns(backward):
            def warning(*arguments, **named):
                if not said:
                    said.append(True)
                    warnings.warn("Grad strides do not match bucket view strides.", stacklevel=1)
                backward(*arguments, **named)

            said = []
            return warning

        replace_everywhere(Accelerator.backward, warns)


def test_who_lost_a_peer_says_so_and_leaves_though_closing_would_wait(tmp_path):
    dataset = make_dataset(tmp_path)
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run"))
    kill = Kill(place=StepBoundary.cross, call=3, rank=0)
    fault = Together(faults=(OnGpus(), Strides(), OnlyOn(kill)), rank=None)
    started_at = time.monotonic()
    exits = run_ranks(config, world_size=2, fault=fault)
    assert exits[0].code == -9
    assert exits[1].code == 1, exits
    assert exits[1].fired
    assert exits[1].output.count(f"rtl-dist: {PEER}") == 1
    assert "Traceback" not in exits[1].output
    assert "Grad strides" not in exits[1].output
    assert time.monotonic() - started_at < 60


class OnlyOn(Fault):
    """A fault of several ranks that meets one."""

    def __init__(self, fault):
        super().__init__(rank=None)
        object.__setattr__(self, "fault", fault)

    def install(self, mark):
        if os.environ["RANK"] == str(self.fault.rank):
            self.fault.install(mark)


class Left(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("Connection closed by peer"), 1, f"rtl-dist: {PEER}\n"),
        (DataError("shard 3 is damaged"), 3, "rtl-dist: shard 3 is damaged\n"),
        (ZeroDivisionError("by us"), 1, "ZeroDivisionError: by us\n"),
    ],
)
def test_an_abort_that_hangs_is_left_behind(monkeypatch, capfd, error, code, said):
    def leave(number):
        assert number == code
        raise Left

    hangs = threading.Event()
    monkeypatch.setattr(lost_peers, "abort_group", hangs.wait)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left):
        let_go(error, within_s=0.05)
    assert capfd.readouterr().err.endswith(said)
    hangs.set()
    let_go(error, within_s=5.0)  # it ends in time: nobody leaves
