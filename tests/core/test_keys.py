"""Random streams: each from keys of its own, and those of runs begun earlier as they were."""

import ast
import itertools
from pathlib import Path

import numpy as np

import rtl_dist
from rtl_dist.core.keys import GOLDEN, Stream, derive_key, mix64, stream_key, stream_keys

PACKAGE = Path(rtl_dist.__file__).parent
MOST = {"epoch": 2**40 - 1}  # of other numbers: 2^63 - 1
SEEDS = (0, 1, 2, 42, 2**63 - 1)


def ranges_of(stream, count):
    """What the first ``count`` numbers after the seed may be."""
    return [
        (part, part) if isinstance(part, int) else (0, MOST.get(part, 2**63 - 1))
        for part in stream.value[:count]
    ]


def can_meet(one, other):
    """Whether two lists of ranges have a list of numbers in common."""
    return len(one) == len(other) and all(
        max(a, c) <= min(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def test_no_two_streams_can_hash_the_same_numbers():
    for one, other in itertools.combinations(Stream, 2):
        assert not can_meet(ranges_of(one, len(one.value)), ranges_of(other, len(other.value))), (
            f"{one} and {other} share a key"
        )


def test_what_streams_have_hashed_on_the_way_is_a_key_of_two_epochs_only():
    """A hash of more numbers passes through states that hash fewer. ``Stream`` says why these two,
    which are as old as the first runs, do no harm."""
    met = {
        (on_the_way.name, key.name)
        for on_the_way, key in itertools.permutations(Stream, 2)
        for count in range(1, len(on_the_way.value))
        if can_meet(ranges_of(on_the_way, count), ranges_of(key, len(key.value)))
    }
    assert met == {("AUGMENTATION", "EPOCH_ORDER"), ("FORWARD", "EPOCH_ORDER")}
    of_epoch_1 = stream_key(7, Stream.EPOCH_ORDER, 1)
    assert of_epoch_1 == derive_key(7, *Stream.AUGMENTATION.tag)
    # and this is the first round key of that epoch's permutation
    (first_round,) = mix64(np.array([of_epoch_1], np.uint64) + GOLDEN).tolist()
    assert first_round == stream_key(7, Stream.AUGMENTATION, 0)


def test_a_stream_has_one_tag_or_none_and_it_comes_first():
    for stream in Stream:
        assert stream.value[: len(stream.tag)] == stream.tag
        assert len(stream.tag) == (stream is not Stream.EPOCH_ORDER)


def drawn(stream, seed):
    """Keys of small numbers, of large ones, and of those that are tags."""
    numbers = {*range(12), 2**31, 2**40 - 1, 2**63 - 1}
    numbers |= {tag for other in Stream for tag in other.tag}
    named = stream.value[len(stream.tag) :]
    numbers_of = [[n for n in numbers if n <= MOST.get(name, n)] for name in named]
    return [stream_key(seed, stream, *asked) for asked in itertools.product(*numbers_of)]


def test_no_two_keys_that_were_drawn_are_equal():
    keys = []
    for stream in Stream:
        if len(stream.value) - len(stream.tag) <= 2:
            for seed in SEEDS:
                keys += drawn(stream, seed)
    many = np.arange(20_000)
    for stream in (Stream.AUGMENTATION, Stream.BALANCED_BLOCKS, Stream.EPOCH_ORDER):
        keys += stream_keys(9, stream, many).tolist()
    for stream in (Stream.FORWARD, Stream.BALANCED_MEMBERS):
        keys += stream_keys(9, stream, many % 200, many // 200).tolist()
    for worker, number in itertools.product(range(8), range(200)):
        keys.append(stream_key(9, Stream.STREAM_PIXELS, 0, 1, worker, number))
        keys.append(stream_key(9, Stream.STREAM_SHARDS, number, 1, worker))
    # what permutations and windows make of theirs: a key a round (but the first, see above), a
    # shard, a piece
    steps = np.arange(2, 500, dtype=np.uint64) * GOLDEN
    for stream, epoch in itertools.product(
        (Stream.EPOCH_ORDER, Stream.WINDOW_SHARDS, Stream.WINDOW_BLOCKS), (0, 1, 3)
    ):
        keys += mix64(np.uint64(stream_key(9, stream, epoch)) + steps).tolist()
    assert len(keys) > 100_000
    assert len(set(keys)) == len(keys)


def test_keys_come_from_a_stream_of_the_table():
    """Elsewhere nobody hashes numbers of its own choice, which could be another's."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "rtl_dist.core.keys":
                assert "derive_key" not in {alias.name for alias in node.names}, path


def test_different_numbers_or_another_order_give_another_key():
    keys = {derive_key(a, b) for a in range(100) for b in range(100)}
    assert len(keys) == 10_000
    assert derive_key(1, 2) != derive_key(2, 1)
    assert derive_key(1) != derive_key(1, 0)
    assert derive_key(-1) == derive_key(2**64 - 1)  # any whole number will do
    assert all(0 <= key < 2**64 for key in keys)


def test_many_keys_at_once_are_those_made_one_by_one():
    one, other = np.array([0, 7, 2**62]), np.array([3, 0, 1])
    keys = stream_keys(5, Stream.BALANCED_MEMBERS, one, other).tolist()
    assert keys == [
        stream_key(5, Stream.BALANCED_MEMBERS, *pair)
        for pair in zip(one.tolist(), other.tolist(), strict=True)
    ]


def test_mixing_is_one_to_one_on_what_was_tried():
    assert len(np.unique(mix64(np.arange(100_000, dtype=np.uint64)))) == 100_000


# --- pinned: these may change only with the format of a run ---------------------------------------


def test_golden_keys():
    assert derive_key(0, 0) == 0x46B73E79F0C37C00
    assert derive_key(1, 2, 3) == 0x48CF5028B6DF10DB
    assert mix64(np.array([1, 2], np.uint64)).tolist() == [
        6238072747940578789,
        15839785061582574730,
    ]


def test_golden_streams_of_runs_that_go_on():
    """What a run begun by any earlier version draws from again when it is resumed."""
    hashed = {
        Stream.EPOCH_ORDER: (6,),
        Stream.WINDOW_SHARDS: (1 << 40, 6),
        Stream.WINDOW_BLOCKS: (2 << 40, 6),
        Stream.WINDOW_GROUPS: (3 << 40, 6),
        Stream.BALANCED_BLOCKS: (4 << 40, 6),
        Stream.BALANCED_MEMBERS: (5 << 40, 6, 7),
        Stream.AUGMENTATION: (1, 6),
        Stream.FORWARD: (3, 6, 7),
    }
    for stream, numbers in hashed.items():
        given = numbers[len(stream.tag) :]
        assert stream_key(42, stream, *given) == derive_key(42, *numbers), stream
    assert stream_key(42, Stream.FORWARD, 6, 7) == 0xA7CA9C080DC5A30D
