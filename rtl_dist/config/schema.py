"""The typed sections of a config. What a key means stands under it; the loader enforces the types.

The checks of a section raise one ``ValueError`` for all that is wrong with it, each starting with
the key's name; the loader adds the dotted path. Checks across sections are in ``Config``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rtl_dist.config.calibrate import CalibrateConfig
from rtl_dist.config.checks import Checks
from rtl_dist.config.data import DataConfig
from rtl_dist.config.optim import OptimConfig
from rtl_dist.config.places import Place
from rtl_dist.config.stage import AugmentConfig, EarlyStopConfig, StageConfig
from rtl_dist.core.intervals import Duration, Every

Precision = Literal["auto", "no", "fp16", "bf16", "fp64"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes, how it goes on, and when it ends."""

    dir: Place = "runs/default"
    """The run folder: everything the run writes. A run is continued by naming its folder again;
    one begins in a folder that is new or holds nothing but logs."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue from the newest whole checkpoint, if any. never: refuse a folder in use.
    must: refuse to start from nothing."""
    ledger: bool = False
    """Write every sample index by step and microbatch to ``ledger/`` (proof of the data order)."""
    log_every: Every = field(default_factory=lambda: Every.parse("50 steps"))
    """How often a row of training metrics is written between evaluations."""
    time_limit: Duration | None = None
    """After so long, such as ``11.5 hours`` or, as SLURM writes it, ``11:30:00``, the run saves
    itself and leaves with exit code 75, to be started again; null: never. Leave a few minutes of
    what the machine gives you."""
    timeout: Duration = field(default_factory=lambda: Duration.parse("5 minutes"))
    """A job of which some process does not answer for so long, or none makes progress, ends with a
    line that says which, and where it was (see ``heartbeats/``)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the weights that it starts from."""

    name: str = "resnet50"
    """A timm name (``resnet50``), ``torchvision:resnet50``, or ``basic_cnn``."""
    weights: Place = "pretrained"
    """pretrained (from the hub), none, a weights file (.safetensors, .pth, .pt, .th), or a run,
    checkpoint or exported folder."""
    head: Literal["auto", "new", "keep"] = "auto"
    """What becomes of the loaded weights' head. auto: kept when it was trained on the same classes,
    else a new one. keep: refuse weights whose head does not fit."""
    dropout: float = 0.0
    """Dropout probability before the head."""
    small_stem: bool = False
    """For images of about 32 pixels: the network begins with a 3 x 3 convolution of stride 1 and
    without pooling (ResNets of timm and torchvision that begin with one 7 x 7 convolution)."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check(0 <= self.dropout < 1, f"dropout: must lie in 0 to 1, not {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How the samples of a step are shared out."""

    global_: int | Literal["auto"] = field(default=256, metadata={"key": "global"})
    """Samples an optimizer step, over all processes; never depends on the hardware. auto: by the
    number of training images, see ``recipe``."""
    micro: Literal["auto"] | int = "auto"
    """Samples of one forward pass; part of the run's identity (BatchNorm, mixup and dropout see one
    microbatch), so auto is resolved once and written to the run's config: on a GPU the largest that
    fits its memory, on a CPU up to 32."""
    sync_batchnorm: bool = False
    """BatchNorm layers that learn see the microbatches of all processes at once (torch's
    SyncBatchNorm, GPUs only). The result then depends on the number of processes."""

    @property
    def total(self) -> int:
        """Samples an optimizer step, over all processes; of a resolved config."""
        assert self.global_ != "auto"
        return self.global_

    def __post_init__(self) -> None:
        with Checks() as check:
            check.at_most(self, global_=2**20, micro=2**20)
            check(self.global_ == "auto" or self.global_ > 0, "global: must be auto or positive")
            if self.micro != "auto":
                check(self.micro > 0, "micro: must be auto or positive")
                check(
                    self.global_ == "auto"
                    or min(self.global_, self.micro) <= 0
                    or self.global_ % self.micro == 0,
                    f"micro: {self.micro} does not divide batch.global {self.global_}",
                    "global",
                )


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Where features of frozen parts are kept, for stages that have ``views``."""

    cache_dir: Place | None = None
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
            check.at_most(self, keep=10**6)


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
    recipe: Literal["auto"] | list[str] | None = None
    """auto: what the config does not say of ``batch.global`` and of stages that train the whole
    network is ``auto``; with no stages at all, the head is solved, then the whole network
    fine-tuned. An auto is chosen by measured rules for as many training images as there are, and
    the run's config has in its place what was chosen, and here why: ``key value: reason`` each."""
    stages: list[StageConfig]
    """What is trained, in order; at least one."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer, the loss, and what becomes of the learning rate within a stage, in every stage
    that does not say otherwise."""
    batch: BatchConfig = BatchConfig()
    """How the samples of a step are shared out."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware really has it, else fp16 on a GPU, else full precision. no:
    float32; see ``tf32``. fp64 is for proofs of equality."""
    tf32: bool = True
    """On GPUs from Ampere on convolutions in float32 (``precision: no``) round their factors to
    TF32, 10 bits of mantissa, as torch does by itself. false: float32 to the end, several times
    slower. Matrix products are float32 in either case."""
    deterministic: bool = True
    """On GPUs cuDNN's deterministic kernels, chosen by its rules: the same in every run and after a
    kill. false: whichever are fastest when tried at each new shape (``cudnn.benchmark``); samples,
    pixels and schedule stay the same, but a run, repeated or resumed, rounds otherwise, so that its
    weights come out close and not equal."""
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
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    """What ``best/`` promises of its probabilities when the run ends, fitted on ``data.val``."""
    track: TrackConfig = TrackConfig()
    """The copy of the metrics in W&B."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check(
                len(self.stages) > 0,
                "stages: must name at least one stage; recipe: auto chooses them",
                "recipe",
            )
            check(
                self.model.weights != "none" or not self.auto_keys,
                f"model.weights: none, and {' and '.join(self.auto_keys)}: auto, which is for a"
                " network that was trained before; give numbers, as configs/tiny_backbone.yaml"
                " does",
                "recipe",
                "batch",
                "stages",
            )
            names = [stage.name for stage in self.stages]
            check(len(set(names)) == len(names), f"stages: names must differ, not {names}")
            check(0 <= self.seed < 2**63, "seed: must lie in 0 to 2^63 - 1")
            for key in dict.fromkeys(self.mixing_keys()):
                indexed = self.data.backend == "indexed"
                check(indexed, f"{key}: needs data.backend: indexed", "data", "stages", "augment")
            for path, optim in self.optim_sections().items():
                check(
                    self.data.sampling == "natural"
                    or (optim.class_weights == "none" and optim.logit_adjustment == 0),
                    f"data.sampling: balanced makes up for rare classes, as do {path}.class_weights"
                    f" and {path}.logit_adjustment; choose one",
                    "optim",
                    "stages",
                )
            for number in range(len(self.stages)):
                self._check_stage_optim(check, number)
                self._check_solved(check, number)

    @property
    def of_recipe(self) -> dict[str, float | Literal["auto"] | None]:
        """The values, by key, that may be left to the rules of ``recipe``."""
        values: dict[str, float | Literal["auto"] | None] = {"batch.global": self.batch.global_}
        for number, stage in enumerate(self.stages):
            values |= {f"stages.{number}.epochs": stage.epochs, f"stages.{number}.lr": stage.lr}
        return values

    @property
    def auto_keys(self) -> list[str]:
        """The keys that are left to them."""
        return [key for key, value in self.of_recipe.items() if value == "auto"]

    def _check_solved(self, check: Checks, number: int) -> None:
        """What a stage that is solved asks of the rest."""
        if not self.stages[number].solve:
            return
        path, optim = self._optim_of(number)
        check(
            self.optim.ema == 0 or all(s.trains_head_alone for s in self.stages[:number]),
            f"stages.{number}.solve: the averaged weights of the stages before make other features,"
            " which another head would fit; solve before them, or set optim.ema: 0",
            "optim",
            "stages",
        )
        check(
            optim.loss != "focal",
            f"stages.{number}.solve: the focal loss has no one optimum; set {path}.loss to another,"
            " or leave solve out",
            "optim",
            "stages",
        )
        check(
            self.data.backend == "indexed",
            f"stages.{number}.solve: needs data.backend: indexed",
            "data",
            "stages",
        )

    def _check_stage_optim(self, check: Checks, number: int) -> None:
        """What a stage's optimizer must have of the run's, and its schedule of other keys."""
        stage = self.stages[number]
        path, optim = self._optim_of(number)
        for key in ("ema", "ema_batchnorm"):
            check(
                getattr(optim, key) == getattr(self.optim, key),
                f"stages.{number}.optim.{key}: there is one average of the whole run; leave it out"
                f" and set optim.{key}",
                "optim",
            )
        schedule = stage.schedule or optim.schedule
        check(
            schedule != "step" or optim.step_size is not None,
            f"{path}.step_size: schedule: step needs it, in epochs",
            "optim",
            "stages",
        )
        if schedule != "plateau":
            return
        lr, early_stop = stage.lr, stage.early_stop or self.early_stop
        check(
            lr is None or lr == "auto" or optim.min_lr < lr,
            f"{path}.min_lr: must be below stages.{number}.lr, {lr}",
            "optim",
            "stages",
        )
        check(
            early_stop.patience is None or optim.patience < early_stop.patience - 1,
            f"{path}.patience: stage {stage.name} would end by early_stop.patience before its rate"
            f" falls; set that to {optim.patience + 2} or more",
            "optim",
            "stages",
            "early_stop",
        )

    def _optim_of(self, number: int) -> tuple[str, OptimConfig]:
        """The path and the section by which a stage is trained."""
        own = self.stages[number].optim
        return ("optim", self.optim) if own is None else (f"stages.{number}.optim", own)

    def optim_sections(self) -> dict[str, OptimConfig]:
        """Those by which some stage is trained, by path."""
        return dict(self._optim_of(number) for number in range(len(self.stages)))

    def mixing_keys(self) -> Iterator[str]:
        """The keys by which some stage mixes the images of a microbatch."""
        for number, stage in enumerate(self.stages):
            section = "augment" if stage.augment is None else f"stages.{number}.augment"
            for name in ("mixup", "cutmix"):
                if getattr(stage.augment or self.augment, name) > 0:
                    yield f"{section}.{name}"
