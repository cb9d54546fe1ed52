"""Random streams: what each is numbered by, and the 64-bit keys that its numbers give."""

from __future__ import annotations

from enum import Enum, unique

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, SplitMix64's increment
_MASK_64 = (1 << 64) - 1


@unique
class Stream(Enum):
    """Every random stream of a run, and what its keys hash after the seed: first its tag, if it
    has one, then the numbers named here, which whoever asks for a key gives.

    Streams of as many numbers differ in their tags, so no two hash the same. Those that a resumed
    run draws from again must stay as they are, or runs begun earlier would not end in the same
    bytes. The stand-in of a damaged sample is no stream: its number alone chooses it.
    """

    _value_: tuple[int | str, ...]

    EPOCH_ORDER = ("epoch",)
    """One permutation of all samples. It is older than the tags and has none: the epoch stands
    where other streams have theirs. Epochs stay below 2^40, where the tags begin of those streams
    that have no more numbers.

    So the keys of epochs 1 and 3 are what AUGMENTATION and FORWARD have hashed when they have
    hashed their tags; and the first round key in those epochs' permutations is what they have for
    view 0 and step 0. Neither draws from that: both hash another number into it first, and the
    permutation only adds a position to its round key before it mixes them."""
    WINDOW_SHARDS = (1 << 40, "epoch")
    """The order in which an epoch takes the shards."""
    WINDOW_BLOCKS = (2 << 40, "epoch")
    """The permutations of an epoch's blocks of shards."""
    WINDOW_GROUPS = (3 << 40, "epoch")
    """The permutations of its groups, which lie across the blocks."""
    BALANCED_BLOCKS = (4 << 40, "block")
    """The order of the classes in a block that has each once."""
    BALANCED_MEMBERS = (5 << 40, "class", "cycle")
    """The order of a class's samples in one of its cycles."""
    AUGMENTATION = (1, "view")
    """What a view's samples are augmented by, each mixed with the sample's number."""
    FORWARD = (3, "step", "microbatch")
    """Dropout, mixup and cutmix."""

    # The following may change: a run that goes on has its weights from the checkpoint, and the
    # ``stream`` backend draws afresh then.

    HEAD = (6 << 40,)
    """The first weights of the head."""
    FOLDS = (11 << 40,)
    """Which images are held out in turn while a head's penalty is chosen."""
    TRUNK = (7 << 40,)
    """The first weights of a trunk that has none to load."""
    STREAM_SHARDS = (8 << 40, "first_step", "rank", "worker")
    """The shards that a worker of the ``stream`` backend draws."""
    STREAM_SHUFFLE = (9 << 40, "first_step", "rank")
    """The places in the ``stream`` backend's buffer, the same for each worker of a rank."""
    STREAM_PIXELS = (10 << 40, "first_step", "rank", "worker", "drawn")
    """The augmentation of the ``stream`` backend's samples."""

    @property
    def tag(self) -> tuple[int, ...]:
        """One number or none."""
        return tuple(part for part in self.value if isinstance(part, int))


def stream_key(seed: int, stream: Stream, *numbers: int) -> int:
    """The 64-bit key of those ``numbers`` that ``stream`` names."""
    hashed = (*stream.tag, *numbers)
    assert len(hashed) == len(stream.value), f"{stream} is numbered by {stream.value}"
    return derive_key(seed, *hashed)


def stream_keys(seed: int, stream: Stream, *numbers: np.ndarray) -> np.ndarray:
    """``stream_key`` elementwise.

    Args:
        numbers: int64 (n,) each.

    Returns:
        uint64 (n,).
    """
    hashed = (*stream.tag, *numbers)
    assert len(hashed) == len(stream.value), f"{stream} is numbered by {stream.value}"
    keys = np.array([derive_key(seed, *stream.tag)], dtype=np.uint64)
    for part in numbers:
        keys = mix64((keys ^ part.astype(np.uint64)) + GOLDEN)
    return keys


def derive_key(*parts: int) -> int:
    """A 64-bit key from whole numbers; different numbers, or another order, give another key.

    A stream's keys come from ``stream_key``, which keeps it apart from the others.
    """
    state = int(GOLDEN)
    for part in parts:
        state = (state ^ (part & _MASK_64)) & _MASK_64
        state = int(mix64(np.array([(state + int(GOLDEN)) & _MASK_64], np.uint64))[0])
    return state


def mix64(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014): uint64 to mixed uint64, elementwise."""
    value = value.astype(np.uint64, copy=True)
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value
