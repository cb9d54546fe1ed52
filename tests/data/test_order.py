"""The order of the stream: permutations, their concatenation, their quality, and pinned values."""

import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from small_sets import packed

from rtl_dist.data.images.augment import augmentation_keys
from rtl_dist.data.loading.microbatches import microbatch_positions
from rtl_dist.data.order.epochs import Order
from rtl_dist.data.order.permutation import permute
from rtl_dist.core.keys import derive_key, mix64

SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 1024, 4097]


def samples_at(first, count, *, n, seed):
    return Order(np.array([n]), seed).samples_at(first, count)


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


def test_keys_do_not_collide():
    keys = {derive_key(a, b) for a in range(100) for b in range(100)}
    assert len(keys) == 10_000
    assert derive_key(1, 2) != derive_key(2, 1)
    assert derive_key(1) != derive_key(1, 0)
    assert derive_key(-1) == derive_key(2**64 - 1)  # any whole number will do
    assert all(0 <= key < 2**64 for key in keys)


def test_mixing_is_one_to_one_on_what_was_tried():
    assert len(np.unique(mix64(np.arange(100_000, dtype=np.uint64)))) == 100_000


# --- the window order ----------------------------------------------------------------------------

SHARDS = {
    "equal": [10] * 40,
    "one shard": [13],
    "one sample": [1],
    "window larger than the split": [4, 5, 6],
    "uneven": [1, 50, 3, 3, 200, 7, 2, 90, 1, 1, 30, 5, 5, 60, 8, 9, 10, 11, 12, 13, 2, 77],
    "some empty": [0, 5, 0, 0, 9, 3, 0, 8, 1, 0, 0, 4, 6, 0, 2, 7, 0, 0],
    "empty at both ends": [0, 0, 0, 6, 7, 8, 5, 4, 3, 0, 0],
    "all in one": [0] * 10 + [100] + [0] * 10,
    "shards of one": [1] * 100,
}
WINDOWS = [1, 2, 3, 4, 7, 16]


def windowed(sizes, *, seed=0, window=4):
    return Order(np.array(sizes), seed, window)


def needed_again(order, *, epochs, span):
    """Most shards that a piece of ``span`` positions needs or that are begun and not finished."""
    n = order.num_samples
    shards = order.shards_of(order.samples_at(0, epochs * n)[0])
    key = shards + np.arange(epochs * n) // n * len(order.shard_sizes)
    _, first = np.unique(key, return_index=True)
    _, from_end = np.unique(key[::-1], return_index=True)
    last = epochs * n - 1 - from_end
    change = np.zeros(epochs * n + 1, dtype=int)
    np.add.at(change, np.maximum(first - span + 1, 0), 1)
    np.add.at(change, last + 1, -1)
    return int(change.cumsum().max())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS.keys())
def test_each_sample_comes_once_an_epoch_of_windows(sizes, window):
    for seed in range(3):
        order = windowed(sizes, seed=seed, window=window)
        n = sum(sizes)
        assert order.num_samples == n
        samples, epochs = order.samples_at(0, 3 * n)
        assert epochs.tolist() == [0] * n + [1] * n + [2] * n
        for epoch in range(3):
            assert sorted(samples[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS.keys())
def test_any_piece_of_the_windows_stream_is_the_same_piece(sizes, window):
    n = sum(sizes)
    whole = windowed(sizes, window=window).samples_at(0, 3 * n)[0]
    random = np.random.default_rng(0)
    for first in random.integers(0, 3 * n, 20).tolist():
        count = min(3 * n - first, int(random.integers(1, n + 3)))
        # by an order that has seen nothing, so that no cached plan can matter
        piece = windowed(sizes, window=window).samples_at(first, count)[0]
        assert piece.tolist() == whole[first : first + count].tolist()


def test_windows_differ_by_epoch_and_seed_and_only_by_these():
    sizes = SHARDS["equal"]
    n = sum(sizes)
    epochs = [windowed(sizes).samples_at(epoch * n, n)[0] for epoch in range(4)]
    seeds = [windowed(sizes, seed=seed).samples_at(0, n)[0] for seed in (1, 2, 2**63 - 1)]
    orders = [*epochs, *seeds]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() <= 8  # chance: 1 on average
    assert windowed(sizes).samples_at(0, n)[0].tolist() == epochs[0].tolist()
    # nor may two epochs deal the shards alike
    first_shards = {tuple(windowed(sizes).shards_of(o[: n // 8])[:50]) for o in orders}
    assert len(first_shards) == len(orders)


def test_a_plan_that_was_let_go_is_made_again():
    order = windowed(SHARDS["uneven"])
    n = order.num_samples
    before = order.samples_at(0, n)[0].tolist()
    for epoch in (5, 2, 9):
        order.samples_at(epoch * n, 3)
    assert order.samples_at(0, n)[0].tolist() == before


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS.keys())
def test_no_moment_needs_more_shards_than_it_says(sizes, window):
    for seed in range(3):
        order = windowed(sizes, seed=seed, window=window)
        assert order.most_shards_at_once() == min(len(sizes), 2 * window)
        assert needed_again(order, epochs=4, span=1) <= 2 * window


@pytest.mark.parametrize(("num_shards", "window"), [(60, 6), (100, 12), (101, 12), (64, 9)])
def test_no_piece_half_a_window_long_needs_more_shards_than_it_says(num_shards, window):
    """Loader workers are apart: a piece of the stream is in work, ends of epochs within it too."""
    size = 20
    for seed in range(5):
        order = windowed([size] * num_shards, seed=seed, window=window)
        needed = needed_again(order, epochs=4, span=window // 2 * size)
        # and not far fewer, or the cache could have mixed more
        assert 1.6 * window < needed <= 2 * window


def test_a_window_that_holds_all_is_a_full_permutation():
    order = windowed([10] * 32, window=16)
    assert order.most_shards_at_once() == 32
    assert needed_again(order, epochs=1, span=1) == 32
    assert chi_squared(order, num_classes=16, batch=32, epochs=10) < 1.1


def chi_squared(order, *, num_classes, batch, epochs):
    """chi2/df of the batches' classes, samples sorted by class, over some epochs."""
    n = order.num_samples
    steps = epochs * n // batch
    samples = order.samples_at(0, steps * batch)[0]
    rows = np.repeat(np.arange(steps), batch)
    counts = np.zeros((steps, num_classes))
    np.add.at(counts, (rows, samples * num_classes // n), 1)
    expected = batch / num_classes
    return ((counts - expected) ** 2).sum() / expected / steps / (num_classes - 1)


@pytest.mark.parametrize(
    ("num_shards", "window", "num_classes", "most"),
    # of windows that do not overlap, of shards at random: 2.3, 2.7, 2.9, 1.9
    [(128, 16, 100, 2.1), (128, 16, 10, 1.9), (1024, 16, 10, 1.9), (1024, 32, 10, 1.4)],
)
def test_windows_mix_shards_that_are_sorted_by_class(num_shards, window, num_classes, most):
    order = windowed([64] * num_shards, seed=3, window=window)
    found = chi_squared(order, num_classes=num_classes, batch=32, epochs=131072 // 64 // num_shards)
    assert 1.0 < found < most


def test_no_end_of_an_epoch_is_mixed_much_less():
    """A last window of whatever shards are left over would be: here one shard, thus one class."""
    num_shards, size = 129, 50
    ends = []
    for seed in range(10):
        order = windowed([size] * num_shards, seed=seed, window=16)
        shards = order.shards_of(order.samples_at(0, order.num_samples)[0])
        ends += [len(np.unique(shards[:size])), len(np.unique(shards[-size:]))]
    assert min(ends) > 10


def test_where_a_sample_lands_in_its_window_is_uniform():
    for n in (2, 3, 5, 12, 30):
        trials = 1000
        counts = np.zeros((n, n))
        for seed in range(trials):
            counts[np.arange(n), windowed([1] * n, seed=seed, window=n).samples_at(0, n)[0]] += 1
        chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum() * (n - 1) / n
        freedom = (n - 1) ** 2
        assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_a_sample_and_its_successor_are_independent_in_a_window():
    n = 400
    gaps = np.zeros(n)
    for seed in range(400):
        samples = windowed([n // 8] * 8, seed=seed, window=4).samples_at(0, n)[0]
        gaps += np.bincount(np.diff(samples) % n, minlength=n)
    gaps = gaps[1:]
    chi2 = ((gaps - gaps.mean()) ** 2 / gaps.mean()).sum()
    assert abs(chi2 - (n - 2)) < 5 * math.sqrt(2 * n)


@pytest.mark.parametrize("window", [None, *WINDOWS])
@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS.keys())
def test_shards_ahead_come_once_each_as_they_are_first_needed(sizes, window):
    order = windowed(sizes, window=window)
    n = order.num_samples
    for position in {0, 1, n // 2, n - 1, n, 5 * n + n // 3}:
        needed = order.shards_of(order.samples_at(position, 2 * n)[0]).tolist()
        assert list(order.shards_ahead(position)) == list(dict.fromkeys(needed))


def test_shards_ahead_skip_what_a_window_repeats(monkeypatch):
    """The next window's shards are found without looking through all samples of this one."""
    order = windowed([10**6] * 64, window=8)
    looked_at = []
    samples_at = Order.samples_at
    monkeypatch.setattr(Order, "samples_at", lambda o, *a: looked_at.append(a) or samples_at(o, *a))
    assert len(set(order.shards_ahead(123))) == 64
    assert sum(count for _, count in looked_at) < 200_000


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_any_position_of_huge_windows_costs_the_same():
    order = Order(np.full(10**5, 10**4), 3, 16)
    order.samples_at(0, 1)
    tracemalloc.start()
    samples, epochs = order.samples_at(1000 * 10**9 - 500, 1000)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 20_000_000  # grows with shards alone
    assert epochs.tolist() == [999] * 500 + [1000] * 500
    assert len(np.unique(samples[:500])) == len(np.unique(samples[500:])) == 500
    assert len(np.unique(order.shards_of(samples))) <= 32


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


def test_golden_windows():
    assert windowed([3, 0, 4, 2, 1], seed=1, window=1).samples_at(0, 12)[0].tolist() == [
        2,
        0,
        1,
        5,
        9,
        4,
        6,
        3,
        7,
        8,
        4,
        9,
    ]
    uneven = windowed([5, 6, 7] * 10, seed=42, window=4)
    assert uneven.samples_at(2 * 180 + 100, 12)[0].tolist() == [
        11,
        12,
        16,
        90,
        154,
        68,
        151,
        46,
        114,
        169,
        152,
        150,
    ]
    assert list(uneven.shards_ahead(500))[:12] == [10, 8, 13, 22, 16, 6, 24, 3, 21, 25, 2, 12]
    huge = Order(np.full(10**5, 10**4), 1, 16)
    assert huge.samples_at(10**12 - 2, 4)[0].tolist() == [
        737123513,
        488792794,
        137148582,
        981488185,
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
