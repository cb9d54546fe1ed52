"""The typed sections of a config. What a key means stands under it; the loader enforces the types.

A check within one section raises ``ValueError`` starting with the key's name; the loader adds the
dotted path. Checks across sections are in ``Config``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rtl_dist.schedule import Every
from rtl_dist.urls import is_url, secret_in

Precision = Literal["auto", "no", "fp16", "bf16", "fp64"]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_fraction(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _check(0 <= value <= 1, f"{name}: must lie in 0 to 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class Run:
    dir: str = "runs/default"
    """The run folder: everything the run writes. A run is continued by naming its folder again."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue from the newest whole checkpoint, if any. never: refuse a folder in use.
    must: refuse to start from nothing."""
    ledger: bool = False
    """Write every sample index by step and microbatch to ``ledger/`` (proof of the data order)."""
    log_every: Every = field(default_factory=lambda: Every.parse("50 steps"))
    """How often a row of training metrics is written between evaluations."""


@dataclass(frozen=True, kw_only=True)
class Data:
    path: str
    """Folder of a data set (``rtl-dist pack`` or ``index``), or its URL: ``https://``, ``s3://``,
    ``gs://`` or any other that fsspec knows. Credentials come from where the storage's own tools
    keep them, never from the URL."""
    source: str | None = None
    """Packed into ``path`` at the start of the job when nothing is there yet: whatever
    ``rtl-dist pack`` takes, such as ``digits`` or ``torchvision:CIFAR10``."""
    val_fraction: float = 0.0
    """With ``source``: the part of the training images that becomes ``val``."""
    backend: Literal["indexed", "stream"] = "indexed"
    """indexed: exact epochs, resume, exact evaluation. stream: the webdataset library on sources
    that cannot be indexed (``pipe:``, compressed tars); training then has none of those."""
    stream_urls: str | None = None
    """With ``backend: stream``: brace pattern or URL of the training tars. Labels, classes and the
    evaluation splits still come from ``path``."""
    train: str = "train"
    """Split to train on."""
    val: str = "val"
    """Split to choose the best weights by."""
    test: str | None = "test"
    """Split evaluated once, at the end, with the best weights. Skipped when the data has none."""
    image_size: int = 224
    """Side of the square the model sees, in pixels."""
    crop_pct: float = 0.875
    """Evaluation resizes the short side to image_size / crop_pct and takes the centre square."""
    channels: Literal[1, 3] = 3
    """1: images are decoded to grey. 3: to RGB."""
    workers: Literal["auto"] | int = "auto"
    """Loader processes of each rank. auto: the job's CPUs divided by its local ranks."""
    shuffle: Literal["full", "window"] = "full"
    """full: each epoch is a permutation of all samples. window: an epoch takes the shards in an
    order of its own and mixes the samples of some of them at a time; for remote data that is larger
    than the cache, or must start before much of it has come. The order is the same wherever the
    data lies and whatever is cached."""
    window: int = 16
    """Half the shards that the cache must hold under ``shuffle: window``; the samples of 4/3
    ``window`` shards are mixed at a time."""
    cache_dir: str | None = None
    """Folder on a local disk where shards of remote data are kept, shared by all jobs of a
    machine. null: ``rtl_dist`` in the user's cache folder."""
    cache_gb: float | None = None
    """How much the cache may hold, in 10^9 bytes; what was used least recently goes first. null:
    80 % of what the disk has free."""
    bad_samples: int = 0
    """How many damaged samples a run may replace by another before it stops (exit code 3)."""

    def __post_init__(self) -> None:
        _check(self.image_size >= 8, f"image_size: must be at least 8, not {self.image_size}")
        _check(0 < self.crop_pct <= 1, f"crop_pct: must lie in 0 to 1, not {self.crop_pct}")
        _check(0 <= self.val_fraction < 1, "val_fraction: must lie in 0 to 1")
        _check(self.workers == "auto" or self.workers >= 0, "workers: must be auto or at least 0")
        _check(self.bad_samples >= 0, "bad_samples: must be at least 0")
        _check(self.window >= 1, f"window: must be at least 1, not {self.window}")
        _check(self.cache_gb is None or self.cache_gb > 0, "cache_gb: must be positive or null")
        secret = secret_in(self.path) if is_url(self.path) else None
        _check(secret is None, f"path: {secret}")
        _check(
            not (self.path.startswith("http") and "?" in self.path),
            "path: must be the URL of a folder, without a query (?...): its files are read one by"
            " one below it",
        )
        _check(
            self.source is None or not is_url(self.path),
            "path: source is packed into a local folder; pack first, then copy the folder there",
        )
        _check(
            (self.backend == "stream") == (self.stream_urls is not None),
            "stream_urls: names the tars (a brace pattern) for backend: stream; give both, or"
            " neither",
        )


@dataclass(frozen=True, kw_only=True)
class Augment:
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

    def __post_init__(self) -> None:
        _check_fraction(self, "hflip", "vflip", "erasing")
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, f"crop_scale: must be 0 < low <= high <= 1, not {[low, high]}")
        low, high = self.crop_ratio
        _check(0 < low <= high, f"crop_ratio: must be 0 < low <= high, not {[low, high]}")
        for name in ("rotation", "color_jitter", "mixup", "cutmix"):
            _check(getattr(self, name) >= 0, f"{name}: must be at least 0")
        _check(
            self.randaugment is None or 0 <= self.randaugment <= 30,
            f"randaugment: must be null or 0 to 30, not {self.randaugment}",
        )


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "resnet50"
    """A timm name (``resnet50``), ``torchvision:resnet50``, or ``basic_cnn``."""
    weights: str = "pretrained"
    """pretrained (from the hub), none, a weights file (.safetensors, .pth, .pt, .th), or a run,
    checkpoint or exported folder."""
    head: Literal["auto", "new", "keep"] = "auto"
    """What becomes of the loaded weights' head. auto: kept when it was trained on the same classes,
    else a new one. keep: refuse weights whose head does not fit."""
    dropout: float = 0.0
    """Dropout probability before the head."""

    def __post_init__(self) -> None:
        _check(0 <= self.dropout < 1, f"dropout: must lie in 0 to 1, not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    """Names the stage in metrics, plots and checkpoints."""
    epochs: float | None = None
    """Length in epochs; may be a fraction. Or ``steps``."""
    steps: int | None = None
    """Length in optimizer steps. Or ``epochs``."""
    trainable: str | list[str] = "all"
    """head, all, or a list of the model's parts such as [layer4, head]; all else is frozen."""
    lr: float
    """Learning rate of the head at the end of warm-up; deeper parts by ``layer_decay``."""
    layer_decay: float = 1.0
    """Each part further from the head learns at this factor of the one above it."""
    batchnorm: Literal["frozen", "stats", "train"] = "frozen"
    """BatchNorm within the trainable parts. frozen: running statistics used and held, affine held.
    stats: statistics follow the data, affine held. train: both learn."""
    views: int | None = None
    """Augmented views a sample cycles through; null: a new one every epoch."""
    cache: Literal["auto", "off"] = "auto"
    """Whether a frozen trunk's features are computed once a view and kept in memory, where they
    fit. Needs ``trainable: head`` and ``views``; the trained head is the same either way."""

    def __post_init__(self) -> None:
        _check(
            (self.epochs is None) != (self.steps is None),
            "epochs: a stage has either epochs or steps",
        )
        _check(self.epochs is None or self.epochs > 0, "epochs: must be positive")
        _check(self.steps is None or self.steps > 0, "steps: must be positive")
        _check(self.lr > 0, f"lr: must be positive, not {self.lr}")
        _check(0 < self.layer_decay <= 1, "layer_decay: must lie in 0 to 1")
        _check(self.views is None or self.views > 0, "views: must be positive or null")
        _check(self.trainable != [], "trainable: must name at least one part")


@dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.05
    """Not applied to biases and norms."""
    momentum: float = 0.9
    """Of sgd (Nesterov when above 0)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    warmup: float = 0.05
    """Linear warm-up of each stage: below 1 a fraction of it, from 1 a number of steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""
    label_smoothing: float = 0.1
    ema: float = 0.0
    """Decay a step of an exponential moving average of the weights, which is then what is
    evaluated and kept as best; 0: none."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the loss of a class is weighted by the inverse of its frequency."""

    def __post_init__(self) -> None:
        _check_fraction(self, "label_smoothing", "momentum")
        _check(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas: must lie in 0 to below 1, not {list(self.betas)}",
        )
        _check(0 <= self.ema < 1, f"ema: must lie in 0 to 1, not {self.ema}")
        _check(self.weight_decay >= 0, "weight_decay: must be at least 0")
        _check(self.warmup >= 0, "warmup: must be at least 0")
        _check(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "clip_grad_norm: must be positive or null",
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    global_: int = field(default=256, metadata={"key": "global"})
    """Samples an optimizer step, over all processes; never depends on the hardware."""
    micro: Literal["auto"] | int = "auto"
    """Samples of one forward pass; part of the run's identity (BatchNorm, mixup and dropout see one
    microbatch), so auto is resolved once and written to the run's config."""

    def __post_init__(self) -> None:
        _check(self.global_ > 0, "global: must be positive")
        if self.micro != "auto":
            _check(self.micro > 0, "micro: must be auto or positive")
            _check(
                self.global_ % self.micro == 0,
                f"micro: {self.micro} does not divide batch.global {self.global_}",
            )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: Every = field(default_factory=lambda: Every.parse("1 epoch"))
    """At most this much is done again after a kill."""
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""

    def __post_init__(self) -> None:
        _check(self.keep >= 1, "keep: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    metric: str = "auto"
    """What best means: val/loss or one of the val/ metrics. auto: val/top1, or val/map for
    multi-label data."""
    patience: int | None = None
    """End a stage after this many evaluations of it without a new best; null: never."""

    def __post_init__(self) -> None:
        known = (
            "auto",
            "val/top1",
            "val/top5",
            "val/macro_f1",
            "val/loss",
            "val/map",
            "val/micro_f1",
            "val/exact_match",
        )
        _check(self.metric in known, f"metric: must be one of {', '.join(known)}")
        _check(self.patience is None or self.patience >= 1, "patience: must be positive or null")


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: Every = field(default_factory=lambda: Every.parse("1 epoch"))
    """How often the val split is evaluated; always at the end of a stage."""


@dataclass(frozen=True, kw_only=True)
class Track:
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when logged in, else offline; never a prompt."""
    project: str = "rtl_dist"


@dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    """Of data order, augmentation, head initialisation, dropout and mixup."""
    run: Run = Run()
    data: Data
    augment: Augment = Augment()
    model: Model = Model()
    stages: list[Stage]
    optim: Optim = Optim()
    batch: Batch = Batch()
    precision: Precision = "auto"
    """auto: bf16 where the hardware really has it, else fp16 on a GPU, else full precision.
    fp64 is for proofs of equality."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of the training step. auto: off; its cost is repaid in long runs only."""
    checkpoint: Checkpoint = Checkpoint()
    early_stop: EarlyStop = EarlyStop()
    eval: Eval = Eval()
    track: Track = Track()

    def __post_init__(self) -> None:
        _check(len(self.stages) > 0, "stages: must name at least one stage")
        names = [stage.name for stage in self.stages]
        _check(len(set(names)) == len(names), f"stages: names must differ, not {names}")
        _check(0 <= self.seed < 2**63, "seed: must lie in 0 to 2^63 - 1")
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
        _check(
            not (mixes and self.data.backend == "stream"),
            "augment.mixup: needs data.backend: indexed",
        )
