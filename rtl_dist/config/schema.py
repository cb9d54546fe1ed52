"""The typed sections of a config. What a key means stands under it; the loader enforces the types.

A check within one section raises ``ValueError`` starting with the key's name; the loader adds the
dotted path. Checks across sections are in ``Config``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rtl_dist.config.stage import (
    AugmentConfig,
    EarlyStopConfig,
    StageConfig,
    check,
    check_fraction,
)
from rtl_dist.core.intervals import Duration, Every
from rtl_dist.core.urls import is_url, secret_in

Precision = Literal["auto", "no", "fp16", "bf16", "fp64"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str = "runs/default"
    """The run folder: everything the run writes. A run is continued by naming its folder again."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue from the newest whole checkpoint, if any. never: refuse a folder in use.
    must: refuse to start from nothing."""
    ledger: bool = False
    """Write every sample index by step and microbatch to ``ledger/`` (proof of the data order)."""
    log_every: Every = field(default_factory=lambda: Every.parse("50 steps"))
    """How often a row of training metrics is written between evaluations."""
    time_limit: Duration | None = None
    """After so long, such as ``11.5 hours``, the run saves itself and leaves with exit code 75, to
    be started again; null: never. Leave a few minutes of what the machine gives you."""
    timeout: Duration = field(default_factory=lambda: Duration.parse("5 minutes"))
    """A job of which some process does not answer for so long, or none makes progress, ends with a
    line that says which, and where it was (see ``heartbeats/``)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
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
    sampling: Literal["natural", "balanced"] = "natural"
    """natural: each sample once an epoch. balanced: each class equally often, each of its samples
    once in the class's own epochs, so that those of small classes come more often; an epoch is then
    a number of samples. Single-label data only."""
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
        check(self.image_size >= 8, f"image_size: must be at least 8, not {self.image_size}")
        check(0 < self.crop_pct <= 1, f"crop_pct: must lie in 0 to 1, not {self.crop_pct}")
        check(0 <= self.val_fraction < 1, "val_fraction: must lie in 0 to 1")
        check(self.workers == "auto" or self.workers >= 0, "workers: must be auto or at least 0")
        check(self.bad_samples >= 0, "bad_samples: must be at least 0")
        check(self.window >= 1, f"window: must be at least 1, not {self.window}")
        check(
            self.sampling == "natural" or (self.shuffle == "full" and self.backend == "indexed"),
            "sampling: balanced needs shuffle: full and backend: indexed",
        )
        check(self.cache_gb is None or self.cache_gb > 0, "cache_gb: must be positive or null")
        secret = secret_in(self.path) if is_url(self.path) else None
        check(secret is None, f"path: {secret}")
        check(
            not (self.path.startswith("http") and "?" in self.path),
            "path: must be the URL of a folder, without a query (?...): its files are read one by"
            " one below it",
        )
        check(
            self.source is None or not is_url(self.path),
            "path: source is packed into a local folder; pack first, then copy the folder there",
        )
        check(
            (self.backend == "stream") == (self.stream_urls is not None),
            "stream_urls: names the tars (a brace pattern) for backend: stream; give both, or"
            " neither",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
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
        check(0 <= self.dropout < 1, f"dropout: must lie in 0 to 1, not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
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
    ema_batchnorm: Literal["reestimated", "averaged"] = "reestimated"
    """Statistics of the averaged weights' BatchNorm layers, where such learn. reestimated: measured
    with those weights on training images before each evaluation. averaged: like the weights."""
    loss: Literal["auto", "cross_entropy", "bce", "focal"] = "auto"
    """auto: cross_entropy, or bce for multi-label data. bce: a yes or no for each class (binary
    cross-entropy). focal: easy samples count less (arXiv 1708.02002)."""
    focal_gamma: float = 2.0
    """Of focal: the loss is multiplied by (1 - p)^gamma; 0: not at all."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: the loss of a class is weighted by the inverse of its frequency."""
    logit_adjustment: float = 0.0
    """Adds this times the logarithm of each class's frequency to the scores in the loss (arXiv
    2007.07314), so that small classes are not outvoted; 1 is the paper's choice, 0 none."""
    skip_limit: int = 20
    """A step whose gradient is not finite is not taken. This many in a row end the run."""

    def __post_init__(self) -> None:
        check_fraction(self, "label_smoothing", "momentum")
        check(
            all(0 <= beta < 1 for beta in self.betas),
            f"betas: must lie in 0 to below 1, not {list(self.betas)}",
        )
        check(0 <= self.ema < 1, f"ema: must lie in 0 to 1, not {self.ema}")
        check(self.weight_decay >= 0, "weight_decay: must be at least 0")
        check(self.warmup >= 0, "warmup: must be at least 0")
        check(self.focal_gamma >= 0, "focal_gamma: must be at least 0")
        check(self.logit_adjustment >= 0, "logit_adjustment: must be at least 0")
        check(
            self.logit_adjustment == 0 or self.loss in ("auto", "cross_entropy", "focal"),
            "logit_adjustment: needs loss: cross_entropy or focal",
        )
        check(
            self.logit_adjustment == 0 or self.class_weights == "none",
            "logit_adjustment: and class_weights both make up for rare classes; choose one",
        )
        check(self.skip_limit >= 1, "skip_limit: must be at least 1")
        check(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            "clip_grad_norm: must be positive or null",
        )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    global_: int = field(default=256, metadata={"key": "global"})
    """Samples an optimizer step, over all processes; never depends on the hardware."""
    micro: Literal["auto"] | int = "auto"
    """Samples of one forward pass; part of the run's identity (BatchNorm, mixup and dropout see one
    microbatch), so auto is resolved once and written to the run's config: on a GPU the largest that
    fits its memory, on a CPU up to 32."""
    sync_batchnorm: bool = False
    """BatchNorm layers that learn see the microbatches of all processes at once (torch's
    SyncBatchNorm, GPUs only). The result then depends on the number of processes."""

    def __post_init__(self) -> None:
        check(self.global_ > 0, "global: must be positive")
        if self.micro != "auto":
            check(self.micro > 0, "micro: must be auto or positive")
            check(
                self.global_ % self.micro == 0,
                f"micro: {self.micro} does not divide batch.global {self.global_}",
            )


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    cache_dir: str | None = None
    """Folder where the features of frozen parts are kept and found again by later runs; on a
    cluster one that all nodes see. null: ``rtl_dist/features`` in the user's cache folder."""
    cache_gb: float = 20.0
    """How much it may hold, in 10^9 bytes; what was used least recently goes first. A stage whose
    features are larger trains without."""

    def __post_init__(self) -> None:
        check(self.cache_gb > 0, "cache_gb: must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Every = field(default_factory=lambda: Every.parse("1 epoch"))
    """At most this much is done again after a kill, and what was trained while the newest
    checkpoint was being written. There is one before each evaluation and at each stage's end too.
    """
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""

    def __post_init__(self) -> None:
        check(self.keep >= 1, "keep: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: Every = field(default_factory=lambda: Every.parse("1 epoch"))
    """How often the val split is evaluated; always at the end of a stage."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when logged in, else offline; never a prompt."""
    project: str = "rtl_dist"


@dataclass(frozen=True, kw_only=True)
class Config:
    seed: int = 0
    """Of data order, augmentation, head initialisation, dropout and mixup."""
    run: RunConfig = RunConfig()
    data: DataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = ModelConfig()
    stages: list[StageConfig]
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    precision: Precision = "auto"
    """auto: bf16 where the hardware really has it, else fp16 on a GPU, else full precision.
    fp64 is for proofs of equality."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of each stage's network. auto: where much work remains, both ways are timed
    when the stage begins, and the faster one is taken."""
    features: FeaturesConfig = FeaturesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()

    def __post_init__(self) -> None:
        check(len(self.stages) > 0, "stages: must name at least one stage")
        names = [stage.name for stage in self.stages]
        check(len(set(names)) == len(names), f"stages: names must differ, not {names}")
        check(0 <= self.seed < 2**63, "seed: must lie in 0 to 2^63 - 1")
        for key in self.mixing_keys():
            check(self.data.backend != "stream", f"{key}: needs data.backend: indexed")
        check(
            self.data.sampling == "natural"
            or (self.optim.class_weights == "none" and self.optim.logit_adjustment == 0),
            "data.sampling: balanced makes up for rare classes, as do optim.class_weights and"
            " optim.logit_adjustment; choose one",
        )

    def mixing_keys(self) -> Iterator[str]:
        """The keys by which some stage mixes the images of a microbatch."""
        for number, stage in enumerate(self.stages):
            section = "augment" if stage.augment is None else f"stages.{number}.augment"
            for name in ("mixup", "cutmix"):
                if getattr(stage.augment or self.augment, name) > 0:
                    yield f"{section}.{name}"
