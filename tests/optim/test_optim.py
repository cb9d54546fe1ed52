"""Parameter groups, steps that are not taken, and mixing."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rtl_dist.config import AugmentConfig, DataConfig, ModelConfig, OptimConfig, StageConfig
from rtl_dist.model.build import make_classifier
from rtl_dist.model.freezing import freeze_for
from rtl_dist.optim.mixing import make_mixer
from rtl_dist.optim.optimizer import build_optimizer, require_learning_rates, set_learning_rates


def resnet():
    data = DataConfig(path="x", image_size=32)
    return make_classifier(
        ModelConfig(name="test_resnet", weights="none"), data, num_classes=3, seed=0
    )


def test_each_parameter_is_in_one_group_and_norms_and_biases_do_not_decay():
    model = resnet()
    stage = StageConfig(name="all", epochs=1, lr=0.1, layer_decay=0.5, batchnorm="train")
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, OptimConfig(weight_decay=0.3), lr=0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert len(decay) == len(names)
    for name, parameter in names.items():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0), name
    # a norm inside ``downsample``, which a rule by name misses
    assert decay[id(names["trunk.layer2.0.downsample.2.weight"])] == 0.0


def test_rates_fall_by_layer_decay_from_the_head_down():
    model = resnet()
    stage = StageConfig(name="all", epochs=1, lr=0.1, layer_decay=0.5, batchnorm="train")
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, OptimConfig(), lr=0.1)
    rates = set_learning_rates(optimizer, 0.5)
    expected = {"head": 0.05, "layer4": 0.025, "layer3": 0.0125, "layer2": 0.00625,
                "layer1": 0.003125, "stem": 0.0015625}  # fmt: skip
    assert rates == {f"lr/{part}": pytest.approx(rate) for part, rate in expected.items()}
    assert set_learning_rates(optimizer, 1.0) == {k: pytest.approx(2 * v) for k, v in rates.items()}


def test_a_rate_that_something_else_has_set_is_noticed():
    model, stage = resnet(), StageConfig(name="all", epochs=1, lr=0.1, layer_decay=0.5)
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, OptimConfig(), lr=0.1)
    set_learning_rates(optimizer, 0.3)
    require_learning_rates(optimizer, 0.3)
    optimizer.param_groups[2]["lr"] *= 1.0001
    (part,) = optimizer.param_groups[2]["parts"]
    with pytest.raises(RuntimeError, match=f"the learning rate of {part} is .* was to be"):
        require_learning_rates(optimizer, 0.3)


def test_a_frozen_part_is_in_no_group():
    model = resnet()
    stage = StageConfig(name="top", epochs=1, lr=0.1, trainable=["layer4", "head"], layer_decay=1.0)
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, OptimConfig(name="sgd"), lr=0.1)
    assert [group["parts"] for group in optimizer.param_groups] == [["head", "layer4"], ["head"]]
    assert set_learning_rates(optimizer, 0.5) == {"lr/head": 0.05, "lr/layer4": 0.05}


def test_mixing_follows_the_generator_alone():
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    labels = torch.tensor([0, 1, 2, 0])
    mix = make_mixer(AugmentConfig(mixup=0.4, cutmix=1.0), num_classes=3)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mix(images, labels))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    torch.testing.assert_close(results[0][1].sum(1), torch.ones(4))
    same = make_mixer(AugmentConfig(), num_classes=3)(images, labels)
    assert same[0] is images
    assert same[1] is labels


def test_a_step_that_the_scaler_skips_is_noticed():
    """Accelerate's own flag misses it with a fused optimizer."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from rtl_dist.training.stage_optimizer import take_scaled_step

    Accelerator(cpu=True)  # the wrapper asks for its state
    weight = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu")
    inner = torch.optim.AdamW([weight], lr=0.1, fused=True)
    stepper = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    for factor, taken in ((1.0, True), (float("inf"), False), (1.0, True)):
        before = weight.detach().clone()
        scaler.scale((weight * factor).sum()).backward()
        assert bool(take_scaled_step(stepper, scaler)) is taken
        assert torch.equal(before, weight.detach()) is not taken
        stepper.zero_grad(set_to_none=True)


OPTIMS = [OptimConfig(), OptimConfig(name="sgd"), OptimConfig(name="sgd", momentum=0)]


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def state_of(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of all that a step changes."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        kept |= {f"{number}.{name}": value.clone() for name, value in state.items()
                 if value is not None}  # fmt: skip
    return kept


def run_steps(config, gradients, *, skip):
    """The model and the optimizer's state after each step; those numbered in ``skip`` meet a
    gradient that is not finite and are told so."""
    model, stage = resnet(), StageConfig(name="all", epochs=1, lr=0.1, batchnorm="train")
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, config, lr=0.1)
    states = []
    for number, gradient in enumerate(gradients):
        bad = number in skip
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if bad else gradient)
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        states.append(state_of(model, optimizer))
    return states


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("config", OPTIMS, ids=["adamw", "sgd", "sgd without momentum"])
@pytest.mark.parametrize("skipped", [0, 2])
def test_a_step_that_is_not_taken_leaves_no_trace(config, skipped, uninitialised_memory_is_nan):
    plain = run_steps(config, [0.5, -0.25, 1.0], skip=())
    gradients = [0.5, -0.25, 1.0]
    gradients.insert(skipped, torch.nan)
    told = run_steps(config, gradients, skip={skipped})
    if skipped:
        assert same(told[skipped], told[skipped - 1])
    else:
        assert all(torch.equal(told[0][k], v) for k, v in resnet().state_dict().items())
        assert all(not value.any() for name, value in told[0].items() if name[0].isdigit())
    del told[skipped]
    assert all(same(one, other) for one, other in zip(told, plain, strict=True))
    assert not same(plain[0], plain[1])


@pytest.mark.parametrize("config", OPTIMS, ids=["adamw", "sgd", "sgd without momentum"])
def test_steps_are_those_of_torch_s_plain_optimizer(config):
    model = resnet()
    if config.name == "sgd":
        momentum = config.momentum
        build = partial(torch.optim.SGD, momentum=momentum, nesterov=momentum > 0)
    else:
        build = torch.optim.AdamW
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": plain, "weight_decay": 0.0}]  # fmt: skip
    optimizer = build(groups, lr=0.1, fused=False)
    gradients = [0.5, -0.25, 1.0]
    for gradient, expected in zip(gradients, run_steps(config, gradients, skip=()), strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("name", ["torchvision:resnet18", "basic_cnn", "test_resnet"])
@pytest.mark.parametrize("policy", ["frozen", "stats", "train"])
def test_what_decays_is_told_by_the_kind_of_layer(name, policy):
    data = DataConfig(path="x", image_size=32)
    model = make_classifier(ModelConfig(name=name, weights="none"), data, num_classes=3, seed=0)
    stage = StageConfig(name="all", epochs=1, lr=0.1, batchnorm=policy)
    freeze_for(model, stage)
    optimizer = build_optimizer(model, stage, OptimConfig(weight_decay=0.3), lr=0.1)
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
    model, stage = resnet(), StageConfig(name="head", epochs=1, lr=0.1, trainable="head")
    freeze_for(model, stage)
    sgd = build_optimizer(model, stage, OptimConfig(name="sgd", momentum=0.8), lr=0.1)
    assert isinstance(sgd, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.8, True)}
    plain = build_optimizer(model, stage, OptimConfig(name="sgd", momentum=0), lr=0.1)
    assert {(g["momentum"], g["nesterov"]) for g in plain.param_groups} == {(0, False)}
    adamw = build_optimizer(model, stage, OptimConfig(betas=(0.8, 0.9)), lr=0.1)
    assert isinstance(adamw, torch.optim.AdamW)
    assert {g["betas"] for g in adamw.param_groups} == {(0.8, 0.9)}


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0)])
def test_each_mix_alone_keeps_the_mass_of_its_labels(augment):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    mixed, targets = make_mixer(augment, num_classes=3)(images, labels)
    assert mixed.shape == images.shape
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(targets.sum(0), F.one_hot(labels, 3).float().sum(0))
    torch.testing.assert_close(mixed.sum(), images.float().sum())  # pixels move or are averaged
