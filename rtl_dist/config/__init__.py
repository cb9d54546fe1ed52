"""Every key of a config, its type and meaning, and the strict loader."""

from rtl_dist.config.loader import load_config, parse_config, read_run_config, to_dict, to_yaml
from rtl_dist.config.schema import (
    Augment,
    Batch,
    Checkpoint,
    Config,
    Data,
    EarlyStop,
    Eval,
    Features,
    Model,
    Optim,
    Precision,
    Run,
    Stage,
    Track,
)

__all__ = [
    "Augment",
    "Batch",
    "Checkpoint",
    "Config",
    "Data",
    "EarlyStop",
    "Eval",
    "Features",
    "Model",
    "Optim",
    "Precision",
    "Run",
    "Stage",
    "Track",
    "load_config",
    "parse_config",
    "read_run_config",
    "to_dict",
    "to_yaml",
]
