"""Parameter groups, losses and mixing."""

import pytest
import torch
import torch.nn.functional as F

from rtl_dist.config import Augment, Data, Model, Optim, Stage
from rtl_dist.mixing import make_mixer
from rtl_dist.model.build import make_classifier
from rtl_dist.model.parts import freeze_for
from rtl_dist.optim import build_optimizer, make_loss, set_learning_rates

CPU = torch.device("cpu")


def resnet():
    data = Data(path="x", image_size=32)
    return make_classifier(Model(name="test_resnet", weights="none"), data, num_classes=3, seed=0)


def test_each_parameter_is_in_one_group_and_norms_and_biases_do_not_decay():
    model = resnet()
    stage = Stage(name="all", epochs=1, lr=0.1, layer_decay=0.5, batchnorm="train")
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, Optim(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, parameter in names.items():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0), name
    # a norm inside ``downsample``, which a rule by name misses
    assert decay[id(names["trunk.layer2.0.downsample.2.weight"])] == 0.0


def test_rates_fall_by_layer_decay_from_the_head_down():
    model = resnet()
    stage = Stage(name="all", epochs=1, lr=0.1, layer_decay=0.5, batchnorm="train")
    freeze_for(model, stage)
    rates = set_learning_rates(build_optimizer(model, stage, Optim()), 0.5)
    expected = {"head": 0.05, "layer4": 0.025, "layer3": 0.0125, "layer2": 0.00625,
                "layer1": 0.003125, "stem": 0.0015625}  # fmt: skip
    assert rates == {f"lr/{part}": pytest.approx(rate) for part, rate in expected.items()}


def test_a_frozen_part_is_in_no_group():
    model = resnet()
    stage = Stage(name="top", epochs=1, lr=0.1, trainable=["layer4", "head"])
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, Optim(name="sgd"))
    assert {group["part"] for group in optimizer.param_groups} == {"layer4", "head"}


def test_cross_entropy_is_torch_s_and_does_not_depend_on_how_a_batch_is_split():
    torch.manual_seed(0)
    scores, labels = torch.randn(12, 3), torch.randint(0, 3, (12,))
    plain = make_loss(Optim(), task="single_label", class_counts=(1, 1, 1), device=CPU)
    expected = F.cross_entropy(scores, labels, label_smoothing=0.1)
    torch.testing.assert_close(plain(scores, labels).mean(), expected)
    weighted = make_loss(Optim(class_weights="balanced", label_smoothing=0), task="single_label",
                         class_counts=(10, 20, 30), device=CPU)  # fmt: skip
    losses = weighted(scores, labels)
    weight = torch.tensor([2.0, 1.0, 2 / 3])[labels]
    torch.testing.assert_close(losses, F.cross_entropy(scores, labels, reduction="none") * weight)
    parts = torch.cat([weighted(scores[:5], labels[:5]), weighted(scores[5:], labels[5:])])
    assert torch.equal(losses, parts)
    one_hot = F.one_hot(labels, 3).float()
    torch.testing.assert_close(weighted(scores, one_hot), losses)


def test_binary_cross_entropy_over_classes():
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 4), torch.randint(0, 2, (6, 4)).float()
    loss = make_loss(
        Optim(label_smoothing=0), task="multi_label", class_counts=(1,) * 4, device=CPU
    )
    expected = F.binary_cross_entropy_with_logits(scores, labels)
    torch.testing.assert_close(loss(scores, labels).mean(), expected)


def test_mixing_follows_the_generator_alone():
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 0])
    mix = make_mixer(Augment(mixup=0.4, cutmix=1.0), num_classes=3)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mix(images, labels))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    torch.testing.assert_close(results[0][1].sum(1), torch.ones(4))
    same = make_mixer(Augment(), num_classes=3)(images, labels)
    assert same[0] is images
    assert same[1] is labels
