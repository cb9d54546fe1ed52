"""Builds the classifier a config asks for, with its weights."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.errors import UserError
from rtl_dist.core.keys import Stream, stream_key
from rtl_dist.core.text import did_you_mean
from rtl_dist.model.basic_cnn import NUM_FEATURES, BasicCNN
from rtl_dist.model.classifier import Classifier, Preprocessing
from rtl_dist.model.head import Head
from rtl_dist.model.stem import use_small_stem
from rtl_dist.model.weights import load_weights

LOG = logging.getLogger("rtl_dist")

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORCHVISION = "torchvision:"


def build_model(
    config: ModelConfig, data: DataConfig, *, classes: tuple[str, ...], seed: int
) -> tuple[Classifier, str]:
    """The classifier on the CPU, the same on every rank, and a line on where its weights are from.

    Raises:
        UserError: unknown name, weights that cannot be had or do not fit.
    """
    model = make_classifier(
        config, data, num_classes=len(classes), seed=seed, download=config.weights == "pretrained"
    )
    if config.weights == "none":
        return model, "random weights"
    if config.weights == "pretrained":
        return model, f"pretrained weights of {config.name}"
    return model, load_weights(model, config.weights, head=config.head, classes=classes)


def make_classifier(
    config: ModelConfig,
    data: DataConfig,
    *,
    num_classes: int,
    seed: int,
    download: bool = False,
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Classifier:
    """The classifier with a fresh head; the trunk is random, or the hub's with ``download``.

    mean_std: of the pixels, one number a channel; None takes those of the architecture.
    """
    torch.manual_seed(stream_key(seed, Stream.TRUNK) >> 1)
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    if config.name == "basic_cnn":
        if download:
            raise UserError("model.weights: basic_cnn has no pretrained weights; set it to none")
        trunk: Any = BasicCNN(data.channels)  # an nn.Module; timm's have attributes of their own
        native_head, num_features = "fc", NUM_FEATURES
    elif config.name.startswith(_TORCHVISION):
        trunk, native_head, num_features = _torchvision_trunk(
            config.name.removeprefix(_TORCHVISION), data.channels, download
        )
    else:
        trunk, native_head, num_features = _timm_trunk(config.name, data.channels, download)
        mean, std = trunk.default_cfg["mean"], trunk.default_cfg["std"]
    if config.small_stem:
        use_small_stem(trunk, config.name, pretrained=download)
    if data.channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    if mean_std is not None:
        mean, std = mean_std
    torch.manual_seed(stream_key(seed, Stream.HEAD) >> 1)  # whatever the trunk drew
    return Classifier(
        trunk,
        Head(num_features, num_classes, dropout=config.dropout),
        native_head=native_head,
        preprocessing=Preprocessing(
            image_size=data.image_size, crop_pct=data.crop_pct, mean=tuple(mean), std=tuple(std)
        ),
    )


def _timm_trunk(name: str, channels: int, download: bool) -> tuple[Any, str, int]:
    import timm

    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise UserError(f"model.name: timm has no model {name!r}{hint}")
    architecture, _, tag = name.partition(".")
    if tag and name not in (tags := timm.list_pretrained(f"{architecture}.*")):
        raise UserError(
            f"model.name: timm has no weights {tag!r} of {architecture}; it has"
            f" {', '.join(tags) or 'none'}"
        )
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    try:
        if download:
            LOG.info("fetching the pretrained weights of %s, where they are not here yet", name)
            hub.setLevel(logging.ERROR)  # it warns of each of twelve tries; the last one is told
        trunk = timm.create_model(name, pretrained=download, num_classes=0, in_chans=channels)
    except Exception as error:
        if not download:
            raise
        raise _no_download(name, error) from error
    finally:
        hub.setLevel(level)
    native_head = trunk.default_cfg["classifier"]
    if not isinstance(native_head, str):
        raise UserError(f"model.name: {name} has several heads; choose a model with one")
    # some widen what their stages give, behind the pooling
    return trunk, native_head, getattr(trunk, "head_hidden_size", trunk.num_features)


def _torchvision_trunk(name: str, channels: int, download: bool) -> tuple[nn.Module, str, int]:
    from torchvision import models

    if name not in models.list_models(module=models):
        hint = did_you_mean(name, models.list_models(module=models), _TORCHVISION + "{}")
        raise UserError(f"model.name: torchvision has no classifier {name!r}{hint}")
    try:
        with warnings.catch_warnings():  # two of them announce that weights will begin otherwise
            warnings.filterwarnings("ignore", "The default weight init", FutureWarning)
            trunk = models.get_model(name, weights="DEFAULT" if download else None)
    except Exception as error:
        if not download:
            raise
        raise _no_download(_TORCHVISION + name, error) from error
    native_head, head = next(
        (
            (path, module)
            for path, module in reversed(list(trunk.named_modules()))
            if isinstance(module, nn.Linear)
        ),
        ("", None),
    )
    if head is None:
        raise UserError(f"model.name: {name} does not end in a linear head")
    trunk.set_submodule(native_head, nn.Identity())
    if channels == 1:
        _sum_first_convolution(trunk)
    return trunk, native_head, head.in_features


def _sum_first_convolution(trunk: nn.Module) -> None:
    """Makes a colour network take grey input: its first kernel summed over the colours."""
    # Any: to torch's types a convolution's sizes are of any length, and a new one wants pairs
    convolutions: list[tuple[str, Any]] = [
        (path, module) for path, module in trunk.named_modules() if isinstance(module, nn.Conv2d)
    ]
    path, conv = convolutions[0]
    grey = nn.Conv2d(
        1,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        grey.weight.copy_(conv.weight.sum(1, keepdim=True))
        if conv.bias is not None and grey.bias is not None:
            grey.bias.copy_(conv.bias)
    trunk.set_submodule(path, grey)


def _no_download(name: str, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"model.weights: cannot fetch pretrained weights of {name} ({reason}); set model.weights to"
        " a local file, or to none"
    )
