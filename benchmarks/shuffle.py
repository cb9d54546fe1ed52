"""How well orders of samples are mixed: ours, webdataset's and MosaicML Streaming's.

No image is read: each side says which samples a rank's batches hold, for 128 shards of 1,000
samples, 8 ranks of 4 workers, batches of 64 a rank, over two epochs.

    python benchmarks/shuffle.py [--streaming PYTHON]

``--streaming`` is the interpreter of an environment of its own with
``pip install numpy && pip install --no-deps mosaicml-streaming``; without it that side is left out.
Under a minute on one CPU core; the same figures each time.

chi2/df   of the class histogram of a rank's batch, mean over all batches: 1 is a random draw. For
          shards sorted by class, of 100 and of 10 classes, and for shards that a packer shuffled.
same      share of neighbours in a rank's stream that come from one shard (1/128 at random).
distance  median distance of neighbours in the source, over that of a random draw.
kept      share of a rank's samples that it had in the epoch before (1/8 at random).
in use    most shards that any 4 steps in a row need or will need again, so that a smaller cache
          would fetch some twice an epoch.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from rtl_dist.data.order.base import TrainingStream
from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.data.order.windows import WindowOrder

NUM_SHARDS, SHARD_SIZE = 128, 1000
NUM_SAMPLES = NUM_SHARDS * SHARD_SIZE
RANKS, WORKERS, BATCH = 8, 4, 64
SEEDS = (0, 1, 2)
BUFFER = 5000
STEPS_AT_ONCE = 4  # loader workers are some batches apart

# One epoch of one rank: its batches, int64 (num_batches, BATCH).
RankBatches = np.ndarray
# (seed, epoch) -> the batches of each rank
Loading = Callable[[int, int], list[RankBatches]]

# Streaming's modules without its package's own imports, which want torch and five clouds' SDKs.
STREAMING = """
import importlib.util, json, sys, types, warnings
import numpy as np
warnings.simplefilter("ignore")
root = importlib.util.find_spec("streaming").submodule_search_locations[0]
for name, folder in (("streaming", root), ("streaming.base", root + "/base")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle
ask = json.loads(sys.argv[1])
sizes = np.array([ask["shard_size"]] * ask["num_shards"], np.int64)
ids = get_shuffle("py1e", sizes, ask["nodes"], ask["seed"], ask["epoch"], ask["block"])
plan = get_partitions("relaxed", len(ids), ask["nodes"], ask["nodes"],
                      ask["ranks"] // ask["nodes"], ask["workers"], ask["batch"])
np.save(sys.stdout.buffer, np.where(plan < 0, -1, ids[plan]))
"""


# --- the orders ----------------------------------------------------------------------------------


def ours(seed: int, epoch: int, *, window: int | None) -> list[RankBatches]:
    sizes = np.full(NUM_SHARDS, SHARD_SIZE)
    order: TrainingStream = EpochOrder(shard_sizes=sizes, seed=seed)
    if window is not None:
        order = WindowOrder(shard_sizes=sizes, seed=seed, window=window)
    return shared_among_ranks(order.samples_at(epoch * NUM_SAMPLES, NUM_SAMPLES)[0])


def plain_windows(seed: int, epoch: int, *, window: int) -> list[RankBatches]:
    """What a window mostly is: shards in a random order, so many at a time, each lot shuffled."""
    random = np.random.default_rng([seed, epoch])
    shards = random.permutation(NUM_SHARDS)
    samples = (shards[:, None] * SHARD_SIZE + np.arange(SHARD_SIZE)).reshape(-1)
    lot = window * SHARD_SIZE
    return shared_among_ranks(
        np.concatenate(
            [random.permutation(samples[i : i + lot]) for i in range(0, NUM_SAMPLES, lot)]
        )
    )


def shared_among_ranks(stream: np.ndarray) -> list[RankBatches]:
    steps = len(stream) // (RANKS * BATCH)
    batches = stream[: steps * RANKS * BATCH].reshape(steps, RANKS, BATCH)
    return [batches[:, rank] for rank in range(RANKS)]


def webdataset(seed: int, epoch: int, *, buffer: int) -> list[RankBatches]:
    """webdataset's own splitting and shuffling, shards and then samples; no tar is read."""
    import webdataset as wds

    def samples_of(shards: Iterable[dict[str, Any]]) -> Iterator[int]:
        for shard in shards:
            first = int(shard["url"]) * SHARD_SIZE
            yield from range(first, first + SHARD_SIZE)

    def of_worker(rank: int, worker: int) -> np.ndarray:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(RANKS), WORKER=str(worker), NUM_WORKERS=str(WORKERS)
        )
        key = (seed * RANKS + rank) * WORKERS + worker
        pipeline = wds.DataPipeline(
            wds.SimpleShardList([str(shard) for shard in range(NUM_SHARDS)]),
            wds.split_by_node,
            wds.split_by_worker,
            wds.detshuffle(100, seed=1000 * key, epoch=epoch - 1),
            samples_of,
            wds.detshuffle(buffer, seed=1000 * key, epoch=epoch - 1),
        )
        return batched(np.fromiter(pipeline, np.int64))

    variables = ("RANK", "WORLD_SIZE", "WORKER", "NUM_WORKERS")
    before = {name: os.environ[name] for name in variables if name in os.environ}
    try:
        return [
            in_turns([of_worker(rank, worker) for worker in range(WORKERS)])
            for rank in range(RANKS)
        ]
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def streaming(seed: int, epoch: int, *, python: str, nodes: int, block: int) -> list[RankBatches]:
    """Streaming's own shuffle and partition, its default algorithm."""
    ask = {
        **{"shard_size": SHARD_SIZE, "num_shards": NUM_SHARDS, "nodes": nodes, "ranks": RANKS},
        **{"workers": WORKERS, "batch": BATCH, "seed": seed, "epoch": epoch, "block": block},
    }
    done = subprocess.run(
        [python, "-c", STREAMING, json.dumps(ask)], capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"streaming in {python} failed:\n{done.stderr.decode()}")
    plan = np.load(io.BytesIO(done.stdout)).reshape(RANKS, WORKERS, -1, BATCH)
    return [in_turns([batched(part[part >= 0]) for part in of_rank]) for of_rank in plan]


def batched(samples: np.ndarray) -> RankBatches:
    return samples[: len(samples) // BATCH * BATCH].reshape(-1, BATCH)


def in_turns(of_workers: list[RankBatches]) -> RankBatches:
    """As a DataLoader asks its workers: a batch of each in turn."""
    turns = min(len(batches) for batches in of_workers)
    return np.stack([batches[:turns] for batches in of_workers], 1).reshape(-1, BATCH)


# --- the measures --------------------------------------------------------------------------------


def chi_squared(ranks: list[RankBatches], labels: np.ndarray) -> float:
    num_classes = int(labels.max()) + 1
    expected = BATCH / num_classes
    batches = labels[np.concatenate(ranks)]
    rows = np.arange(len(batches))[:, None] * num_classes
    counts = np.bincount((rows + batches).ravel(), minlength=len(batches) * num_classes)
    return float(((counts - expected) ** 2).mean() / expected * num_classes / (num_classes - 1))


def same_shard(ranks: list[RankBatches]) -> float:
    shards = [batches.ravel() // SHARD_SIZE for batches in ranks]
    return float(np.mean([np.mean(s[1:] == s[:-1]) for s in shards]))


def distance(ranks: list[RankBatches]) -> float:
    gaps = np.concatenate([np.abs(np.diff(batches.ravel())) for batches in ranks])
    return float(np.median(gaps) / NUM_SAMPLES / (1 - 0.5**0.5))


def kept(before: list[RankBatches], after: list[RankBatches]) -> float:
    return float(np.mean([np.isin(b, a).mean() for a, b in zip(before, after, strict=True)]))


def in_use(ranks: list[RankBatches]) -> int:
    steps = max(len(batches) for batches in ranks)
    begun, finished = np.full(NUM_SHARDS, steps), np.full(NUM_SHARDS, -1)
    for batches in ranks:
        step = np.repeat(np.arange(len(batches)), BATCH)
        shard = batches.ravel() // SHARD_SIZE
        np.minimum.at(begun, shard, step)
        np.maximum.at(finished, shard, step)
    return max(
        int(((begun < step + STEPS_AT_ONCE) & (step <= finished)).sum()) for step in range(steps)
    )


def report(name: str, loading: Loading) -> None:
    sorted_by_class = {k: np.arange(NUM_SAMPLES) * k // NUM_SAMPLES for k in (100, 10)}
    packed = np.random.default_rng(0).permutation(sorted_by_class[100])
    rows = []
    for seed in SEEDS:
        first, second = loading(seed, 0), loading(seed, 1)
        rows.append(
            [
                *(chi_squared(second, labels) for labels in sorted_by_class.values()),
                chi_squared(second, packed),
                same_shard(second),
                distance(second),
                kept(first, second),
                in_use(second),
            ]
        )
    mean = np.mean(rows, axis=0)
    print(
        f"{name:42} {mean[0]:8.2f} {mean[1]:8.2f} {mean[2]:8.2f} {mean[3]:8.3f} {mean[4]:8.2f}"
        f" {mean[5]:8.3f} {mean[6]:8.0f}",
        flush=True,
    )


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streaming", metavar="PYTHON")
    arguments = parser.parse_args()
    print(
        f"{NUM_SHARDS} shards of {SHARD_SIZE:,}, {RANKS} ranks x {WORKERS} workers, batches of"
        f" {BATCH} a rank, seeds {SEEDS}; numpy {np.__version__}, webdataset"
        f" {importlib.metadata.version('webdataset')}\n"
    )
    print(f"{'':42} {'chi2/df by kind of shards':^26}")
    columns = ("100 cl.", "10 cl.", "packed", "same", "distance", "kept", "in use")
    print(f"{'':42} {' '.join(f'{column:>8}' for column in columns)}")
    report("rtl_dist full", functools.partial(ours, window=None))
    for window in (8, 16, 32):
        report(f"rtl_dist window {window}", functools.partial(ours, window=window))
    report("plain windows of 16", functools.partial(plain_windows, window=16))
    if arguments.streaming is None:
        print("Streaming py1e: left out, see --streaming")
    else:
        for title, nodes, block in (
            ("default block, 1 node", 1, 4_000_000),
            ("default block, 8 nodes", 8, 4_000_000 // 8),
            ("block of 20 shards, 1 node", 1, 20 * SHARD_SIZE),
            ("block of 28 shards, 1 node", 1, 28 * SHARD_SIZE),
        ):
            report(
                f"Streaming py1e, {title}",
                functools.partial(streaming, python=arguments.streaming, nodes=nodes, block=block),
            )
    report(f"webdataset, buffer {BUFFER:,}", functools.partial(webdataset, buffer=BUFFER))


if __name__ == "__main__":
    main()
