"""The order within windows: each sample once an epoch, few shards at a time, and pinned values."""

import math
import tracemalloc

import numpy as np
import pytest

from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.data.order.windows import WindowOrder

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
    if window is None:
        return EpochOrder(shard_sizes=np.array(sizes), seed=seed)
    return WindowOrder(shard_sizes=np.array(sizes), seed=seed, window=window)


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
    samples_at = WindowOrder.samples_at
    monkeypatch.setattr(
        WindowOrder, "samples_at", lambda o, *a: looked_at.append(a) or samples_at(o, *a)
    )
    assert len(set(order.shards_ahead(123))) == 64
    assert sum(count for _, count in looked_at) < 200_000


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_any_position_of_huge_windows_costs_the_same():
    order = windowed(np.full(10**5, 10**4), seed=3, window=16)
    order.samples_at(0, 1)
    tracemalloc.start()
    samples, epochs = order.samples_at(1000 * 10**9 - 500, 1000)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 20_000_000  # grows with shards alone
    assert epochs.tolist() == [999] * 500 + [1000] * 500
    assert len(np.unique(samples[:500])) == len(np.unique(samples[500:])) == 500
    assert len(np.unique(order.shards_of(samples))) <= 32


# --- pinned: these may change only with the format of a run ---------------------------------------


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
    huge = windowed(np.full(10**5, 10**4), seed=1, window=16)
    assert huge.samples_at(10**12 - 2, 4)[0].tolist() == [
        737123513,
        488792794,
        137148582,
        981488185,
    ]
