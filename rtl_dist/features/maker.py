"""What a stage's frozen part makes of every image, computed once a view and found again on disk.

The same for the validation images, so that evaluating such a stage costs little either.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from rtl_dist.config import Config, ResolvedStage
from rtl_dist.core.errors import DataError, RtlDistError, StopRequested
from rtl_dist.core.files import user_cache_folder
from rtl_dist.core.text import readable_size
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import EvalTransform, TrainTransform, training_transform
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import EVAL_BLOCK, SplitMicrobatches, cannot_evaluate
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.store import (
    FeatureStore,
    View,
    ViewShape,
    _NoStoreError,
    key_of,
    write_block,
)
from rtl_dist.model.divided import FrozenPart
from rtl_dist.model.freezing import digest

LOG = logging.getLogger("rtl_dist")
_FORMAT = 1  # another one where old files would be read wrongly


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One view to have: its key, what that is made of, its shape, and what decodes its images.
    view: None for an evaluation's."""

    key: str
    content: dict[str, Any]
    shape: ViewShape
    split: Split
    transform: TrainTransform | EvalTransform
    view: int | None


class FeatureMaker:
    """Makes, or finds, views of splits for one stage. Every method is called by all ranks."""

    def __init__(
        self,
        frozen: FrozenPart,
        boundary: str,
        *,
        config: Config,
        stage: ResolvedStage,
        dataset: Dataset,
        runtime: Runtime,
        micro_batch_size: int,
        workers: int,
    ) -> None:
        self._frozen, self._config, self._stage = frozen, config, stage
        self._runtime, self._workers = runtime, workers
        self._micro_batch_size = micro_batch_size
        folder = config.features.cache_dir
        root = user_cache_folder() / "features" if folder is None else Path(folder)
        self._store = FeatureStore(root, int(config.features.cache_gb * 1e9))
        self._rows: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self._common: dict[str, Any] = runtime.from_main(
            lambda: {
                "format": _FORMAT,
                "network": [config.model.name, version("timm"), boundary, frozen.describe()],
                "weights": digest(
                    dict(frozen.state_dict()) | {"mean": frozen.mean, "std": frozen.std}
                ),
                "dataset": dataset.fingerprint,
                "precision": runtime.precision,
                "device": runtime.device_name,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            }
        )

    def training_views(
        self, split: Split, numbers: tuple[int, ...], *, samples_to_come: int
    ) -> dict[int, View] | None:
        """The views by number; None where they do not fit or would cost more than they save.

        Raises:
            StopRequested: on every rank, if one was asked to stop; whole views are kept.
            RtlDistError: on every rank, if the loader of one failed.
        """
        config, stage = self._config, self._stage
        transform = training_transform(stage, channels=config.data.channels)
        augment = asdict(stage.augment)
        looks = {
            "augment": {k: v for k, v in augment.items() if k not in ("mixup", "cutmix")},
            "image_size": transform.image_size,
            "seed": config.seed,
        }
        tasks = [
            self._task(
                split,
                transform,
                looks | {"view": number},
                view=number,
                block_size=self._micro_batch_size,
            )
            for number in numbers
        ]
        views = self._provide(tasks, most_to_compute=samples_to_come)
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
        row, dtype = self._row_of(transform.image_size)
        shape = ViewShape(
            num_samples=split.num_samples, row=row, dtype=dtype, block_size=block_size
        )
        return _Task(
            key=key_of(content),
            content=content,
            shape=shape,
            split=split,
            transform=transform,
            view=view,
        )

    def _row_of(self, image_size: int) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype of what the frozen part makes of one image."""
        if image_size not in self._rows:
            channels = self._config.data.channels
            black = torch.zeros(1, channels, image_size, image_size, dtype=torch.uint8)
            with self._runtime.accelerator.autocast():
                out = self._frozen(black.to(self._runtime.device))
            self._rows[image_size] = tuple(out.shape[1:]), out.dtype
        return self._rows[image_size]

    def _provide(self, tasks: list[_Task], *, most_to_compute: int) -> list[View] | None:
        """The views, those that are not there computed; None where that cannot be or does not
        pay: more images to compute than the stage has still to see."""
        try:
            with self._runtime.heartbeat.phase("checking features", open_ended=True):
                missing = [task for task in tasks if not self._is_there(task)]
            to_compute = sum(task.shape.num_samples for task in missing)
            if to_compute > most_to_compute:
                raise _NoStoreError(
                    f"{most_to_compute:,} images are still to come, fewer than the {to_compute:,}"
                    " of the views that are missing"
                )
            num_bytes = sum(task.shape.num_bytes for task in missing)
            keep = {task.key for task in tasks}
            why = self._runtime.from_main(lambda: self._store.why_no_room(num_bytes, keep=keep))
            if missing and why:
                raise _NoStoreError(why)
            if not missing and tasks[0].view is not None:
                LOG.info("cached features found in %s", self._store.root)
            if missing:
                LOG.info(
                    "computing features of %s images of %s (%s) into %s",
                    f"{to_compute:,}",
                    tasks[0].split.name,
                    readable_size(num_bytes),
                    self._store.root,
                )
            rounds = sum(self._rounds(task) for task in missing)
            with (
                self._runtime.heartbeat.phase("computing features"),
                self._runtime.progress(total=rounds, what="features", unit="batch") as bar,
            ):
                for task in missing:
                    if self._is_there(task):
                        continue  # another run has made it meanwhile
                    self._compute(task, keep, bar)
            opened = []
            try:
                opened = [self._store.open(task.key) for task in tasks]
            except (OSError, ValueError, KeyError) as error:
                LOG.warning("cached features cannot be opened (%s)", error)
            if not all(self._runtime.gather(len(opened) == len(tasks))):
                raise _NoStoreError(f"not every process can open {self._store.root}")
        except _NoStoreError as error:
            LOG.info("no cached features of %s: %s", tasks[0].split.name, error)
            return None
        return opened

    def _is_there(self, task: _Task) -> bool:
        """Whether the store has a task's view, as it was written.

        Raises:
            _NoStoreError: on every rank, if not all of them see it.
        """
        runtime, store = self._runtime, self._store
        if not runtime.from_main(lambda: store.is_clean(task.key)):
            return False
        if not all(runtime.gather(store.has(task.key))):
            raise _NoStoreError(f"not every process sees {store.root}")
        share = {"rank": runtime.rank, "world_size": runtime.world_size}
        if all(runtime.gather(store.is_sound(task.key, **share))):
            return True
        LOG.warning("cached features %s are damaged; computing them again", task.key)
        runtime.from_main(lambda: store.forget(task.key))
        return False

    def _rounds(self, task: _Task) -> int:
        """How many blocks the rank with the most of them has."""
        blocks = math.ceil(task.shape.num_samples / task.shape.block_size)
        return math.ceil(blocks / self._runtime.world_size)

    def _compute(self, task: _Task, keep: set[str], bar: Any) -> None:
        """Computes one view, blocks shared among the ranks.

        A training view's blocks are as large as a microbatch and always full, so the network
        computes what it would compute in training.

        Raises:
            _NoStoreError: on every rank, if the disk does not allow it.
        """
        runtime, store = self._runtime, self._store

        def reserve() -> str:
            if store.has(task.key):
                store.forget(task.key)  # a damaged sample was met in it, which may be whole now
            try:
                return str(store.reserve(task.key, task.shape, keep=keep))
            except OSError as error:
                raise _NoStoreError(f"{store.root}: {error.strerror}") from error

        with runtime.heartbeat.phase("reserving features", open_ended=runtime.is_main):
            folder = Path(runtime.from_main(reserve))
        try:
            checksums, used, bad = self._write_blocks(task, folder, bar)
            if bad and task.view is None:
                raise DataError(cannot_evaluate(bad))

            def publish() -> None:
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
                    raise _NoStoreError(f"{store.root}: {error.strerror or error}") from error

            with runtime.heartbeat.phase("writing features", open_ended=runtime.is_main):
                runtime.from_main(publish)
        finally:
            if runtime.is_main:
                store.discard(folder)  # nothing of it is left under this name if all went well

    @torch.no_grad()
    def _write_blocks(
        self, task: _Task, folder: Path, bar: Any
    ) -> tuple[list[int], np.ndarray, list[str]]:
        runtime, shape = self._runtime, task.shape
        blocks = range(0, shape.num_samples, shape.block_size)
        mine = blocks[runtime.rank :: runtime.world_size]
        microbatches = SplitMicrobatches(
            task.split,
            task.transform,
            size=shape.block_size,
            seed=self._config.seed,
            view=task.view,
        )
        loader = make_loader(
            microbatches,
            mine,
            workers=min(self._workers, len(mine)),
            device=runtime.device,
            give_up=runtime.is_asked,
        )
        batches = runtime.heartbeat.while_fetching(loader, are_remote=task.split.is_remote)
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
            runtime.heartbeat.beat()
            stop, num_failed = runtime.agree(bad_samples=disk_failed, failure=failure)
            if stop:
                raise StopRequested(
                    "stopped while features were computed; whole views are kept: start again to go"
                    " on"
                )
            if num_failed:
                raise _NoStoreError(f"{self._store.root} cannot be written by every process")
        everything = sorted(block for of_rank in runtime.gather(done) for block in of_rank)
        samples = [sample for _, _, samples in everything for sample in samples]
        bad = [name for names in runtime.gather(bad) for name in names]
        return [crc for _, crc, _ in everything], np.array(samples, dtype=np.int64), bad
