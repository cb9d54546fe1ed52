"""The order of the stream: permutations, their concatenation, their quality, and pinned values."""

import math
import tracemalloc

import numpy as np
import pytest

from rtl_dist.data.augment import augmentation_keys
from rtl_dist.data.loader import microbatch_positions
from rtl_dist.data.order import derive_key, mix64, permute, samples_at

SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 1024, 4097]


def stream(first, count, *, n, seed=0):
    return samples_at(first, count, num_samples=n, seed=seed)[0]


@pytest.mark.parametrize("n", SIZES)
def test_each_sample_comes_once_an_epoch(n):
    for key in range(5):
        permuted = permute(np.arange(n), num_samples=n, key=derive_key(key))
        assert sorted(permuted.tolist()) == list(range(n))
    samples, epochs = samples_at(0, 3 * n, num_samples=n, seed=7)
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
    samples, epochs = samples_at(2 * batch, batch, num_samples=n, seed=0)
    assert epochs.tolist() == [0, 0, 1, 1]
    assert samples.tolist() == [*stream(8, 2, n=n), *stream(10, 2, n=n)]
    # a batch may even hold several epochs
    samples, epochs = samples_at(0, 7, num_samples=3, seed=0)
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


def test_keys_do_not_collide():
    keys = {derive_key(a, b) for a in range(100) for b in range(100)}
    assert len(keys) == 10_000
    assert derive_key(1, 2) != derive_key(2, 1)
    assert derive_key(1) != derive_key(1, 0)
    assert derive_key(-1) == derive_key(2**64 - 1)  # any whole number will do
    assert all(0 <= key < 2**64 for key in keys)


def test_mixing_is_one_to_one_on_what_was_tried():
    assert len(np.unique(mix64(np.arange(100_000, dtype=np.uint64)))) == 100_000


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_any_position_of_a_huge_data_set_costs_the_same():
    n = 10**9 + 7
    tracemalloc.start()
    samples, epochs = samples_at(1000 * n - 500, 1000, num_samples=n, seed=3)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 2_000_000
    assert epochs.tolist() == [999] * 500 + [1000] * 500
    assert samples.min() >= 0
    assert samples.max() < n
    assert len(np.unique(samples[:500])) == len(np.unique(samples[500:])) == 500


def test_a_huge_permutation_is_one_to_one_on_a_sample():
    n = 10**9 + 7
    positions = np.arange(0, n, 9973)
    assert len(np.unique(permute(positions, num_samples=n, key=5))) == len(positions)


# --- pinned: these may change only with the format of a run ---------------------------------------


def test_golden_order():
    assert derive_key(0, 0) == 0x46B73E79F0C37C00
    assert derive_key(1, 2, 3) == 0x48CF5028B6DF10DB
    assert mix64(np.array([1, 2], np.uint64)).tolist() == [
        6238072747940578789,
        15839785061582574730,
    ]
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
