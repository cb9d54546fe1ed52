"""Parts of a network, what a stage trains of them, and that nothing else moves."""

import pytest
import torch
from networks import NAMES, RESNET_PARTS, classifier, moved_statistics, pixels, stage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.config import DataConfig, ModelConfig
from rtl_dist.core.errors import UserError
from rtl_dist.model.batchnorm import StepStatistics
from rtl_dist.model.build import make_classifier
from rtl_dist.model.freezing import (
    digest,
    freeze_for,
    frozen_tensors,
    parameters_without_gradient,
    set_modes,
    trainable_tensors,
)
from rtl_dist.model.parts import parts_of, trainable_parts


@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_lies_in_one_part(name):
    model = classifier(name)
    covered = [
        parameter
        for modules in parts_of(model).values()
        for module in modules
        for parameter in module.parameters()
    ]
    assert len(covered) == len({id(p) for p in covered})
    assert {id(p) for p in covered} == {id(p) for p in model.parameters()}


def test_a_part_the_model_lacks_is_refused_with_the_nearest():
    model = classifier()
    with pytest.raises(
        UserError, match=r"stages.1.trainable: .* no part 'layer5'; did you mean la"
    ):
        trainable_parts(model, stage(trainable=["head", "layer5"]), key="stages.1.trainable")
    with pytest.raises(
        UserError, match=r"no part 'xyz' \(its parts: stem, layer1, .*; all; or a part"
    ):
        trainable_parts(model, stage(trainable="xyz"))
    assert trainable_parts(model, stage(trainable="all")) == set(RESNET_PARTS)
    assert trainable_parts(model, stage(trainable="head")) == {"head"}
    assert trainable_parts(model, stage(trainable=["head", "layer4"])) == {"head", "layer4"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "test_vit",
            [
                "stem",
                "blocks.0",
                "blocks.1",
                "blocks.2",
                "blocks.3",
                "blocks.4",
                "blocks.5",
                "norm",
                "head",
            ],
        ),
        (
            "test_convnext",
            ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "pre_head", "head"],
        ),
        (
            "test_efficientnet",
            ["stem", *(f"blocks.{n}" for n in range(5)), "conv_head", "bn2", "head"],
        ),
        ("regnety_002", ["stem", "s1", "s2", "s3", "s4", "head"]),
    ],
)
def test_a_network_of_another_family_falls_into_its_stages(name, parts):
    with torch.device("meta"):
        model = make_classifier(
            ModelConfig(name=name, weights="none"),
            DataConfig(path="", image_size=160),
            num_classes=3,
            seed=0,
        )
    assert list(parts_of(model)) == parts
    above = parts[parts.index(parts[3]) :]
    assert trainable_parts(model, stage(trainable=f"{parts[3]}+")) == set(above)
    container = parts[3].partition(".")[0]
    within = {part for part in parts if part.partition(".")[0] == container}
    assert trainable_parts(model, stage(trainable=[container, "head"])) == {*within, "head"}
    if container != parts[3]:
        assert trainable_parts(model, stage(trainable=f"{container}+")) == set(parts[1:])


def test_a_network_that_does_not_fall_into_parts_is_refused():
    """Else what lies outside of them would be trained though frozen, or the other way round."""
    model = make_classifier(
        ModelConfig(name="test_convnext", weights="none"),
        DataConfig(path="", image_size=160),
        num_classes=3,
        seed=0,
    )
    model.trunk.stages.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(
        UserError, match=r"model.name: .* outside of its stages \(trunk\.stages\.sc"
    ):
        trainable_parts(model, stage(trainable="head"))


def batchnorms(model):
    return {
        "head" if name.startswith("head") else name.removeprefix("trunk."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
    }


@pytest.mark.parametrize("policy", ["frozen", "stats", "train"])
@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_what_a_stage_trains(name, policy):
    model = classifier(name)
    freeze_for(model, stage(trainable=["layer4", "head"], batchnorm=policy))
    is_norm = {
        id(p) for layer in batchnorms(model).values() for p in layer.parameters(recurse=False)
    }
    for path, parameter in model.named_parameters():
        in_stage = path.startswith(("trunk.layer4", "head"))
        wanted = in_stage and (policy == "train" or id(parameter) not in is_norm)
        assert parameter.requires_grad == wanted, path
    for path, layer in batchnorms(model).items():
        assert layer.training == (path.startswith("layer4") and policy != "frozen"), path
    assert model.head.dropout.training
    assert not model.trunk.layer3.training
    assert model.trunk.layer4.training
    # and a later stage starts from what it says, not from what the last one left
    freeze_for(model, stage(batchnorm="train"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    freeze_for(model, stage(trainable="head"))
    assert set(trainable_tensors(model)) == {"head.weight", "head.bias"}


def test_modes_come_back_after_an_evaluation():
    model, chosen = classifier(), stage(trainable=["layer4", "head"], batchnorm="stats")
    freeze_for(model, chosen)
    modes = [module.training for module in model.modules()]
    for disturb in (model.eval, model.train):
        disturb()
        set_modes(model, chosen)
        assert [module.training for module in model.modules()] == modes


def train_steps(model, *, steps=3, statistics=True):
    """Real optimizer steps of two microbatches, statistics folded as the engine does."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    folded = StepStatistics(model) if statistics else None
    for step in range(steps):
        if folded:
            folded.begin()
        for microbatch in range(2):
            scores = model(pixels(seed=10 * step + microbatch))
            nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2, 0])).backward()
            if folded:
                folded.add()
        optimizer.step()
        optimizer.zero_grad()
        if folded:
            folded.fold(lambda mean: mean, taken=torch.tensor(True))
    if folded:
        folded.close()


@pytest.mark.parametrize("policy", ["frozen", "stats", "train"])
@pytest.mark.parametrize("trainable", ["head", ["layer4", "head"], "all"])
def test_only_what_may_move_moves(trainable, policy):
    model = moved_statistics(classifier())
    freeze_for(model, stage(trainable=trainable, batchnorm=policy))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = digest(frozen_tensors(model))
    train_steps(model)
    assert digest(frozen_tensors(model)) == frozen
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    of_norms = {
        f"trunk.{path}.{name}"
        for path, layer in batchnorms(model).items()
        for name in layer.state_dict()
    }
    for name in before:
        part = "head" if name.startswith("head") else name.split(".")[1]
        part = part if part.startswith(("layer", "head")) else "stem"
        may_move = trainable == "all" or part in trainable
        if name in of_norms:
            is_affine = name.endswith(("weight", "bias"))
            may_move = may_move and (policy == "train" if is_affine else policy != "frozen")
        assert (name in moved) == may_move, name
    counts = {
        int(layer.num_batches_tracked) for layer in batchnorms(model).values() if layer.training
    }
    assert counts <= {3}  # once a step, not once a microbatch


def test_batchnorm_in_training_mode_by_mistake_is_found():
    """What ``model.train()`` after an evaluation would do, were it not followed by set_modes."""
    model = classifier()
    chosen = stage(trainable="head")
    freeze_for(model, chosen)
    frozen = digest(frozen_tensors(model))
    model.train()
    assert digest(frozen_tensors(model)) != frozen  # those buffers are no longer held
    train_steps(model, steps=1, statistics=False)
    set_modes(model, chosen)
    assert digest(frozen_tensors(model)) != frozen  # and they have moved


@pytest.mark.parametrize(
    "name",
    ["trunk.layer2.0.bn1.running_mean", "trunk.bn1.num_batches_tracked", "trunk.conv1.0.weight"],
)
def test_one_moved_number_is_found(name):
    model = classifier()
    freeze_for(model, stage(trainable="head"))
    frozen = digest(frozen_tensors(model))
    value = model.state_dict()[name].reshape(-1)
    value[-1] = torch.nextafter(value[-1], torch.tensor(9.0)) if value.is_floating_point() else 1
    assert digest(frozen_tensors(model)) != frozen


def test_a_digest_is_of_names_types_shapes_and_numbers():
    values = torch.arange(6.0)
    digests = [
        digest({"a": values}),
        digest({"b": values}),
        digest({"a": values.double()}),
        digest({"a": values.view(2, 3)}),
        digest({"a": values.view(torch.int32)}),
        digest({"a": -values}),
        digest({"a": values, "b": values}),
        digest({}),
    ]
    assert len(set(digests)) == len(digests)
    assert digest({"a": values, "b": -values}) == digest({"b": -values, "a": values})
    strided = torch.stack([values, values], 1)[:, 0]
    assert digest({"a": strided}) == digests[0]  # however it lies in memory
    assert digest({"a": values.bfloat16(), "n": torch.tensor(3)})


def test_parameters_that_no_gradient_reached_are_named():
    model = classifier()
    freeze_for(model, stage(trainable=["layer4", "head"], batchnorm="train"))
    model.classify(model.features(pixels()).detach()).sum().backward()
    without = parameters_without_gradient(model.named_parameters())
    assert without
    assert all(name.startswith("trunk.layer4") for name in without)
    model(pixels()).sum().backward()
    assert parameters_without_gradient(model.named_parameters()) == []
