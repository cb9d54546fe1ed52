"""Small networks and images for them, for the tests of the model."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.config import DataConfig, ModelConfig, StageConfig
from rtl_dist.model.build import make_classifier

NAMES = ["test_resnet", "resnet18", "torchvision:resnet18", "basic_cnn"]
RESNET_PARTS = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
CLASSES = ("ants", "bees", "wasps")


def classifier(name="test_resnet", *, channels=3, classes=3, seed=0, **model):
    data = DataConfig(path="", image_size=32, channels=channels)
    return make_classifier(
        ModelConfig(name=name, weights="none", **model), data, num_classes=classes, seed=seed
    )


def pixels(count=4, channels=3, seed=0, side=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator).to(torch.uint8)


def stage(**options):
    return StageConfig(**{"name": "s", "epochs": 1, "lr": 0.1, **options})


def moved_statistics(model):
    """Every BatchNorm gets numbers of its own, so that they matter: timm's start at 0 or 1."""
    generator = torch.Generator().manual_seed(9)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.0, generator=generator)
            nn.init.uniform_(layer.bias, 0.0, 0.5, generator=generator)
            layer.running_mean.copy_(torch.rand(layer.num_features, generator=generator) - 0.5)
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
    return model
