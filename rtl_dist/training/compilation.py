"""Whether compiling a network repays its cost, by trying both ways where much work remains."""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rtl_dist.core.device_memory import Attempt
from rtl_dist.distributed.runtime import Runtime

LOG = logging.getLogger("rtl_dist")
# Below so many images a GPU has done a stage before a trial could pay, at 1,000 images a second. On
# a CPU it does not pay at all: a ResNet-18 in bfloat16 took 145 s to compile and was then no faster
# (0.25 to 0.94 times as fast, two EPYC vCPUs, torch 2.15, 2026-11-21).
_LEAST_IMAGES = 1_200_000
LEAST_S = 20 * 60.0  # of work left, so that a trial that was in vain costs a few percent
_WARMUPS, _REPEATS = 2, 3


def compiling_pays(
    trained: nn.Module,
    make_inputs: Callable[[], torch.Tensor],
    *,
    num_images: int,
    runtime: Runtime,
    what: str,
) -> bool:
    """Rank 0's verdict for all, by the time of forward and backward passes on a copy.

    Args:
        make_inputs: gives one microbatch as ``trained`` takes it.
        num_images: that the stage will train on.
        what: the stage's name.
    """
    if runtime.device.type != "cuda" or num_images < _LEAST_IMAGES:
        return False

    def judge() -> bool:
        inputs = make_inputs()
        with Attempt() as attempt:
            eager_s = time_passes(copy.deepcopy(trained), inputs, runtime)
        if attempt.ran_out:  # two of them are too many, or the microbatch is too large
            return False
        passes = num_images / len(inputs) / runtime.world_size
        if eager_s * passes < LEAST_S:
            return False
        started_at = time.perf_counter()
        try:
            compiled = torch.compile(copy.deepcopy(trained))
            compiled_s = time_passes(compiled, inputs, runtime)
        except Exception as error:  # noqa: BLE001 - a compiler fails in any way; eager always works
            LOG.warning("compile: %s cannot be compiled (%r); it runs as it is", what, error)
            return False
        cost_s = time.perf_counter() - started_at
        pays = (eager_s - compiled_s) * passes > cost_s
        LOG.info(
            "compile: %s takes %.1f ms a microbatch as it is, %.1f ms compiled, which took %.0f s;"
            " about %.0f min of work: %s",
            what,
            eager_s * 1e3,
            compiled_s * 1e3,
            cost_s,
            eager_s * passes / 60,
            "compiled" if pays else "left as it is",
        )
        return pays

    with runtime.heartbeat.phase("compiling", open_ended=runtime.is_main):
        verdict: bool = runtime.from_main(judge)
    # the copies are gone by now; their memory is torch's still, in pieces of their sizes
    gc.collect()
    torch.cuda.empty_cache()
    return verdict


def time_passes(network: Callable[..., Any], inputs: torch.Tensor, runtime: Runtime) -> float:
    """Seconds of a forward and a backward pass, the best of some."""
    best = float("inf")
    for turn in range(_WARMUPS + _REPEATS):
        started_at = time.perf_counter()
        with runtime.accelerator.autocast():
            out = network(inputs)
        out.float().sum().backward()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        if turn >= _WARMUPS:
            best = min(best, time.perf_counter() - started_at)
    return best
