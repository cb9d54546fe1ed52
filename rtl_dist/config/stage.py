"""A stage as a config writes it, and the sections that a stage may have of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from rtl_dist.config.checks import Checks
from rtl_dist.config.data import LARGEST_SIDE
from rtl_dist.config.optim import OptimConfig, Schedule
from rtl_dist.core.tasks import Task

_LONGEST_CROP = 100  # width over height, or height over width
_LEAST_ALPHA, _MOST_ALPHA = 0.001, 1000  # of mixup's distribution


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied."""

    crop_scale: tuple[float, float] = (0.35, 1.0)
    """RandomResizedCrop: area of the crop as a fraction of the image's."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """RandomResizedCrop: width over height of the crop."""
    hflip: float = 0.5
    """Probability of a left-right flip."""
    vflip: float = 0.0
    """Probability of an upside-down flip."""
    rotation: float = 0.0
    """Rotation by up to this many degrees either way."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation changes (torchvision ColorJitter)."""
    randaugment: int | None = None
    """RandAugment magnitude, 0 to 30, with 2 operations (arXiv 1909.13719)."""
    erasing: float = 0.0
    """Probability of erasing a rectangle (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412); one draw a microbatch."""
    cutmix: float = 0.0
    """Alpha of CutMix (arXiv 1905.04899). With mixup too, each microbatch draws one of them."""

    @property
    def mixes(self) -> bool:
        """Whether images of a microbatch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        with Checks() as check:
            check.fractions(self, "hflip", "vflip", "erasing")
            low, high = self.crop_scale
            check(
                0 < low <= high <= 1, f"crop_scale: must be 0 < low <= high <= 1, not {[low, high]}"
            )
            low, high = self.crop_ratio
            check(0 < low <= high, f"crop_ratio: must be 0 < low <= high, not {[low, high]}")
            check(
                high <= low or (low >= 1 / _LONGEST_CROP and high <= _LONGEST_CROP),
                f"crop_ratio: must lie in {1 / _LONGEST_CROP} to {_LONGEST_CROP}, not"
                f" {[low, high]}",
            )
            check.at_most(self, rotation=360, color_jitter=10, mixup=_MOST_ALPHA)
            check.at_most(self, cutmix=_MOST_ALPHA)
            for name in ("mixup", "cutmix"):
                alpha = getattr(self, name)
                check(
                    not 0 < alpha < _LEAST_ALPHA,
                    f"{name}: must be 0 or at least {_LEAST_ALPHA}, not {alpha}",
                )
            for name in ("rotation", "color_jitter", "mixup", "cutmix"):
                check(getattr(self, name) >= 0, f"{name}: must be at least 0")
            check(
                self.randaugment is None or 0 <= self.randaugment <= 30,
                f"randaugment: must be null or 0 to 30, not {self.randaugment}",
            )


@dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """What the best weights are, and when a stage has no better to hope for."""

    metric: str = "auto"
    """What best means: val/loss or one of the val/ metrics. auto: val/top1, or val/map for
    multi-label data."""
    patience: int | None = None
    """End a stage after this many evaluations of it without a better one; null: never. A stage with
    patience hands the weights of its best evaluation on, whichever way it ended."""

    def __post_init__(self) -> None:
        with Checks() as check:
            measured = dict.fromkeys(name for task in Task for name in task.metrics)
            known = ("auto", *(f"val/{name}" for name in measured))
            check(self.metric in known, f"metric: must be one of {', '.join(known)}")
            check.at_most(self, patience=10**6)
            check(self.patience is None or self.patience >= 1, "patience: must be positive or null")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: what it trains, for how long, and how fast."""

    name: str
    """Names the stage in metrics, plots and checkpoints."""
    solve: bool = False
    """Of a stage that trains the head alone: before its steps the head is solved to the optimum of
    its loss on the features of the training images as evaluations see them, with a penalty on its
    weights that is chosen by cross-validation, in place of ``weight_decay``. Such a stage needs no
    steps."""
    epochs: float | Literal["auto"] | None = None
    """Length in epochs; may be a fraction. Or ``steps``; with ``solve`` may be 0 or null. auto, if
    all is trained: by the number of training images, see ``recipe``."""
    steps: int | None = None
    """Length in optimizer steps. Or ``epochs``."""
    trainable: str | list[str] = "all"
    """head, all, or a part of the model or a list of them, such as [layer4, head]; ``layer3+``
    means a part and all above it. All else is frozen."""
    lr: float | Literal["auto"] | None = None
    """Learning rate of the head at the end of warm-up; deeper parts by ``layer_decay``. auto, if
    all is trained: by the batch, see ``recipe``. null, only with ``solve``: 1e-3, if there are
    steps."""
    layer_decay: float = 1.0
    """Each part further from the head learns at this factor of the one above it."""
    batchnorm: Literal["frozen", "stats", "train"] = "frozen"
    """BatchNorm within the trainable parts. frozen: running statistics used and held, affine held.
    stats: statistics follow the data, affine held. train: both learn."""
    schedule: Schedule | None = None
    """Of this stage; null: ``optim.schedule``."""
    warmup: float | None = None
    """Of this stage; null: ``optim.warmup``."""
    optim: OptimConfig | None = None
    """Keys of ``optim`` that are different in this stage, but for those of the run's one average
    (``ema``, ``ema_batchnorm``); null: none."""
    image_size: int | None = None
    """Side of the square this stage trains on; null: ``data.image_size``, on which every stage is
    evaluated."""
    augment: AugmentConfig | None = None
    """Keys of ``augment`` that are different in this stage; null: none."""
    early_stop: EarlyStopConfig | None = None
    """Keys of ``early_stop`` that are different in this stage; null: none."""
    views: int | None = None
    """Augmented views a sample cycles through; null: a new one every epoch."""
    cache: Literal["auto", "off"] = "auto"
    """Whether what the frozen parts below the first trained one make of an image is computed once a
    view and kept on disk (see ``features``), where it fits and pays. Needs ``views``; the trained
    weights are the same either way."""

    @property
    def takes_steps(self) -> bool:
        """Whether it has a length; one that solves its head needs none."""
        return bool(self.epochs or self.steps)

    @property
    def trains_head_alone(self) -> bool:
        return self.trainable in ("head", ["head"])

    def __post_init__(self) -> None:
        with Checks() as check:
            check(
                re.fullmatch(r"\w[\w.+ -]{0,63}", self.name) is not None,
                f"name: letters, digits, - _ + . and spaces, up to 64 and not {self.name!r}: it"
                " also names files",
            )
            check(self.lr is not None or self.solve, "lr: is required", "solve")
            check(
                (self.epochs is None) != (self.steps is None)
                or (self.solve and self.epochs is None),
                "epochs: a stage has either epochs or steps",
                "steps",
            )
            for name in ("epochs", "steps"):
                length = getattr(self, name)
                check(
                    length is None or length == "auto" or length > 0 or (self.solve and not length),
                    f"{name}: must be positive",
                    "solve",
                )
            check(
                not self.solve or self.trains_head_alone,
                f"solve: only a head can be solved, not {self.trainable}; set trainable: head",
                "trainable",
            )
            check(
                self.lr is None or self.lr == "auto" or self.lr > 0,
                f"lr: must be positive or auto, not {self.lr}",
            )
            for name in ("epochs", "lr"):
                check(
                    getattr(self, name) != "auto" or self.trainable == "all",
                    f"{name}: auto is for a stage that trains all; give a number",
                    "trainable",
                )
            check.at_most(self, epochs=10**6, steps=10**9, views=10**6, warmup=10**9)
            check.at_most(self, image_size=LARGEST_SIDE)
            check(0 < self.layer_decay <= 1, "layer_decay: must lie in 0 to 1")
            check(self.views is None or self.views > 0, "views: must be positive or null")
            check(self.trainable != [], "trainable: must name at least one part")
            check(self.warmup is None or self.warmup >= 0, "warmup: must be at least 0")
            check(
                self.image_size is None or self.image_size >= 8,
                f"image_size: must be at least 8, not {self.image_size}",
            )
            own = self.optim
            for key in ("schedule", "warmup"):
                one, other = getattr(self, key), own and getattr(own, key)
                check(
                    one is None or own is None or one == other,
                    f"{key}: {one} and optim.{key}: {other} of the same stage differ; give one",
                    "optim",
                )
