"""Opening, planning and seeking in 10^9 samples of 10^5 shards for 1,024 ranks, on one core.

The description and the index are real files (the index, 24 GB, is sparse) and are opened by the
same calls as training's. Each line is a process of its own, without torch, as a loader worker or a
tool would be; the promise is under a second and under 200 MB for imports, opening, the first batch
and any later position together. Then: what a batch's order costs in small and large data, and that
1,024 ranks share a step's positions without gap or overlap.

    python benchmarks/scale.py [--folder FOLDER] [--shards 100000]

It fails where the promise is not kept. About half a minute; Linux, for the memory figures; FOLDER's
file system must know sparse files. Times are of CPU and wall on whatever else the machine does; the
ratios are what counts.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rtl_dist.core.files import write_json
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.data.format.dataset import INDEX_FOLDER
from rtl_dist.data.format.description import DESCRIPTION, FORMAT, fingerprint_of
from rtl_dist.data.format.split import INDEX_DTYPE
from rtl_dist.data.order.base import TrainingStream
from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.data.order.windows import WindowOrder

NUM_SHARDS, SHARD_SIZE = 10**5, 10**4
NUM_SAMPLES = NUM_SHARDS * SHARD_SIZE
NUM_CLASSES = 1000
WORLD, MICRO = 1024, 32
GLOBAL = WORLD * MICRO
EPOCH = 7
WINDOW = 16
MOST_SECONDS, MOST_MB = 1.0, 200

# What a fresh process does; nothing is imported that the figures would not count.
CHILD = """
import time
began = time.perf_counter(), time.process_time()
import json, sys
ask = json.loads(sys.argv[1])
from rtl_dist.config import DataConfig
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.order.training import training_order
marks = [("import", time.perf_counter())]
split = open_dataset(ask["folder"]).split("train")
marks.append(("open", time.perf_counter()))
order = training_order(split, DataConfig(path=ask["folder"], **ask["data"]), seed=0)
def locate(position):
    samples, _ = order.samples_at(position, ask["micro"])
    return [split.row(sample) for sample in samples.tolist()], split.labels(samples)
locate(ask["first"])
marks.append(("first", time.perf_counter()))
locate(ask["later"])
marks.append(("seek", time.perf_counter()))
total, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
memory = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line)
ahead = order.shards_ahead(ask["later"])
began_ahead = time.perf_counter()
for _ in range(ask["ahead"]):
    next(ahead)
answer = {"ahead": time.perf_counter() - began_ahead}
last = began[0]
for name, at in marks:
    answer[name], last = at - last, at
answer |= {"total": total, "cpu": cpu, "mb": memory / 1024, "torch": "torch" in sys.modules}
print(json.dumps(answer))
"""


def make_dataset(folder: Path, num_shards: int) -> None:
    num_samples = num_shards * SHARD_SIZE
    shards = [
        {
            "path": f"train/train-{number:06}.tar",
            "num_samples": SHARD_SIZE,
            "bytes": SHARD_SIZE * 110_592,
            "sha256": hashlib.sha256(str(number).encode()).hexdigest(),
        }
        for number in range(num_shards)
    ]
    description = {
        "format": FORMAT,
        "task": SINGLE_LABEL,
        "classes": [f"class-{number:04}" for number in range(NUM_CLASSES)],
        "splits": {
            "train": {
                "num_samples": num_samples,
                "class_counts": [num_samples // NUM_CLASSES] * NUM_CLASSES,
                "shards": shards,
                "index_sha256": "0" * 64,
            }
        },
    }
    description["fingerprint"] = fingerprint_of(description)
    write_json(folder / DESCRIPTION, description)
    (folder / INDEX_FOLDER).mkdir()
    np.lib.format.open_memmap(
        folder / INDEX_FOLDER / "train.npy", mode="w+", dtype=INDEX_DTYPE, shape=(num_samples,)
    )


def positions_of(rank: int, step: int) -> list[int]:
    from rtl_dist.data.loading.microbatches import microbatch_positions

    return list(
        microbatch_positions(
            step,
            step + 1,
            global_batch_size=GLOBAL,
            micro_batch_size=MICRO,
            rank=rank,
            world_size=WORLD,
        )
    )


def in_fresh_process(
    folder: Path, num_samples: int, rank: int, window: int | None
) -> dict[str, float]:
    later_step = int((EPOCH + 0.618) * num_samples) // GLOBAL
    ask = {
        "folder": str(folder),
        "data": {} if window is None else {"shuffle": "window", "window": window},
        "micro": MICRO,
        "first": positions_of(rank, 0)[0],
        "later": positions_of(rank, later_step)[0],
        "ahead": 2 * WINDOW,
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(ask)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def microseconds(asked: dict[str, Callable[[], object]], rounds: int = 100) -> dict[str, float]:
    """Median times of calls made in turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, call in asked.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def cost_of_batches() -> None:
    sizes = {
        "10^6 samples, 10^2 shards": (10**2, 10**4),
        "10^9 samples, 10^2 shards": (10**2, 10**7),
        "10^9 samples, 10^5 shards": (10**5, 10**4),
    }
    print(f"\nsamples and shards of {MICRO} positions, us (median, at random in epoch {EPOCH})")
    for shuffle, window in (("full", None), (f"window {WINDOW}", WINDOW)):
        asked: dict[str, Callable[[], object]] = {}
        for name, (num_shards, shard_size) in sizes.items():
            shards = np.full(num_shards, shard_size)
            order: TrainingStream = EpochOrder(shard_sizes=shards, seed=0)
            if window is not None:
                order = WindowOrder(shard_sizes=shards, seed=0, window=window)
            random = np.random.default_rng(0)

            def locate(
                order: TrainingStream = order, random: np.random.Generator = random
            ) -> object:
                position = EPOCH * order.num_samples + int(
                    random.integers(order.num_samples - MICRO)
                )
                return order.shards_of(order.samples_at(position, MICRO)[0])

            locate()  # plans the epoch
            asked[name] = locate
        found = microseconds(asked)
        least = next(iter(found.values()))
        for name, cost in found.items():
            print(f"  {shuffle:10} {name:28} {cost:7.0f}   x {cost / least:.2f}")


def check_partition() -> None:
    for step in (0, NUM_SAMPLES // GLOBAL, 10**6):
        starts = itertools.chain.from_iterable(positions_of(rank, step) for rank in range(WORLD))
        covered = (np.fromiter(starts, np.int64)[:, None] + np.arange(MICRO)).ravel()
        if not np.array_equal(np.sort(covered), np.arange(step * GLOBAL, (step + 1) * GLOBAL)):
            sys.exit(f"step {step}: the ranks do not share its positions")
    print(
        f"\n{WORLD:,} ranks x {MICRO} take each of a step's {GLOBAL:,} positions once (3 steps,"
        " one over the end of an epoch)"
    )


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument(
        "--shards", type=int, default=NUM_SHARDS, help="at least 5000, or the index is read whole"
    )
    arguments = parser.parse_args()
    num_shards, num_samples = arguments.shards, arguments.shards * SHARD_SIZE
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_dataset(folder, num_shards)
        size = (folder / DESCRIPTION).stat().st_size
        print(f"{num_samples:,} samples, {num_shards:,} shards, {DESCRIPTION} {size / 1e6:.1f} MB")
        columns = ("import", "open", "first ms", "seek ms", "all s", "CPU s", "peak MB", "ahead ms")
        print(f"{'':20} {' '.join(f'{column:>8}' for column in columns)}")
        worst_s = worst_mb = 0.0
        for window, rank in itertools.product((None, WINDOW), (0, WORLD // 2 - 1, WORLD - 1)):
            found = in_fresh_process(folder, num_samples, rank, window)
            if found["torch"]:
                sys.exit("torch was imported, which the promise leaves no room for")
            shuffle = "full" if window is None else f"window {window}"
            print(
                f"{shuffle:10} rank {rank:4} {found['import']:8.2f} {found['open']:8.2f}"
                f" {1e3 * found['first']:8.1f} {1e3 * found['seek']:8.1f} {found['total']:8.2f}"
                f" {found['cpu']:8.2f} {found['mb']:8.0f} {1e3 * found['ahead']:8.1f}",
                flush=True,
            )
            worst_s, worst_mb = max(worst_s, found["cpu"]), max(worst_mb, found["mb"])
        kept = worst_s < MOST_SECONDS and worst_mb < MOST_MB
        print(
            f"under {MOST_SECONDS:.0f} s of CPU and {MOST_MB} MB: {'yes' if kept else 'NO'}"
            f" (most: {worst_s:.2f} s, {worst_mb:.0f} MB)"
        )
    cost_of_batches()
    check_partition()
    if not kept:
        sys.exit("the promise is not kept")


if __name__ == "__main__":
    main()
