"""Any number of processes: under torchrun's elastic launch some may be left that cannot take part.

The microbatches of a global batch are shared equally, so the number of processes that train must
divide theirs. What is left over stands by, ready for the next restart, and ends with the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rtl_dist.config import BatchConfig
from rtl_dist.core.errors import RtlDistError
from rtl_dist.distributed.launchers import COLLECTIVE_TIMEOUT

LOG = logging.getLogger("rtl_dist")
_AS_LONG_AS_IT_TAKES = timedelta(days=365)
_POLL_S = 0.05


@contextmanager
def taking_part(batch: BatchConfig, env: MutableMapping[str, str] = os.environ) -> Iterator[bool]:
    """Yields whether this process is to train, with ``WORLD_SIZE`` set to the number of those that
    are; for one that is not, once they are done. Without elastic launch all of them are.

    Raises:
        RtlDistError: the other processes, or torchrun's store, are gone.
    """
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0:
        yield True
        return
    import torch.distributed as dist

    try:
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        world_size, rank = int(env["WORLD_SIZE"]), int(env["RANK"])
        meeting = meet(store, rank=rank, world_size=world_size)
        if rank == 0:  # for all: not every machine may see the same run folder at this moment
            size = largest_share(_num_microbatches(batch), world_size)
            store.set(f"{meeting}/size", str(size))
        size = int(store.get(f"{meeting}/size"))
        if rank >= size:
            LOG.warning(
                "process %d stands by: of %d only %d can share the microbatches equally",
                rank,
                world_size,
                size,
            )
            store.wait([f"{meeting}/done"], _AS_LONG_AS_IT_TAKES)
    except dist.DistError as error:
        raise RtlDistError("torchrun's store is gone, or some processes did not come") from error
    if rank >= size:
        yield False
        return
    env["WORLD_SIZE"] = str(size)
    env["LOCAL_WORLD_SIZE"] = str(min(size, int(env["LOCAL_WORLD_SIZE"])))
    if size > 1:
        _make_group(dist.PrefixStore(meeting, store), rank=rank, size=size, env=env)
    yield True
    if rank == 0:
        store.set(f"{meeting}/done", "")


def _make_group(store: Any, *, rank: int, size: int, env: MutableMapping[str, str]) -> None:
    """The group that Accelerate then finds. Made by torch itself it would be made of addresses that
    processes of an earlier start left in the store, which torchrun keeps (torch 2.15)."""
    import torch
    import torch.distributed as dist

    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(env["LOCAL_RANK"]))
    backend = "nccl" if has_gpu else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )


def largest_share(num_microbatches: int, world_size: int) -> int:
    """The most processes, up to ``world_size``, that can share the microbatches equally."""
    return next(n for n in range(world_size, 0, -1) if num_microbatches % n == 0)


def _num_microbatches(batch: BatchConfig) -> int:
    """Of a global batch; with ``micro: auto`` it is not known yet, and may be as large as that."""
    return batch.global_ // (1 if batch.micro == "auto" else batch.micro)


def meet(store: Any, *, rank: int, world_size: int, timeout_s: float = 600.0) -> str:
    """A name for this meeting of all ranks, which no other has, though the store still holds what
    ranks of earlier ones wrote.

    Each rank brings a new word; rank 0 proposes a list of words, and settles on it when every rank
    has said that its own word is the one in that list.

    Raises:
        RtlDistError: not all ranks came.
    """
    mine = uuid.uuid4().hex
    store.set(f"meet/word/{rank}", mine)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if rank == 0:
            proposal = json.dumps([_read(store, f"meet/word/{r}") for r in range(world_size)])
            store.set("meet/proposal", proposal)
        else:
            proposal = _read(store, "meet/proposal")
        name = hashlib.sha256(proposal.encode()).hexdigest()[:16]
        if _is_at(proposal, rank, mine):
            store.set(f"meet/agreed/{rank}", name)
            if rank == 0 and all(
                _read(store, f"meet/agreed/{r}") == name for r in range(world_size)
            ):
                store.set("meet/settled", name)
            if _read(store, "meet/settled") == name:
                return name
        time.sleep(_POLL_S)
    raise RtlDistError(f"not all {world_size} processes came within {timeout_s:.0f} s")


def _read(store: Any, key: str) -> str:
    """The text under a key; empty where there is none."""
    text: str = store.get(key).decode() if store.check([key]) else ""
    return text


def _is_at(proposal: str, rank: int, word: str) -> bool:
    words = json.loads(proposal or "[]")
    return rank < len(words) and words[rank] == word
