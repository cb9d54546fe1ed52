"""What determines a view: two that are made of the same have the same key, whoever made them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
import torchvision

from rtl_dist.config import ResolvedStage
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import EvalTransform, TrainTransform, training_transform
from rtl_dist.data.loading.blocks import EVAL_BLOCK
from rtl_dist.data.loading.microbatches import SplitMicrobatches
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.view import ViewShape
from rtl_dist.model.divided import FrozenPart
from rtl_dist.model.freezing import digest

_FORMAT = 1  # another one where old files would be read wrongly


@dataclass(frozen=True, kw_only=True)
class ViewPlan:
    """One view to have, and all that it takes to make it."""

    key: str
    """Its name in the store: ``key_of(content)``."""
    content: dict[str, Any]
    """Whatever determines its features, as JSON holds it."""
    shape: ViewShape
    """How many samples, and what the frozen part makes of one."""
    frozen: FrozenPart
    """What makes features of images."""
    split: Split
    """Whose images they are."""
    transform: TrainTransform | EvalTransform
    """What makes images of the split's files."""
    number: int | None
    """Which of a stage's training views it is, from 0; None: an evaluation's."""
    seed: int
    """The run's, of which a training view's augmentation is keyed."""
    substitutes: bool
    """Another sample takes the place of a damaged one; else there must be none."""

    def microbatches(self) -> SplitMicrobatches:
        """The images of its blocks."""
        return SplitMicrobatches(
            self.split,
            self.transform,
            size=self.shape.block_size,
            seed=self.seed,
            view=self.number,
            substitute=self.substitutes,
        )


class ViewPlanner:
    """Plans the views that one stage can have; every method is called by all ranks."""

    def __init__(
        self,
        frozen: FrozenPart,
        *,
        model_name: str,
        first_trained: str,
        stage: ResolvedStage,
        dataset: Dataset,
        channels: int,
        seed: int,
        micro_batch_size: int,
        runtime: Runtime,
    ) -> None:
        """
        Args:
            frozen: the model's part below ``first_trained``.
            micro_batch_size: images that the network computes at a time in training.
        """
        self._frozen, self._stage, self._runtime = frozen, stage, runtime
        self._channels, self._seed, self._micro_batch_size = channels, seed, micro_batch_size
        self._rows: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self._common: dict[str, Any] = runtime.from_main(
            lambda: {
                "format": _FORMAT,
                "network": [model_name, version("timm"), first_trained, frozen.describe()],
                "weights": digest(
                    dict(frozen.state_dict()) | {"mean": frozen.mean, "std": frozen.std}
                ),
                "dataset": dataset.fingerprint,
                "precision": runtime.precision_in_words,
                "device": runtime.device_name,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            }
        )

    def training(self, split: Split, number: int) -> ViewPlan:
        """The view of that number.

        Its blocks are as large as a microbatch and always full, so the network computes what it
        would compute in training.
        """
        transform = training_transform(self._stage, channels=self._channels)
        augment = asdict(self._stage.augment)
        looks = {
            "augment": {k: v for k, v in augment.items() if k not in ("mixup", "cutmix")},
            "image_size": transform.image_size,
            "seed": self._seed,
            "view": number,
        }
        block_size = self._micro_batch_size
        return self._plan(
            split, transform, looks, number=number, block_size=block_size, substitutes=True
        )

    def evaluation(
        self, split: Split, transform: EvalTransform, *, substitutes: bool = False
    ) -> ViewPlan:
        """The view that an evaluation has.

        substitutes: it is to be trained on, so that a damaged sample may be replaced.
        """
        looks = {"image_size": transform.image_size, "crop_pct": transform.crop_pct}
        return self._plan(
            split,
            transform,
            {"eval": looks},
            number=None,
            block_size=EVAL_BLOCK,
            substitutes=substitutes,
        )

    def _plan(
        self,
        split: Split,
        transform: TrainTransform | EvalTransform,
        looks: dict[str, Any],
        *,
        number: int | None,
        block_size: int,
        substitutes: bool,
    ) -> ViewPlan:
        content = self._common | looks
        content |= {"split": split.name, "channels": transform.channels, "block": block_size}
        row, dtype = self._row_of(transform.image_size)
        if len(row) > 1:  # once they lay there as (C, H, W)
            content |= {"layout": "channels last"}
        return ViewPlan(
            key=key_of(content),
            content=content,
            shape=ViewShape(
                num_samples=split.num_samples, row=row, dtype=dtype, block_size=block_size
            ),
            frozen=self._frozen,
            split=split,
            transform=transform,
            number=number,
            seed=self._seed,
            substitutes=substitutes,
        )

    def _row_of(self, image_size: int) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape and dtype of what the frozen part makes of one image."""
        if image_size not in self._rows:
            shape = (1, self._channels, image_size, image_size)
            black = torch.zeros(shape, dtype=torch.uint8, device=self._runtime.device)
            with self._runtime.accelerator.autocast():
                out = self._frozen(black)
            self._rows[image_size] = tuple(out.shape[1:]), out.dtype
        return self._rows[image_size]


def key_of(content: dict[str, Any]) -> str:
    """Names whatever determines the features; any difference gives another name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
