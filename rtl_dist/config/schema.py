"""The typed sections of a config. What a key means stands under it; the loader enforces the types.

The checks of a section raise one ``ValueError`` for all that is wrong with it, each starting with
the key's name; the loader adds the dotted path. Checks across sections are in ``Config``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rtl_dist.config.checks import Checks
from rtl_dist.config.data import DataConfig
from rtl_dist.config.stage import AugmentConfig, EarlyStopConfig, StageConfig
from rtl_dist.core.intervals import Duration, Every

Precision = Literal["auto", "no", "fp16", "bf16", "fp64"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, how it goes on, and when it ends."""

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
class ModelConfig:
    """The network and the weights that it starts from."""

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
        with Checks() as check:
            check(0 <= self.dropout < 1, f"dropout: must lie in 0 to 1, not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, the loss, and what becomes of the learning rate within a stage."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay (arXiv 1711.05101). sgd: with ``momentum``."""
    weight_decay: float = 0.05
    """Not applied to biases and norms."""
    momentum: float = 0.9
    """Of sgd (Nesterov when above 0)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of adamw."""
    warmup: float = 0.05
    """Linear warm-up of each stage: below 1 a fraction of it, from 1 a number of steps."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The learning rate after warm-up. cosine, linear: it falls to 0 at the end of the stage."""
    clip_grad_norm: float | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""
    label_smoothing: float = 0.1
    """Part of each label that is shared equally among all classes (arXiv 1512.00567); with bce, by
    yes and no."""
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
        with Checks() as check:
            check.fractions(self, "label_smoothing", "momentum")
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
                "loss",
            )
            check(
                self.logit_adjustment == 0 or self.class_weights == "none",
                "logit_adjustment: and class_weights both make up for rare classes; choose one",
                "class_weights",
            )
            check(self.skip_limit >= 1, "skip_limit: must be at least 1")
            check(
                self.clip_grad_norm is None or self.clip_grad_norm > 0,
                "clip_grad_norm: must be positive or null",
            )


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How the samples of a step are shared out."""

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
        with Checks() as check:
            check(self.global_ > 0, "global: must be positive")
            if self.micro != "auto":
                check(self.micro > 0, "micro: must be auto or positive")
                check(
                    min(self.global_, self.micro) <= 0 or self.global_ % self.micro == 0,
                    f"micro: {self.micro} does not divide batch.global {self.global_}",
                    "global",
                )


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Where features of frozen parts are kept, for stages that have ``views``."""

    cache_dir: str | None = None
    """Folder where the features of frozen parts are kept and found again by later runs; on a
    cluster one that all nodes see. null: ``rtl_dist/features`` in the user's cache folder."""
    cache_gb: float = 20.0
    """How much it may hold, in 10^9 bytes; what was used least recently goes first. A stage whose
    features are larger trains without."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check(self.cache_gb > 0, "cache_gb: must be positive")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run saves itself."""

    every: Every = field(default_factory=lambda: Every.parse("1 epoch"))
    """At most this much is done again after a kill, and what was trained while the newest
    checkpoint was being written. There is one before each evaluation and at each stage's end too.
    """
    keep: int = 2
    """Newest checkpoints kept; older ones are deleted."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check(self.keep >= 1, "keep: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When the run is evaluated."""

    every: Every = field(default_factory=lambda: Every.parse("1 epoch"))
    """How often the val split is evaluated; always at the end of a stage."""


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """The copy of the metrics in W&B."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when logged in, else offline; never a prompt."""
    project: str = "rtl_dist"
    """Name of the W&B project that runs go to."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole config; what it does not say is as here."""

    seed: int = 0
    """Of data order, augmentation, head initialisation, dropout and mixup."""
    run: RunConfig = RunConfig()
    """Where the run writes, how it goes on, and when it ends."""
    data: DataConfig
    """Which data set, how it is read, and how its images reach the model."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training images are varied, in every stage that does not say otherwise."""
    model: ModelConfig = ModelConfig()
    """The network and the weights that it starts from."""
    stages: list[StageConfig]
    """What is trained, in order; at least one."""
    optim: OptimConfig = OptimConfig()
    """The optimizer, the loss, and what becomes of the learning rate within a stage."""
    batch: BatchConfig = BatchConfig()
    """How the samples of a step are shared out."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware really has it, else fp16 on a GPU, else full precision.
    fp64 is for proofs of equality."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of each stage's network. auto: where much work remains, both ways are timed
    when the stage begins, and the faster one is taken."""
    features: FeaturesConfig = FeaturesConfig()
    """Where features of frozen parts are kept, for stages that have ``views``."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run saves itself."""
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    """What the best weights are, and when a stage ends early; a stage may say otherwise."""
    eval: EvalConfig = EvalConfig()
    """When the run is evaluated."""
    track: TrackConfig = TrackConfig()
    """The copy of the metrics in W&B."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check(len(self.stages) > 0, "stages: must name at least one stage")
            names = [stage.name for stage in self.stages]
            check(len(set(names)) == len(names), f"stages: names must differ, not {names}")
            check(0 <= self.seed < 2**63, "seed: must lie in 0 to 2^63 - 1")
            for key in dict.fromkeys(self.mixing_keys()):
                indexed = self.data.backend == "indexed"
                check(indexed, f"{key}: needs data.backend: indexed", "data", "stages", "augment")
            check(
                self.data.sampling == "natural"
                or (self.optim.class_weights == "none" and self.optim.logit_adjustment == 0),
                "data.sampling: balanced makes up for rare classes, as do optim.class_weights and"
                " optim.logit_adjustment; choose one",
                "optim",
            )

    def mixing_keys(self) -> Iterator[str]:
        """The keys by which some stage mixes the images of a microbatch."""
        for number, stage in enumerate(self.stages):
            section = "augment" if stage.augment is None else f"stages.{number}.augment"
            for name in ("mixup", "cutmix"):
                if getattr(stage.augment or self.augment, name) > 0:
                    yield f"{section}.{name}"
