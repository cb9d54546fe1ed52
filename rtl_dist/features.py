"""What a stage's frozen part makes of every image, computed once a view and found again on disk.

The same for the validation images, so that evaluating such a stage costs little either.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from rtl_dist.config import Config, Stage
from rtl_dist.data.augment import EvalTransform, TrainTransform
from rtl_dist.data.dataset import Dataset
from rtl_dist.data.loader import make_loader
from rtl_dist.data.microbatches import SplitMicrobatches
from rtl_dist.data.order import TrainingStream
from rtl_dist.data.ring import Batch
from rtl_dist.data.split import Split
from rtl_dist.errors import DataError, RtlDistError, StopRequested
from rtl_dist.feature_store import FeatureStore, View, ViewShape, key_of, write_block
from rtl_dist.files import user_cache_folder
from rtl_dist.model.divided import FrozenPart
from rtl_dist.model.parts import digest
from rtl_dist.runtime import Runtime

LOG = logging.getLogger("rtl_dist")
_FORMAT = 1  # another one where old files would be read wrongly
EVAL_BLOCK = 64  # images scored at a time, with features as without


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One view to have: its key, what that is made of, its shape, and what decodes its images.
    view: None for an evaluation's."""

    key: str
    content: dict[str, Any]
    shape: ViewShape
    split: Split
    transform: TrainTransform | EvalTransform
    seed: int
    view: int | None


class FeatureMaker:
    """Makes, or finds, views of splits for one stage. Every method is called by all ranks.

    num_computed: views that were not found.
    """

    def __init__(
        self,
        frozen: FrozenPart,
        boundary: str,
        *,
        config: Config,
        stage: Stage,
        dataset: Dataset,
        runtime: Runtime,
        micro_batch_size: int,
        workers: int,
    ) -> None:
        self._frozen, self._config, self._stage = frozen, config, stage
        self._runtime, self._dataset, self._workers = runtime, dataset, workers
        self._micro_batch_size = micro_batch_size
        self.num_computed = 0
        folder = config.features.cache_dir
        root = user_cache_folder() / "features" if folder is None else Path(folder)
        self._store = FeatureStore(root, int(config.features.cache_gb * 1e9))
        self._row = self._measure_row()
        tensors = dict(frozen.state_dict()) | {"mean": frozen.mean, "std": frozen.std}
        self._common = {
            "format": _FORMAT,
            "weights": digest(tensors),
            "below": boundary,
            "dataset": dataset.fingerprint,
            "precision": runtime.precision,
            "device": runtime.device_name,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }

    def training_views(
        self, split: Split, numbers: tuple[int, ...], *, samples_to_come: int
    ) -> dict[int, View] | None:
        """The views by number; None where they do not fit or would cost more than they save.

        Raises:
            StopRequested: on every rank, if one was asked to stop; whole views are kept.
            RtlDistError: on every rank, if the loader of one failed.
        """
        config, stage = self._config, self._stage
        augment = config.augment_of(stage)
        size = config.image_size_of(stage)
        looks = {k: v for k, v in asdict(augment).items() if k not in ("mixup", "cutmix")}
        transform = TrainTransform(augment, image_size=size, channels=config.data.channels)
        tasks = [
            self._task(
                split,
                transform,
                {"augment": looks, "image_size": size, "seed": config.seed, "view": number},
                view=number,
                block_size=self._micro_batch_size,
            )
            for number in numbers
        ]
        views = self._provide(tasks, most_to_compute=samples_to_come)
        if views is not None and not self.num_computed:
            LOG.info("cached features found in %s", self._store.root)
        return None if views is None else dict(zip(numbers, views, strict=True))

    def evaluation_view(self, split: Split, transform: EvalTransform) -> View | None:
        """The view that an evaluation of the split has. Raises as ``training_views``, and
        ``DataError`` on every rank if a sample is damaged."""
        looks = {"image_size": transform.image_size, "crop_pct": transform.crop_pct}
        task = self._task(split, transform, {"eval": looks}, view=None, block_size=EVAL_BLOCK)
        views = self._provide([task], most_to_compute=split.num_samples)
        return None if views is None else views[0]

    def _task(
        self,
        split: Split,
        transform: TrainTransform | EvalTransform,
        content: dict[str, Any],
        *,
        view: int | None,
        block_size: int,
    ) -> _Task:
        content = self._common | content | {"split": split.name, "channels": transform.channels}
        content["block"] = block_size
        row, dtype = self._row
        if view is None:  # an evaluation's images may be of another size
            row = self._measure_row(transform.image_size)[0]
        shape = ViewShape(
            num_samples=split.num_samples, row=row, dtype=dtype, block_size=block_size
        )
        return _Task(
            key=key_of(content),
            content=content,
            shape=shape,
            split=split,
            transform=transform,
            seed=self._config.seed,
            view=view,
        )

    @torch.no_grad()
    def _measure_row(self, size: int | None = None) -> tuple[tuple[int, ...], torch.dtype]:
        side = size or self._config.image_size_of(self._stage)
        black = torch.zeros(1, self._config.data.channels, side, side, dtype=torch.uint8)
        with self._runtime.accelerator.autocast():
            out = self._frozen(black.to(self._runtime.device))
        return tuple(out.shape[1:]), out.dtype

    def _provide(self, tasks: list[_Task], *, most_to_compute: int) -> list[View] | None:
        """The views, those that are not there computed; None where that cannot be or does not
        pay: more images to compute than the stage has still to see."""
        missing = self._missing(tasks)
        to_compute = sum(task.shape.num_samples for task in missing)
        if to_compute > most_to_compute:
            return None
        num_bytes = sum(task.shape.num_bytes for task in missing)
        keep = {task.key for task in tasks}
        why = self._runtime.from_main(lambda: self._store.why_no_room(num_bytes, keep=keep))
        if missing and why:
            LOG.info("training without cached features: %s", why)
            return None
        rounds = sum(self._rounds(task) for task in missing)
        with self._runtime.progress(total=rounds, what="features", unit="batch") as bar:
            for task in missing:
                if not self._compute(task, keep, bar):
                    return None
                self.num_computed += 1
        opened = []
        try:
            opened = [self._store.open(task.key) for task in tasks]
        except (OSError, ValueError, KeyError) as error:
            LOG.warning("cached features cannot be opened (%s)", error)
        if not all(self._runtime.gather(len(opened) == len(tasks))):
            LOG.info(
                "training without cached features: not every process sees %s", self._store.root
            )
            return None
        return opened

    def _missing(self, tasks: list[_Task]) -> list[_Task]:
        """Those not in the store, or damaged there."""
        runtime, missing = self._runtime, []
        there = runtime.from_main(lambda: [self._store.is_clean(task.key) for task in tasks])
        for task, is_there in zip(tasks, there, strict=True):
            if is_there:
                sound = runtime.gather(
                    self._store.is_sound(task.key, rank=runtime.rank, world_size=runtime.world_size)
                )
                if all(sound):
                    continue
                LOG.warning("cached features %s are damaged; computing them again", task.key)
            missing.append(task)
        return missing

    def _rounds(self, task: _Task) -> int:
        """How many blocks the rank with the most of them has."""
        blocks = math.ceil(task.shape.num_samples / task.shape.block_size)
        return math.ceil(blocks / self._runtime.world_size)

    def _compute(self, task: _Task, keep: set[str], bar: Any) -> bool:
        """Computes one view, blocks shared among the ranks; False if the disk does not allow it.

        A training view's blocks are as large as a microbatch and always full, so the network
        computes what it would compute in training.
        """
        runtime, store = self._runtime, self._store

        def reserve() -> tuple[str | None, str]:
            store.forget(task.key)
            try:
                return str(store.reserve(task.key, task.shape, keep=keep)), ""
            except OSError as error:
                return None, f"{store.root}: {error.strerror}"

        place, why = runtime.from_main(reserve)
        if place is None:
            LOG.warning("training without cached features: %s", why)
            return False
        folder = Path(place)
        try:
            written = self._write_blocks(task, folder, bar)
        except RtlDistError:
            if runtime.is_main:
                store.discard(folder)
            raise
        if written is None:
            LOG.warning("training without cached features: %s cannot be written", store.root)
            if runtime.is_main:
                store.discard(folder)
            return False
        checksums, used, bad = written
        if bad and task.view is None:
            if runtime.is_main:
                store.discard(folder)
            raise DataError(cannot_evaluate(bad))

        def publish() -> str | None:
            try:
                store.publish(
                    folder,
                    task.key,
                    task.shape,
                    checksums=checksums,
                    used=used,
                    bad=bad,
                    content=task.content,
                )
            except OSError as error:
                return error.strerror or str(error)
            return None

        why = runtime.from_main(publish)
        if why:
            LOG.warning("training without cached features: %s: %s", store.root, why)
        return not why

    @torch.no_grad()
    def _write_blocks(
        self, task: _Task, folder: Path, bar: Any
    ) -> tuple[list[int], np.ndarray, list[str]] | None:
        runtime, shape = self._runtime, task.shape
        blocks = range(0, shape.num_samples, shape.block_size)
        mine = blocks[runtime.rank :: runtime.world_size]
        microbatches = SplitMicrobatches(
            task.split, task.transform, size=shape.block_size, seed=task.seed, view=task.view
        )
        loader = make_loader(
            microbatches, mine, workers=min(self._workers, len(mine)), device=runtime.device
        )
        batches = iter(loader)
        done: list[tuple[int, int, list[int]]] = []  # (first row, checksum, samples used)
        bad: list[str] = []
        for turn in range(self._rounds(task)):
            failure, disk_failed = None, 0
            try:
                batch = next(batches) if turn < len(mine) else None
            except RtlDistError as error:
                batch, failure = None, error
            if batch is not None:
                with runtime.accelerator.autocast():
                    out = self._frozen(batch.inputs)
                first = mine[turn]
                count = min(shape.block_size, shape.num_samples - first)
                bad += batch.bad
                try:
                    checksum = write_block(folder, first, out[:count].cpu())
                    done.append((first, checksum, batch.samples[:count].tolist()))
                except OSError:
                    disk_failed = 1
            bar.update()
            stop, num_failed = runtime.agree(bad_samples=disk_failed, failure=failure)
            if stop:
                raise StopRequested("stopped while features were computed; start again to go on")
            if num_failed:
                return None
        everything = sorted(block for of_rank in runtime.gather(done) for block in of_rank)
        samples = [sample for _, _, samples in everything for sample in samples]
        bad = [name for names in runtime.gather(bad) for name in names]
        return [crc for _, crc, _ in everything], np.array(samples, dtype=np.int64), bad


@dataclass(frozen=True, kw_only=True)
class ViewBatches:
    """The microbatches that ``TrainingMicrobatches`` would yield, as features; see ``Batch``."""

    views: dict[int, View]
    order: TrainingStream
    split: Split
    num_views: int
    size: int

    def at(self, positions: Iterator[int]) -> Iterator[Batch]:
        for position in positions:
            samples, epochs = self.order.samples_at(position, self.size)
            numbers = epochs % self.num_views
            inputs: torch.Tensor | None = None
            used = np.empty_like(samples)
            for number in np.unique(numbers):  # a microbatch lies in two epochs at most
                view, chosen = self.views[int(number)], numbers == number
                rows = torch.from_numpy(samples[chosen])
                features = view.features[rows]
                if inputs is None:
                    inputs = features.new_empty((self.size, *features.shape[1:]))
                inputs[torch.from_numpy(chosen)] = features
                used[chosen] = view.used[rows].numpy()
            assert inputs is not None
            labels = torch.from_numpy(self.split.labels(used))
            yield Batch(inputs, labels, torch.from_numpy(used), [])


def views_of_stage(
    num_views: int, *, first_step: int, end_step: int, global_batch_size: int, num_samples: int
) -> tuple[int, ...]:
    """Which views of its cycle the steps of a stage touch, each sample coming once an epoch."""
    first = first_step * global_batch_size // num_samples
    last = (end_step * global_batch_size - 1) // num_samples
    last = min(last, first + num_views - 1)
    return tuple(sorted({epoch % num_views for epoch in range(first, last + 1)}))


def cannot_evaluate(bad: list[str]) -> str:
    more = f", and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"cannot evaluate exactly: {bad[0]}{more}"
