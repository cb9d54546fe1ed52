"""When an exchange between processes fails: what to say of it, and how to leave without waiting.

Texts in quotes are of gloo, of NCCL 2.30 and of torch 2.15, as they raise them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import threading
import traceback
from contextlib import suppress
from typing import NoReturn

import torch
import torch.distributed as dist

from rtl_dist.core.errors import RtlDistError
from rtl_dist.core.text import shown

ABORT_S = 10.0  # at most, to take the devices' group down
_PEER_ENDED = "another process of this job ended; its own last message says why"
# Gloo says, among others, "Connection closed by peer", "connection reset by peer", "Timed out
# waiting 1800000ms for recv operation to complete" and "Gloo connectFullMesh failed".
_GLOO = ("Connection", "connection", "Timed out waiting", "Gloo")
_NCCL_LOST_IT = (
    "ncclRemoteError",
    "closed by remote peer",  # "socketProgress: Connection closed by remote peer host<port>"
    "onnection closed by peer",
    "onnection reset by peer",
    "remote process exited",
    "remote process exiting",
    "communicator was aborted",
    "collective operation timeout",
    "wait timeout",  # for the first rank's word on where to meet
    "Broken pipe",
)
_NCCL_CURES = {
    ("Duplicate GPU", "same GPU/Partition"): (
        "start no more processes than there are GPUs; the slices of one GPU (MIG) count as one"
    ),
    ("/dev/shm", "shared memory segment"): (
        "give the container more shared memory (docker run --shm-size=8g or --ipc=host), or set"
        " NCCL_SHM_DISABLE=1"
    ),
    ("no socket interface", "onnect to ", "Bootstrap", "socketStart", "No route to host"): (
        "name the network that leads to the other machines by NCCL_SOCKET_IFNAME (ip addr lists"
        " them)"
    ),
    ("out of memory",): "free memory of the GPU (nvidia-smi), or set batch.micro lower",
}
_ASK_NCCL = "NCCL_DEBUG=WARN in the environment has it say more"


def explained(error: BaseException | None) -> RtlDistError | None:
    """What to tell the user of the failure of an exchange; None: it is none."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if "NCCL" in text or "nccl" in text:
        return RtlDistError(_of_nccl(text))
    return RtlDistError(_PEER_ENDED) if any(words in text for words in _GLOO) else None


def _of_nccl(text: str) -> str:
    said = _last_error(text)
    if any(words in text for words in _NCCL_LOST_IT):
        return f"{_PEER_ENDED} (NCCL: {said})"
    cures = (cure for words, cure in _NCCL_CURES.items() if any(word in text for word in words))
    return f"NCCL, by which GPUs exchange gradients, failed: {said}; {next(cures, _ASK_NCCL)}"


def _last_error(text: str) -> str:
    """NCCL's own words: those behind ``Last error:``, else what torch says that their kind means,
    else its first line."""
    text = text.partition("Exception raised from")[0]
    before, _, behind = text.partition("Last error:")
    lines = [" ".join(line.split()) for line in behind.splitlines() if line.strip()]
    if not lines:
        kinds = re.findall(r"nccl[A-Z]\w+: [^\n]*[^\s]", before)
        lines = kinds or [line.strip() for line in before.splitlines() if line.strip()]
    return shown(" ".join(lines[:2]).rstrip(".") or "no reason given")


def may_wait_for_lost_peers(device: torch.device) -> bool:
    """Whether closing what was opened may wait for a rank that is gone: on a GPU a kernel of NCCL's
    waits for it, and what frees memory or unlocks the host's waits for the kernel."""
    return device.type == "cuda"


def abort_group() -> None:
    """Takes the group in which the devices exchange down, without the other ranks."""
    if dist.is_initialized() and dist.group.WORLD is not None:
        dist.group.WORLD.abort()


def let_go(error: BaseException, *, within_s: float = ABORT_S) -> None:
    """Before a process that failed closes what it has opened. If another rank is gone, tells so at
    once; then aborts the group, so that nothing waits in it any more. Where that does not help in
    time, the process ends here."""
    reason = explained(error)
    if reason is not None:
        _say(f"rtl-dist: {reason}")
    thread = threading.Thread(target=_abort_quietly, name="abort", daemon=True)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        _leave(error, is_told=reason is not None)


def _abort_quietly() -> None:
    with suppress(Exception):  # it is taken down as the process ends
        abort_group()


def _leave(error: BaseException, *, is_told: bool) -> NoReturn:
    if isinstance(error, RtlDistError):
        _say(f"rtl-dist: {shown(str(error))}")
    elif not is_told:
        traceback.print_exception(error)
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, RtlDistError) else RtlDistError.exit_code)


def _say(line: str) -> None:
    with suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
