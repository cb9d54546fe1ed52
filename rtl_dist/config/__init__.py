"""Every key of a config, its type and meaning, and the strict loader."""

from rtl_dist.config.calibrate import CalibrateConfig
from rtl_dist.config.convert import to_dict
from rtl_dist.config.data import DataConfig
from rtl_dist.config.loader import (
    load_config,
    parse_config,
    parse_section,
    read_run_config,
    to_yaml,
)
from rtl_dist.config.optim import OptimConfig
from rtl_dist.config.resolved_stage import ResolvedStage, StageSpan
from rtl_dist.config.schema import (
    BatchConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    FeaturesConfig,
    ModelConfig,
    Precision,
    RunConfig,
    TrackConfig,
)
from rtl_dist.config.stage import AugmentConfig, EarlyStopConfig, StageConfig

__all__ = [
    "AugmentConfig",
    "BatchConfig",
    "CalibrateConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EarlyStopConfig",
    "EvalConfig",
    "FeaturesConfig",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "ResolvedStage",
    "RunConfig",
    "StageConfig",
    "StageSpan",
    "TrackConfig",
    "load_config",
    "parse_config",
    "parse_section",
    "read_run_config",
    "to_dict",
    "to_yaml",
]
