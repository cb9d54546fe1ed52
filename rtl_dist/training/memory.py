"""The largest microbatch that a GPU's memory holds, found by trying."""

from __future__ import annotations

import gc
import logging

import torch

from rtl_dist.config import Config
from rtl_dist.core.device_memory import Attempt
from rtl_dist.core.errors import UserError
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.model.build import make_classifier
from rtl_dist.model.classifier import Classifier, place
from rtl_dist.training.sharing import require_shareable

LOG = logging.getLogger("rtl_dist")
_LARGEST = 512  # images; beyond it no ResNet gets faster
_CPU_LIMIT = 32  # a CPU's speed does not grow beyond, its memory's use does
USABLE = 0.9  # of the memory: what a run meets later may be a little more than the probe


def resolve_micro_batch_size(config: Config, runtime: Runtime, *, num_classes: int) -> int:
    """The canonical microbatch: the configured one, or for auto the largest divisor of a rank's
    share of the global batch that every rank's device takes. Called by all ranks.

    Raises:
        UserError: the processes cannot share the batch equally, or not one image fits.
    """
    require_shareable(config, runtime.world_size)
    if config.batch.micro != "auto":
        return config.batch.micro
    share = config.batch.total // runtime.world_size
    divisors = [size for size in range(share, 0, -1) if share % size == 0]
    if runtime.device.type == "cuda":
        sizes = [size for size in divisors if size <= _LARGEST]
        return largest_that_fits(config, runtime, sizes, num_classes)
    # 1 only if there is nothing else: BatchNorm cannot learn from one image
    small = [size for size in divisors if 1 < size <= _CPU_LIMIT]
    return small[0] if small else min(size for size in divisors if size > 1 or share == 1)


def largest_that_fits(config: Config, runtime: Runtime, sizes: list[int], num_classes: int) -> int:
    """The first of ``sizes`` that fits on every rank, by training steps of a network of the same
    shape, all of it trained, at the largest image size of any stage."""
    model = make_classifier(config.model, config.data, num_classes=num_classes, seed=config.seed)
    place(model, runtime.device, runtime.dtype)
    model.train()
    side = max(stage.image_size or config.data.image_size for stage in config.stages)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for size in sizes:
        if size == 1:  # where BatchNorm learns, a run refuses it for what it is
            model.eval()
        fits = _fits(model, optimizer, (size, config.data.channels, side, side), runtime)
        _free(runtime.device)
        if all(runtime.gather(fits)):
            LOG.info("batch.micro: %d fits the memory of every process", size)
            return size
    raise UserError(
        f"batch.micro: not one image of {side} x {side} fits the memory of this device; use a"
        " smaller model or data.image_size"
    )


def _fits(
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    shape: tuple[int, ...],
    runtime: Runtime,
) -> bool:
    """Whether two whole steps with images of ``shape`` leave some of the memory."""
    with Attempt() as attempt:
        for _ in range(2):
            images = torch.zeros(shape, dtype=torch.uint8, device=runtime.device)
            with runtime.accelerator.autocast():
                scores = model(images)
            scores.float().sum().backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if attempt.ran_out:
        return False
    if runtime.device.type != "cuda":
        return True
    free, of_device = torch.cuda.mem_get_info(runtime.device)
    others = of_device - free - torch.cuda.memory_reserved(runtime.device)
    return torch.cuda.max_memory_reserved(runtime.device) + others <= USABLE * of_device


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
