"""Which key a user meant who typed one that is not there."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterable
from typing import Any

from rtl_dist.config.schema import Config
from rtl_dist.core.text import did_you_mean, nearest

_EVERY_STAGE = "stages.NAME"
_MOST_SHOWN = 3

# other programs' names of our keys: timm's, Lightning's, transformers', torchvision's references'
_OTHER_NAMES = {
    f"{_EVERY_STAGE}.lr": "learning_rate learningrate base_lr max_lr lr_head",
    f"{_EVERY_STAGE}.epochs": "epoch num_epochs max_epochs n_epochs num_train_epochs",
    f"{_EVERY_STAGE}.steps": "max_steps num_steps train_steps iterations",
    f"{_EVERY_STAGE}.trainable": "freeze unfreeze frozen freeze_backbone train_layers",
    f"{_EVERY_STAGE}.layer_decay": "layerwise_lr_decay llrd lr_decay",
    "batch.global": "batch_size batchsize bs train_batch_size global_batch_size",
    "batch.micro": "micro_batch_size microbatch per_device_train_batch_size physical_batch_size"
    " grad_accum accumulate gradient_accumulation_steps grad_accum_steps",
    "batch.sync_batchnorm": "sync_bn syncbn",
    "checkpoint.every": "save_every save_steps save_freq checkpoint_every",
    "data.channels": "in_chans input_channels",
    "data.image_size": "img_size imgsz imgsize image_sz input_size resolution size",
    "data.path": "dataset data_dir data_path train_dir root",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "early_stop.patience": "early_stopping",
    "eval.every": "eval_every eval_steps val_every val_interval",
    "model.name": "arch architecture backbone model_name net network",
    "model.weights": "pretrained checkpoint_path weight init",
    "model.dropout": "drop drop_rate",
    "optim.clip_grad_norm": "clip_grad grad_clip max_grad_norm gradient_clip_val",
    "optim.label_smoothing": "smoothing",
    "optim.name": "optimizer opt optimiser",
    "optim.schedule": "scheduler lr_scheduler sched lr_schedule",
    "optim.warmup": "warmup_steps warmup_epochs warmup_ratio",
    "optim.weight_decay": "wd weightdecay",
    "precision": "amp fp16 bf16 mixed_precision dtype",
    "run.dir": "output output_dir out out_dir save_dir logdir log_dir run_dir",
    "run.log_every": "log_interval log_steps logging_steps",
    "seed": "random_seed random_state manual_seed",
    "track.project": "wandb_project",
    "track.wandb": "use_wandb report_to logger",
}


def which_is_meant(key: str, known: list[str], *, of_config: bool) -> str:
    """What to say behind the message that a section does not have a key: the one that may have been
    meant, or those that the section has.

    Args:
        of_config: the section is in a config, whose other sections may have the key.
    """
    paths = _elsewhere(key) if of_config else []
    if here := [name for path in paths if (name := path.rpartition(".")[2]) in known]:
        return f"; did you mean {here[0]}?"
    if paths:
        return f"; did you mean {' or '.join(paths)}?"
    return (
        did_you_mean(key, known)
        or _near_elsewhere(key, of_config)
        or (f"; known here: {', '.join(known)}")
    )


def with_stages_named(sentence: str, names: list[str]) -> str:
    """A sentence of ours with the names of a config's stages in place of any stage's."""
    if not names:
        return sentence
    return re.sub(
        rf"{re.escape(_EVERY_STAGE)}\.(\w+)",
        lambda key: " or ".join(f"stages.{name}.{key[1]}" for name in names[:_MOST_SHOWN]),
        sentence,
    )


def option_as_override(option: str) -> str:
    """What to say behind the message that a command has no option ``--lr``: the override."""
    key = option.lstrip("-").partition("=")[0].replace("-", "_")
    paths = [key] if key in _paths() else _elsewhere(key.rpartition(".")[2]) if key else []
    return f"; a key of the config is given as {paths[0]}=VALUE" if paths else ""


def _elsewhere(key: str) -> list[str]:
    """The paths of keys that are called so, or are elsewhere called so."""
    name = key.lower().replace("-", "_")
    by_name = [path for path in _paths() if path.rpartition(".")[2] == name]
    others = [path for path, names in _OTHER_NAMES.items() if name in names.split()]
    return (by_name or others)[:_MOST_SHOWN]


def _near_elsewhere(key: str, of_config: bool) -> str:
    leaves = {path.rpartition(".")[2] for path in _paths()}
    near = nearest(key, leaves) if of_config else None
    return f"; did you mean {' or '.join(_elsewhere(near))}?" if near else ""


@functools.cache
def _paths() -> list[str]:
    """Of all keys of a config; a stage's own, and those of sections that it may have too as the
    run's."""
    return list(_of_section(Config, ""))


def _of_section(section: type, path: str) -> Iterable[str]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        where = f"{path}{field.metadata.get('key', field.name)}"
        kind: Any = hints[field.name]
        if where == "stages":
            yield from _of_section(typing.get_args(kind)[0], f"{_EVERY_STAGE}.")
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type) and not _is_text(kind):
            yield from _of_section(kind, f"{where}.")
        else:
            yield where


def _is_text(kind: type) -> bool:
    """Of a dataclass: whether a config writes it as text."""
    return hasattr(kind, "parse")
