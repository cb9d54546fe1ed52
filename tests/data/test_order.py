"""The order of the stream: permutations, their concatenation, their quality, and pinned values."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_sets import packed

from rtl_dist.core.keys import derive_key
from rtl_dist.data.images.augment import augmentation_keys
from rtl_dist.data.loading.microbatches import microbatch_positions
from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.data.order.permutation import permute

SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 1024, 4097]


def samples_at(first, count, *, n, seed):
    return EpochOrder(shard_sizes=np.array([n]), seed=seed).samples_at(first, count)


def stream(first, count, *, n, seed=0):
    return samples_at(first, count, n=n, seed=seed)[0]


@pytest.mark.parametrize("n", SIZES)
def test_each_sample_comes_once_an_epoch(n):
    for key in range(5):
        permuted = permute(np.arange(n), num_samples=n, key=derive_key(key))
        assert sorted(permuted.tolist()) == list(range(n))
    samples, epochs = samples_at(0, 3 * n, n=n, seed=7)
    assert epochs.tolist() == [0] * n + [1] * n + [2] * n
    for epoch in range(3):
        assert sorted(samples[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@pytest.mark.parametrize("n", SIZES)
def test_any_piece_of_the_stream_is_the_same_piece(n):
    whole = stream(0, 4 * n + 5, n=n)
    for first in {0, 1, n // 2, n - 1, n, n + 1, 2 * n - 1, 4 * n}:
        for count in {1, 2, 5, n}:
            if first + count <= len(whole):
                piece = stream(first, count, n=n)
                assert piece.tolist() == whole[first : first + count].tolist()


def test_the_tail_of_an_epoch_shares_a_batch_with_the_head_of_the_next():
    n, batch = 10, 4
    samples, epochs = samples_at(2 * batch, batch, n=n, seed=0)
    assert epochs.tolist() == [0, 0, 1, 1]
    assert samples.tolist() == [*stream(8, 2, n=n), *stream(10, 2, n=n)]
    # a batch may even hold several epochs
    samples, epochs = samples_at(0, 7, n=3, seed=0)
    assert epochs.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert sorted(samples[:3].tolist()) == sorted(samples[3:6].tolist()) == [0, 1, 2]


def test_the_order_differs_by_epoch_and_seed_and_only_by_these():
    n = 1000
    epochs = [stream(epoch * n, n, n=n).tolist() for epoch in range(4)]
    seeds = [stream(0, n, n=n, seed=seed).tolist() for seed in (1, 2, 2**63 - 1)]
    orders = [tuple(order) for order in [*epochs, *seeds]]
    assert len(set(orders)) == len(orders)
    assert stream(0, n, n=n).tolist() == epochs[0]
    # no more agreement than chance: on average one of n positions
    agreements = [
        sum(a == b for a, b in zip(one, other, strict=True))
        for i, one in enumerate(orders)
        for other in orders[:i]
    ]
    assert max(agreements) <= 8


# --- quality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5, 12, 40])
def test_where_a_sample_lands_is_uniform(n):
    """Counts of (position, sample) over many epochs against the uniform's, by chi squared."""
    trials = 1500
    counts = np.zeros((n, n))
    for epoch in range(trials):
        counts[np.arange(n), permute(np.arange(n), num_samples=n, key=derive_key(1, epoch))] += 1
    # rows and columns both sum to a constant, hence (n - 1)^2 degrees of freedom and the factor
    chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum() * (n - 1) / n
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1000, 4096, 5000])
def test_blocks_of_neighbours_are_spread_over_batches(n):
    """Samples numbered next to each other (a class, a shard) must fall on batches as at random."""
    batch, blocks = 100, 10
    of_block = np.arange(n) * blocks // n
    chi2, freedom = 0.0, 0
    for seed in range(10):
        order = stream(0, n, n=n, seed=seed)
        for first in range(0, n - batch + 1, batch):
            counts = np.bincount(of_block[order[first : first + batch]], minlength=blocks)
            chi2 += ((counts - batch / blocks) ** 2 / (batch / blocks)).sum()
            freedom += blocks - 1
    # sampling without replacement: a little below 1
    assert 0.8 < chi2 / freedom / (1 - batch / n) < 1.2


@pytest.mark.parametrize("n", [64, 1000])
def test_a_sample_and_its_successor_are_independent(n):
    gaps = np.zeros(n)
    for seed in range(400):
        gaps += np.bincount(np.diff(stream(0, n, n=n, seed=seed)) % n, minlength=n)
    gaps = gaps[1:]
    chi2 = ((gaps - gaps.mean()) ** 2 / gaps.mean()).sum()
    assert abs(chi2 - (n - 2)) < 5 * math.sqrt(2 * n)


READ_WITHOUT_TORCH = """
import json, sys
from rtl_dist.config import DataConfig
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.order.training import training_order
folder, options = json.loads(sys.argv[1])
split = open_dataset(folder).split("train")
samples, _ = training_order(split, DataConfig(path=folder, **options), seed=0).samples_at(25, 4)
assert len(split.labels(samples)) == 4
assert all(SampleReader(split).read(sample) for sample in samples.tolist())
assert "torch" not in sys.modules, [name for name in sys.modules if name.startswith("rtl_dist")]
"""


def test_opening_planning_and_reading_need_no_torch(tmp_path):
    """It takes seconds and hundreds of megabytes to import, which tools and workers may spare."""
    folder = packed(tmp_path, {"train/a": 5, "train/b": 5}).where
    for options in ({}, {"shuffle": "window", "window": 1}, {"sampling": "balanced"}):
        ask = json.dumps([folder, options])
        subprocess.run([sys.executable, "-c", READ_WITHOUT_TORCH, ask], check=True)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_a_large_index_is_not_read_ahead(tmp_path, monkeypatch):
    """Reading one row of 24 GB brought in 8 MB where the disk reads that far ahead."""
    dataset = packed(tmp_path, {"train/a": 5, "train/b": 5})
    split = dataset.split("train")
    assert not is_mapped_for_random_reads(split)
    monkeypatch.setattr("rtl_dist.data.format.dataset.CHECKED_INDEX_BYTES", 100)
    large = dataset.split("train")
    assert is_mapped_for_random_reads(large)
    assert large.index.tolist() == split.index.tolist()


def is_mapped_for_random_reads(split):
    address = split.index.__array_interface__["data"][0]
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags"):
            return " rr " in f"{line} "
    raise AssertionError("the index is not mapped")


# --- pinned: these may change only with the format of a run ---------------------------------------


def test_golden_order():
    assert stream(0, 12, n=10).tolist() == [1, 4, 2, 9, 5, 8, 3, 7, 0, 6, 1, 2]
    assert stream(5 * 1000 + 3, 8, n=1000, seed=42).tolist() == [
        382,
        67,
        676,
        437,
        193,
        913,
        134,
        884,
    ]
    assert stream(10**12, 4, n=10**9, seed=1).tolist() == [
        214462583,
        604826971,
        143254238,
        627734794,
    ]


def test_golden_augmentation_keys():
    samples, epochs = np.array([0, 1, 2, 0]), np.array([0, 0, 0, 1])
    keys = augmentation_keys(samples, epochs, seed=0, views=None)
    assert keys.tolist() == [
        8165509219603647837,
        4705104312642890191,
        1707375331312050506,
        7146267481944312672,
    ]


def test_every_sample_view_and_seed_has_a_key_of_its_own():
    samples, epochs = np.tile(np.arange(300), 5), np.repeat(np.arange(5), 300)
    keys = np.concatenate(
        [augmentation_keys(samples, epochs, seed=seed, views=None) for seed in (0, 1)]
    )
    assert len(np.unique(keys)) == 3000
    assert keys.min() >= 0
    cycled = augmentation_keys(samples, epochs, seed=0, views=2)
    assert cycled[600:1200].tolist() == cycled[:600].tolist() == keys[:600].tolist()


# --- microbatches --------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_take_consecutive_runs_of_a_steps_microbatches(world_size):
    batch, micro, first, end = 64, 8, 3, 7
    of_rank = [
        list(
            microbatch_positions(
                first,
                end,
                global_batch_size=batch,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
            )
        )
        for rank in range(world_size)
    ]
    share = batch // micro // world_size
    assert {len(positions) for positions in of_rank} == {share * (end - first)}
    together = [
        position
        for step in range(end - first)
        for positions in of_rank
        for position in positions[step * share : (step + 1) * share]
    ]
    assert together == list(range(first * batch, end * batch, micro))


def test_microbatches_are_the_same_pieces_of_the_stream_at_any_world_size():
    n, batch, micro = 50, 32, 4

    def samples_of_step(step, world_size):
        return [
            sample
            for rank in range(world_size)
            for position in microbatch_positions(
                step,
                step + 1,
                global_batch_size=batch,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
            )
            for sample in stream(position, micro, n=n).tolist()
        ]

    for step in range(4):
        expected = stream(step * batch, batch, n=n).tolist()
        assert all(samples_of_step(step, world) == expected for world in (1, 2, 4, 8))


def test_positions_are_never_held_all_at_once():
    positions = microbatch_positions(
        0, 10**15, global_batch_size=8, micro_batch_size=4, rank=1, world_size=2
    )
    assert [next(positions) for _ in range(3)] == [4, 12, 20]
