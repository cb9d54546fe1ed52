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


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_the_scaler_skips_is_noticed(fused):
    """Accelerate's own flag misses it with a fused optimizer."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from rtl_dist.stage_trainer import take_step

    Accelerator(cpu=True)  # the wrapper asks for its state
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu")
    inner = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    stepper = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    for factor, taken in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = weight.detach().clone()
        scaler.scale((weight * factor).sum()).backward()
        assert take_step(stepper, scaler) is taken
        assert torch.equal(before, weight.detach()) is not taken
        stepper.zero_grad(set_to_none=True)
    assert take_step(AcceleratedOptimizer(inner, device_placement=False), None)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "basic_cnn", "test_resnet"])
@pytest.mark.parametrize("policy", ["frozen", "stats", "train"])
def test_what_decays_is_told_by_the_kind_of_layer(name, policy):
    data = Data(path="x", image_size=32)
    model = make_classifier(Model(name=name, weights="none"), data, num_classes=3, seed=0)
    stage = Stage(name="all", epochs=1, lr=0.1, batchnorm=policy)
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, Optim(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    for module in model.modules():
        for path, parameter in module.named_parameters(recurse=False):
            kernel = isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and path == "weight"
            norm = isinstance(module, torch.nn.BatchNorm2d)
            if norm and policy != "train":
                assert id(parameter) not in decay
            else:
                assert decay[id(parameter)] == (0.3 if kernel else 0.0)


def test_the_optimizer_is_the_one_asked_for():
    model, stage = resnet(), Stage(name="head", epochs=1, lr=0.1, trainable="head")
    freeze_for(model, stage)
    sgd = build_optimizer(model, stage, Optim(name="sgd", momentum=0.8))
    assert isinstance(sgd, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.8, True)}
    plain = build_optimizer(model, stage, Optim(name="sgd", momentum=0))
    assert {(g["momentum"], g["nesterov"]) for g in plain.param_groups} == {(0, False)}
    adamw = build_optimizer(model, stage, Optim(betas=(0.8, 0.9)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert {g["betas"] for g in adamw.param_groups} == {(0.8, 0.9)}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities_as_labels_are_torch_s(smoothing):
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 4), torch.randn(6, 4).softmax(1)
    loss = make_loss(
        Optim(label_smoothing=smoothing), task="single_label", class_counts=(1,) * 4, device=CPU
    )
    expected = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss(scores, labels), expected)


def test_balanced_weights_average_1_and_survive_an_empty_class():
    counts = (10, 20, 30)
    loss = make_loss(Optim(class_weights="balanced", label_smoothing=0), task="single_label",
                     class_counts=counts, device=CPU)  # fmt: skip
    labels = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)])
    even = loss(torch.zeros(60, 3), labels)
    torch.testing.assert_close(even.mean(), torch.tensor(3.0).log())
    per_class = torch.zeros(3).index_add(0, labels, even)
    torch.testing.assert_close(per_class, per_class.mean().expand(3))  # each class counts alike
    empty = make_loss(Optim(class_weights="balanced"), task="single_label", class_counts=(5, 0),
                      device=CPU)  # fmt: skip
    assert torch.isfinite(empty(torch.zeros(2, 2), torch.tensor([0, 0]))).all()


def test_binary_cross_entropy_smooths_and_weighs_positives():
    torch.manual_seed(0)
    scores, labels = torch.randn(6, 4), torch.randint(0, 2, (6, 4)).float()
    loss = make_loss(
        Optim(label_smoothing=0.2), task="multi_label", class_counts=(1,) * 4, device=CPU
    )
    expected = F.binary_cross_entropy_with_logits(scores, labels * 0.8 + 0.1)
    torch.testing.assert_close(loss(scores, labels).mean(), expected)
    weighted = make_loss(Optim(label_smoothing=0, class_weights="balanced"), task="multi_label",
                         class_counts=(1, 2, 3, 4), device=CPU)  # fmt: skip
    weight = 10 / (4 * torch.tensor([1.0, 2, 3, 4]))
    expected = F.binary_cross_entropy_with_logits(scores, labels, pos_weight=weight)
    torch.testing.assert_close(weighted(scores, labels).mean(), expected)


@pytest.mark.parametrize("augment", [Augment(mixup=0.4), Augment(cutmix=1.0)])
def test_each_mix_alone_keeps_the_mass_of_its_labels(augment):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    mixed, targets = make_mixer(augment, num_classes=3)(images, labels)
    assert mixed.shape == images.shape
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(targets.sum(0), F.one_hot(labels, 3).float().sum(0))
    torch.testing.assert_close(mixed.sum(), images.float().sum())  # pixels move or are averaged
