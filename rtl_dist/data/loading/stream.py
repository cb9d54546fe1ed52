"""The ``stream`` backend: training on sources that cannot be indexed, through webdataset itself.

The weaker promise, which a config must ask for: samples are drawn with replacement at the level of
shards, so an epoch is a number of samples, not each sample once; a resumed run draws afresh from
its step on; the order depends on ranks and workers. Evaluation always reads indexed splits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, get_worker_info

from rtl_dist.core.errors import DataError
from rtl_dist.core.keys import Stream, stream_key
from rtl_dist.data.images.augment import Transform
from rtl_dist.data.loading.batch import Batch, to_device
from rtl_dist.data.loading.workers import WorkerBatches, start_worker

_IMAGES = ("jpg", "jpeg", "png", "webp")
_SHUFFLE_BUFFER = 1000  # samples


def stream_microbatches(
    urls: str,
    transform: Transform,
    *,
    size: int,
    seed: int,
    first_step: int,
    rank: int,
    num_classes: int,
    workers: int,
    device: torch.device,
) -> Iterable[Batch]:
    """Endless microbatches of single-label samples (an image and ``.cls``) of the tars at ``urls``,
    a brace pattern.

    Shards are drawn and pixels augmented from (seed, first_step, rank) and the worker's number,
    samples shuffled from the first three, so the same start draws the same stream, and no two
    starts draw each other's.

    Members are taken as bytes and decoded by ``transform``: webdataset's own decoding would
    unpickle ``.pyd``, ``.pkl`` and ``.pth`` members, so it is never asked to.

    Args:
        size: samples of a microbatch.
        first_step: of the run, that this stream is drawn from on.
        workers: processes that make them; 0: this one does.
    """
    import webdataset as wds

    start = _Start(seed=seed, first_step=first_step, rank=rank)
    pipeline = wds.DataPipeline(
        # wds.WebDataset(resampled=True) ignores its seed and draws from the clock
        wds.ResampledShards(urls, deterministic=True, worker_seed=start.shards_key),
        _samples_of_shards,
        wds.shuffle(_SHUFFLE_BUFFER, seed=start.shuffle_key()),
        wds.map(_Decode(transform, num_classes, start)),
        wds.batched(size, collation_fn=_collate, partial=False),
    )
    loader: DataLoader[Batch] = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker if workers else None,
    )
    batches: Iterable[Batch] = WorkerBatches(loader)
    return (to_device(batch, device) for batch in batches)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What a rank's stream is drawn from, in whichever worker asks."""

    seed: int
    """The run's."""
    first_step: int
    """The step that the stream begins with."""
    rank: int
    """The rank that it is drawn for."""

    def shards_key(self) -> int:
        return stream_key(self.seed, Stream.STREAM_SHARDS, self.first_step, self.rank, _worker())

    def shuffle_key(self) -> int:
        return stream_key(self.seed, Stream.STREAM_SHUFFLE, self.first_step, self.rank)

    def pixels_key(self, drawn: int) -> int:
        """drawn: the number of the sample, of those that this worker drew."""
        return stream_key(
            self.seed, Stream.STREAM_PIXELS, self.first_step, self.rank, _worker(), drawn
        )


def _worker() -> int:
    worker = get_worker_info()
    return 0 if worker is None else int(worker.id)


def _samples_of_shards(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """``wds.tarfile_to_samples`` that closes each tar behind it."""
    from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

    def closed_after_use() -> Iterator[dict[str, Any]]:
        for source in url_opener(shards, handler=_refuse):
            with closing(source["stream"]):
                yield source

    yield from group_by_keys(
        tar_file_expander(closed_after_use(), handler=_refuse), handler=_refuse
    )


def _refuse(error: Exception) -> NoReturn:
    """For webdataset's ``handler``, which puts the URL last into the error's arguments."""
    reason = getattr(error, "strerror", None) or error.args[0]
    raise DataError(
        f"cannot read {error.args[-1]}: {' '.join(str(reason).split())}; correct data.stream_urls"
    ) from error


class _Decode:
    def __init__(self, transform: Transform, num_classes: int, start: _Start) -> None:
        self._transform, self._num_classes = transform, num_classes
        self._start, self._drawn = start, 0

    def __call__(self, sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        self._drawn += 1
        name = f"sample {sample['__key__']!r} of {sample.get('__url__')}"
        content = next((sample[kind] for kind in _IMAGES if kind in sample), None)
        if content is None or "cls" not in sample:
            raise DataError(f"{name} needs an image ({', '.join(_IMAGES)}) and a .cls member")
        try:
            label = int(sample["cls"])
        except ValueError as error:
            raise DataError(
                f"{name}: its .cls is no class number: {sample['cls'][:20]!r}"
            ) from error
        if not 0 <= label < self._num_classes:
            raise DataError(f"{name}: label {label} out of range, 0 to {self._num_classes - 1}")
        try:
            image = self._transform(content, self._start.pixels_key(self._drawn) >> 1)
        except DataError as error:
            raise DataError(f"{name} {error}") from error
        return image, label


def _collate(samples: list[tuple[torch.Tensor, int]]) -> Batch:
    images = torch.stack([image for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    return Batch(images, labels, torch.full_like(labels, -1), [])
