"""The ``stream`` backend: training on sources that cannot be indexed, through webdataset itself.

The weaker promise, which a config must ask for: samples are drawn with replacement at the level of
shards, so an epoch is a number of samples, not each sample once; a resumed run draws afresh from
its step on; the order depends on ranks and workers. Evaluation always reads indexed splits.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rtl_dist.config import Data
from rtl_dist.data.decode import decode
from rtl_dist.data.loader import Batch, Transform
from rtl_dist.data.order import derive_key
from rtl_dist.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_SHUFFLE_BUFFER = 1000  # samples


def stream_microbatches(
    data: Data,
    transform: Transform,
    *,
    size: int,
    seed: int,
    first_step: int,
    num_classes: int,
    workers: int,
    pin_memory: bool,
) -> Iterable[Batch]:
    """Endless microbatches of single-label samples (an image and ``.cls``).

    Members are taken as bytes and decoded by ``decode``: webdataset's own decoding would unpickle
    ``.pyd``, ``.pkl`` and ``.pth`` members, so it is never asked to.
    """
    import webdataset as wds

    draw_seed = derive_key(seed, first_step) >> 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = wds.WebDataset(
            data.stream_urls,
            resampled=True,
            nodesplitter=None,
            seed=draw_seed % 2**31,
            empty_check=False,
        )
    samples = dataset.shuffle(_SHUFFLE_BUFFER).map(_Decode(data.channels, transform, num_classes))
    batches = samples.batched(size, collation_fn=_collate, partial=False)
    loader: Iterable[Batch] = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=workers, pin_memory=pin_memory
    )
    return loader


class _Decode:
    def __init__(self, channels: int, transform: Transform, num_classes: int) -> None:
        self._channels, self._transform, self._num_classes = channels, transform, num_classes
        self._drawn = 0

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        self._drawn += 1
        name = f"sample {sample['__key__']!r} of {sample.get('__url__')}"
        content = next((sample[kind] for kind in _IMAGES if kind in sample), None)
        if content is None or "cls" not in sample:
            raise DataError(f"{name} needs an image ({', '.join(_IMAGES)}) and a .cls member")
        label = int(io.BytesIO(sample["cls"]).read())
        if not 0 <= label < self._num_classes:
            raise DataError(f"{name}: label {label} out of range, 0 to {self._num_classes - 1}")
        key = derive_key(torch.initial_seed(), self._drawn) >> 1
        return self._transform(decode(content, self._channels), key), label


def _collate(samples: list[tuple[torch.Tensor, int]]) -> Batch:
    images = torch.stack([image for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return Batch(images, labels, torch.full_like(labels, -1), [])


def endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches
