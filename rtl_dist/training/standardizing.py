"""The mean and the spread of the features that a head alone is about to be trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch

from rtl_dist.core.device_memory import Attempt
from rtl_dist.core.errors import OutOfMemory
from rtl_dist.data.loading.batch import Batch
from rtl_dist.optim.principal_axes import common_scale
from rtl_dist.training.batches import StageBatches, StageReading
from rtl_dist.training.run import Run
from rtl_dist.training.stage_network import StageNetwork

_SAMPLES = 1024  # images that are measured, at least; all where there are fewer


def standardize_head(
    run: Run, network: StageNetwork, reading: StageReading, batches: StageBatches
) -> None:
    """Measures the features of the stage's first images, cached or not, and lets the head train on
    standardised ones. Called by all ranks, at the start of a stage that trains the head alone.

    The features are centred and divided by one number, the root mean square of their standard
    deviations: features of little spread stay small, as they were in the network's own training.

    Raises:
        StopRequested: on every rank. OutOfMemory: on every rank, if the memory of one does not hold
            a microbatch. RtlDistError: on every rank, if the loader of one failed.
    """
    mean, scale = _measure(run, network, reading, batches)
    for model in run.models():
        model.head.standardize(mean, scale)


def _features(
    network: StageNetwork,
    batches: Iterable[Batch],
    *,
    micro_batch_size: int,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """float64 (n, F) of each microbatch, on the host. Raises OutOfMemory."""
    for batch in batches:
        with Attempt() as attempt:
            features = network.inputs_of(batch.inputs.to(device)).cpu().double()
        if attempt.ran_out:
            raise OutOfMemory(f"out of memory with microbatches of {micro_batch_size}")
        yield features


@torch.no_grad()
def _measure(
    run: Run, network: StageNetwork, reading: StageReading, batches: StageBatches
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (F,) mean and () scale, the same on every rank."""
    runtime = run.runtime
    batch_size = run.config.batch.total
    num_samples = min(_SAMPLES, run.train.num_samples)
    num_steps = min(math.ceil(num_samples / batch_size), reading.end_step - reading.first_step)
    rounds = num_steps * batch_size // run.micro_batch_size // runtime.world_size
    # count, sums and sums of squares: one exchange
    sums = torch.zeros(1 + 2 * run.model.head.in_features, dtype=torch.float64)
    items = batches.at(itertools.islice(reading.positions(), rounds))
    fetched = runtime.heartbeat.while_fetching(items, are_remote=run.train.is_remote)
    computed = _features(
        network, fetched, micro_batch_size=run.micro_batch_size, device=runtime.device
    )
    for features in runtime.in_rounds(computed, rounds, what="measuring features"):
        assert features is not None  # every rank has as many
        sums += torch.cat(
            [torch.tensor([float(len(features))]), features.sum(0), features.square().sum(0)]
        )
    mean, squares = runtime.sum_over_ranks(sums)[1:].div(sums[0]).chunk(2)
    return mean, common_scale(mean, squares - mean.square())
