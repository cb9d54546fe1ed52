"""What is to be predicted, by number: named and read one at a time, in the order of the results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from rtl_dist.core.errors import DataError, ShardError
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.data.images.tiny import TinyBatch
from rtl_dist.data.loading.batch import Batch
from rtl_dist.inference.predictor import fill_prepared


class Inputs(Protocol):
    """Any number of images; can be pickled."""

    fingerprint: str
    """Changes when the inputs, their order or, as far as that can be seen, their content does."""
    is_remote: bool
    """Whether they are fetched before they are read."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """What it is called in the results."""

    def read(self, numbers: range) -> Iterator[bytes | DataError]:
        """Image files, or why one cannot be read, to be put behind its name.

        Raises:
            RtlDistError: a whole shard is damaged, or cannot be had.
        """

    def close(self) -> None:
        """Closes all files."""


class SplitInputs:
    """The samples of splits, one split after the other, each called by its key."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self._splits, self._readers = splits, [SampleReader(split) for split in splits]
        self._ends = list(accumulate(split.num_samples for split in splits))
        self.is_remote = any(split.is_remote for split in splits)
        told = [f"{split.dataset.where} {split.name} {_content_of(split)}" for split in splits]
        self.fingerprint = hashlib.sha256("\0".join(told).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return SplitInputs, (self._splits,)

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, number: int) -> str:
        """See ``Inputs``."""
        place, sample = self._at(number)
        return self._splits[place].key(sample)

    def read(self, numbers: range) -> Iterator[bytes | DataError]:
        """See ``Inputs``."""
        if self.is_remote:  # several remote shards come at once
            for place, split in enumerate(self._splits):
                samples = [at[1] for at in map(self._at, numbers) if at[0] == place]
                split.files.fetch(sorted({split.row(sample)[0] for sample in samples}))
        for number in numbers:
            place, sample = self._at(number)
            try:
                yield self._readers[place].read(sample)
            except ShardError:
                raise  # no fault of this sample's
            except DataError as error:
                yield DataError(_without_name(str(error)))

    def close(self) -> None:
        """See ``Inputs``."""
        for reader in self._readers:
            reader.close()

    def _at(self, number: int) -> tuple[int, int]:
        """(which split, which of its samples)."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        return place, number - (self._ends[place - 1] if place else 0)


def _content_of(split: Split) -> str:
    """Of the shards' checksums: changes when any image does."""
    sums = hashlib.sha256()
    for shard in split.shards:
        sums.update(shard.sha256.encode())
    return sums.hexdigest()


def _without_name(error: str) -> str:
    """``sample 3 of split 'val' (key ...) fails its checksum: ...`` without the first words."""
    for words in ("fails its checksum", "is larger than"):
        if words in error:
            return words + error.partition(words)[2]
    return error


class InputMicrobatches(TorchDataset[Batch]):
    """``Microbatches`` of inputs in their own order: position i is of those from number i on.

    Of what cannot be read, ``samples`` has -1 and ``bad`` the reason, and the picture is black.
    """

    def __init__(self, inputs: Inputs, transform: EvalTransform, *, size: int) -> None:
        self._inputs, self._transform, self._size = inputs, transform, size
        self.shape = (size, transform.channels, transform.image_size, transform.image_size)
        self.label_bytes = 8

    def __getitem__(self, first: int) -> Batch:
        return self.fill(first, torch.empty(self.shape, dtype=torch.uint8))

    def fill(self, first: int, out: torch.Tensor) -> Batch:
        """See ``Microbatches``."""
        numbers = range(first, min(first + self._size, len(self._inputs)))
        samples = np.array(numbers, dtype=np.int64)
        errors = fill_prepared(out, self._transform, self._inputs.read(numbers))
        samples[list(errors)] = -1
        labels = torch.zeros(len(numbers), dtype=torch.int64)  # there are none
        return Batch(out[: len(numbers)], labels, torch.from_numpy(samples), list(errors.values()))

    def fill_tiny(self, first: int, out: torch.Tensor) -> tuple[Batch, TinyBatch] | None:
        """They are enlarged by the workers."""
