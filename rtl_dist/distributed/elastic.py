"""Elastic launch: which of the processes train when a machine was lost or came back.

torchrun's elastic launch then starts all processes that are left anew, however many they are. But
the microbatches of a global batch are shared equally, so only a number of processes that divides
theirs can train: of three processes and four microbatches, two. The rest stand by: they wait
without computing, end when the others are done, and may train after the next restart.

The processes settle this through torchrun's store, a small key-value server that every process can
reach; it outlives restarts and still holds what earlier processes wrote.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rtl_dist.config import BatchConfig
from rtl_dist.config.recipe import batches_with
from rtl_dist.core.errors import RtlDistError
from rtl_dist.distributed.launchers import COLLECTIVE_TIMEOUT

LOG = logging.getLogger("rtl_dist")
_AS_LONG_AS_IT_TAKES = timedelta(days=365)  # the store wants some limit
_POLL_S = 0.05  # between two looks into the store


@contextmanager
def taking_part(batch: BatchConfig, env: MutableMapping[str, str] = os.environ) -> Iterator[bool]:
    """Decides whether this process trains (use as a context manager around the training).

    Without elastic launch every process does, and nothing else happens.

    Args:
        env: under elastic launch, ``WORLD_SIZE`` and ``LOCAL_WORLD_SIZE`` become those of the
            processes that train.

    Yields:
        True: train; the process group of those that do exists. False: this process stood by, and
        the others are done.

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
        # Rank 0 decides for all: ``batch`` comes from the run folder, which on a shared disk not
        # every machine may see in the same state at this moment.
        if rank == 0:
            size = largest_share(num_microbatches(batch), world_size)
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
    """Makes the default process group of those that train, which Accelerate then finds and uses.

    torch, making it by itself, would look the other processes' addresses up under fixed keys of the
    store, and find those of processes of an earlier start (torch 2.15).

    Args:
        store: torchrun's, with a prefix before every key that no earlier start has used.
        size: how many train; ranks 0 to ``size`` - 1.
    """
    import torch
    import torch.distributed as dist

    from rtl_dist.distributed.devices import local_gpu, uses_gpu

    on_gpu = uses_gpu(env)
    if on_gpu:
        torch.cuda.set_device(local_gpu(env))
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
    )


def largest_share(num_microbatches: int, world_size: int) -> int:
    """How many of ``world_size`` processes train: the most that can share the microbatches of a
    global batch equally."""
    return next(n for n in range(world_size, 0, -1) if num_microbatches % n == 0)


def num_microbatches(batch: BatchConfig) -> int:
    """Of a global batch. With ``batch.micro: auto`` their size is not known yet, so each sample
    counts as one: the number of processes must at least divide ``batch.global``, or, where that is
    not known either, each that may be chosen."""
    may_be = batches_with(batch.micro) if batch.global_ == "auto" else (batch.global_,)
    return math.gcd(*may_be) // (1 if batch.micro == "auto" else batch.micro)


def meet(store: Any, *, rank: int, world_size: int, timeout_s: float = 600.0) -> str:
    """Waits until all ranks of this start are there, and gives them a name in common.

    The difficulty is that the store may still hold what the ranks of an earlier start wrote under
    the same keys. So each rank writes a fresh random word. Rank 0 proposes the list of words it
    finds, some of which may be old; each rank that finds its own word in its place agrees to that
    list; once all have agreed to the same list, no word in it is old, and rank 0 settles on it.

    Args:
        store: torchrun's, or any with its methods.
        timeout_s: for all ranks to come.

    Returns:
        A hash of the list: the same on all ranks, and another at every start.

    Raises:
        RtlDistError: not all ranks came in time.
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
    """The value of a key, without waiting for it; empty where there is none."""
    text: str = store.get(key).decode() if store.check([key]) else ""
    return text


def _is_at(proposal: str, rank: int, word: str) -> bool:
    """Whether the proposed list has the word in the place of that rank."""
    words = json.loads(proposal or "[]")
    return rank < len(words) and words[rank] == word
