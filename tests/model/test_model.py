"""The network: its parts and freezing, weights from anywhere, and the folder that timm loads."""

import contextlib
import json
import pickle
import random

import pytest
import timm
import torch
import torchvision
from pack_images import REAL_DATA
from safetensors.torch import load_file, save_file
from small_sets import Canary
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.config import DataConfig, ModelConfig, StageConfig, parse_config, to_yaml
from rtl_dist.core.errors import UserError
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import DatasetPlace
from rtl_dist.model.batchnorm import StepStatistics
from rtl_dist.model.build import build_model, make_classifier
from rtl_dist.model.folder import load_model, write_model_folder
from rtl_dist.model.freezing import (
    digest,
    freeze_for,
    frozen_tensors,
    parameters_without_gradient,
    set_modes,
    trainable_tensors,
)
from rtl_dist.model.parts import parts_of, trainable_parts
from rtl_dist.model.weights import load_weights, read_state_dict
from rtl_dist.records.checkpoint import Snapshot, save_checkpoint
from rtl_dist.records.state import TrainState

NAMES = ["test_resnet", "resnet18", "torchvision:resnet18", "basic_cnn"]
RESNET_PARTS = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
CLASSES = ("ants", "bees", "wasps")
WEIGHTS = REAL_DATA / "weights"
REAL_RESNET18 = WEIGHTS / "resnet18_imagenet-trunk_layer4-refit.pth"
needs_real_weights = pytest.mark.skipif(
    not REAL_RESNET18.exists(), reason=f"no real weights at {WEIGHTS}"
)


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


# --- building -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_network_has_one_shape(name, channels):
    model = classifier(name, channels=channels).eval()
    images = pixels(channels=channels)
    features, scores = model.features(images), model(images)
    assert features.shape == (4, model.head.in_features)
    assert scores.shape == (4, 3)
    assert torch.equal(model.classify(features), scores)
    normal = (images.float() / 255 - model.mean) / model.std
    torch.testing.assert_close(model.trunk(normal), features, rtol=1e-4, atol=1e-4)
    assert images.dtype == torch.uint8
    assert torch.equal(images, pixels(channels=channels))  # the caller's pixels are as they were
    assert list(parts_of(model)) == (
        ["layer1", "layer2", "layer3", "head"] if name == "basic_cnn" else RESNET_PARTS
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_names_the_weights(name):
    torch.rand(1)
    one = digest(classifier(name).state_dict())
    torch.rand(1)
    assert digest(classifier(name).state_dict()) == one
    assert digest(classifier(name, seed=1).state_dict()) != one


def test_the_head_does_not_depend_on_what_the_trunk_drew():
    heads = [classifier("torchvision:resnet18"), classifier("resnet18", channels=1)]
    assert torch.equal(heads[0].head.weight, heads[1].head.weight)


def test_grey_input_is_what_the_same_grey_in_colour_is():
    """The first kernel is summed over the colours, so a colour network sees grey as before."""
    colour = classifier("torchvision:resnet18").eval()
    grey = classifier("torchvision:resnet18", channels=1).eval()
    assert grey.trunk.conv1.weight.shape == (64, 1, 7, 7)
    plane = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey.trunk(plane), colour.trunk(plane.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", "timm has no model 'resnet5O'; did you mean resnet50?"),
        ("torchvision:resnet5O", "torchvision has no classifier 'resnet5O'; did you mean torchvis"),
        ("torchvision:", "torchvision has no classifier ''"),
        ("!", "timm has no model '!'"),
        ("torchvision:fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, message):
    with pytest.raises(UserError, match=f"model.name: {message}"):
        classifier(name)


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_weights_that_cannot_be_fetched_are_refused_in_one_line(name, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network\nand a second line")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    config = ModelConfig(name=name, weights="pretrained")
    with pytest.raises(
        UserError, match=rf"cannot fetch pretrained weights of {name} \(no netw"
    ) as e:
        build_model(config, DataConfig(path=""), classes=CLASSES, seed=0)
    assert "\n" not in str(e.value)


def test_basic_cnn_has_no_pretrained_weights():
    with pytest.raises(UserError, match="basic_cnn has no pretrained weights; set it to none"):
        build_model(ModelConfig(name="basic_cnn"), DataConfig(path=""), classes=CLASSES, seed=0)


# --- parts, freezing -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_network_that_does_not_fall_into_parts_is_refused(name):
    """Else what lies outside of them would be trained though frozen, or the other way round."""
    model = make_classifier(
        ModelConfig(name=name, weights="none"),
        DataConfig(path="", image_size=160),
        num_classes=3,
        seed=0,
    )
    with pytest.raises(UserError, match=r"model.name: .* outside of its parts \(trunk\.(cls|head)"):
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
    assert model.dropout.training
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


# --- weights from files --------------------------------------------------------------------------


def saved(path, state):
    """Saves a state dict as the suffix says."""
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


def load(model, path, *, head="auto", classes=CLASSES):
    return load_weights(model, str(path), head=head, classes=classes)


def wrap(state, how):
    if how == "module":
        return {f"module.{key}": value for key, value in state.items()}
    if how == "compiled, in ddp":
        return {f"module._orig_mod.{key}": value for key, value in state.items()}
    if how == "ddp, compiled":
        return {f"_orig_mod.module.{key}": value for key, value in state.items()}
    if how == "trainer":
        return {"epoch": 3, "best": 0.5, "state_dict": wrap(state, "module")}
    return {how: state} if how else state


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".safetensors"])
def test_weights_load_from_each_kind_of_file(tmp_path, suffix):
    source, model = moved_statistics(classifier(seed=1)), classifier()
    path = saved(tmp_path / f"w{suffix}", source.native_state_dict())
    head = model.head.weight.clone()
    assert load(model, path) == f"weights from {path}, a new head"
    assert digest(model.trunk.state_dict()) == digest(source.trunk.state_dict())
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize(
    "how",
    [
        *("", "state_dict", "model", "model_state_dict", "state_dict_ema"),
        *("module", "compiled, in ddp", "ddp, compiled", "trainer"),
    ],
)
def test_wrappers_and_their_prefixes_are_seen_through(tmp_path, how):
    source, model = moved_statistics(classifier(seed=1)), classifier()
    load(model, saved(tmp_path / "w.pth", wrap(source.native_state_dict(), how)))
    assert digest(model.trunk.state_dict()) == digest(source.trunk.state_dict())


def test_weights_without_batch_counts_load(tmp_path):
    """Files older than PyTorch 0.4.1 lack ``num_batches_tracked``."""
    source, model = moved_statistics(classifier(seed=1)), classifier()
    state = source.native_state_dict()
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    load(model, saved(tmp_path / "w.pth", old))
    assert digest(model.trunk.state_dict()) == digest(source.trunk.state_dict())


@pytest.mark.parametrize(("have", "want"), [(3, 1), (1, 3)])
def test_colour_and_grey_weights_fit_each_other(tmp_path, have, want):
    source = moved_statistics(classifier(channels=have, seed=1)).eval()
    model = classifier(channels=want).eval()
    load(model, saved(tmp_path / "w.pth", source.native_state_dict()))
    plane = torch.rand(2, 1, 32, 32)
    expected = source.trunk(plane.repeat(1, have, 1, 1))
    torch.testing.assert_close(model.trunk(plane.repeat(1, want, 1, 1)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("conv1.0.weight"), r"\(missing: conv1.0.weight\)"),
        (lambda state: state.update(extra=torch.ones(1)), r"\(not in the model: extra\)"),
        (
            lambda state: state.update({"bn1.weight": torch.ones(3)}),
            r"\(of another shape: bn1.weight \(3,\) instead of \(32,\)\)",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, change, message):
    state, model = classifier(seed=1).native_state_dict(), classifier()
    change(state)
    before = digest(model.state_dict())
    with pytest.raises(UserError, match=f"does not fit this model {message}; set model.name"):
        load(model, saved(tmp_path / "w.pth", state))
    assert digest(model.state_dict()) == before


def test_a_long_list_of_complaints_is_shortened(tmp_path):
    with pytest.raises(UserError, match=r"and [0-9]+ more") as caught:
        load(classifier(), saved(tmp_path / "w.pth", classifier("basic_cnn").native_state_dict()))
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no state dict of tensors"),
        ({"epoch": 3}, "holds no state dict of tensors"),
        ([torch.ones(2)], "holds no state dict of tensors"),
        (torch.ones(2), "holds no state dict of tensors"),
        (b"not a file of weights", "cannot be read as plain tensors"),
        (b"", "cannot be read as plain tensors"),
        (b"PK\x03\x04" + bytes(60), "cannot be read as plain tensors"),
    ],
    ids=["empty", "no tensors", "list", "tensor", "text", "no bytes", "broken zip"],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_no_file_of_weights_is_refused_in_one_line(tmp_path, content, message, suffix):
    path = tmp_path / f"w{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
        message = message if suffix == ".pth" else "cannot be read as plain tensors"
    with pytest.raises(UserError, match=f"model.weights: .*{message}") as caught:
        load(classifier(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("new_zip", [True, False])
def test_any_damage_to_a_file_is_the_users_to_mend(tmp_path, new_zip):
    """A damaged pickle raises anything: IndexError, struct.error, AssertionError, ..."""
    path, generator = tmp_path / "w.pth", random.Random(0)
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=new_zip)
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 2, 8])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            refused += 1
            read_state_dict(path)
            refused -= 1
    assert refused > 50


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".safetensors"])
@pytest.mark.parametrize("how", ["pickle", "torch.save", "inside"])
def test_a_malicious_file_is_not_executed(tmp_path, how, suffix):
    canary, path = tmp_path / "canary", tmp_path / f"w{suffix}"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Canary(canary), protocol=2))
    elif how == "torch.save":
        torch.save(Canary(canary), path)
    else:
        torch.save({"state_dict": classifier().native_state_dict(), "x": Canary(canary)}, path)
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        load(classifier(), path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()
    assert canary.exists()  # the canary sings


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"model.weights: .*/none.pth is missing; give a weights fi"
    ):
        load(classifier(), tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"holds no best/model.safetensors or model.safetensors"):
        load(classifier(), tmp_path)


# --- the head of loaded weights ------------------------------------------------------------------


def described(path, classes):
    (path.parent / "config.json").write_text(json.dumps({"label_names": list(classes)}))
    return path


@pytest.mark.parametrize(
    ("head", "beside", "kept"),
    [
        ("auto", CLASSES, True),
        ("auto", None, False),  # of unknown classes
        ("auto", ("x", "y", "z"), False),
        ("auto", CLASSES[::-1], False),  # the same in another order
        ("new", CLASSES, False),
        ("keep", None, True),
        ("keep", ("x", "y", "z"), True),
    ],
)
def test_the_head_is_kept_when_it_should_be(tmp_path, head, beside, kept):
    source, model = classifier(seed=1), classifier()
    path = tmp_path / "w.safetensors"
    saved(path, source.native_state_dict())
    if beside:
        described(path, beside)
    fresh = model.head.weight.clone()
    told = load(model, path, head=head)
    assert torch.equal(model.head.weight, source.head.weight if kept else fresh)
    assert torch.equal(model.head.bias, source.head.bias) == kept
    assert ("weights and head from" in told) == kept


@pytest.mark.parametrize("head", ["auto", "new"])
def test_a_head_of_another_size_gives_way(tmp_path, head):
    source, model = classifier(classes=7, seed=1), classifier()
    fresh = model.head.weight.clone()
    load(model, saved(tmp_path / "w.pth", source.native_state_dict()), head=head)
    assert torch.equal(model.head.weight, fresh)
    assert digest(model.trunk.state_dict()) == digest(source.trunk.state_dict())


def test_a_head_of_another_size_cannot_be_kept(tmp_path):
    path = saved(tmp_path / "w.pth", classifier(classes=7).native_state_dict())
    message = (
        "model.head: keep, but the head in .* is for 7 classes and the data has 3; use head: new"
    )
    with pytest.raises(UserError, match=message):
        load(classifier(), path, head="keep")


def test_somebody_elses_config_json_says_nothing(tmp_path):
    for content in ("{}", "[]", "not json", '{"label_names": 3}'):
        saved(tmp_path / "w.safetensors", classifier(seed=1).native_state_dict())
        (tmp_path / "config.json").write_text(content)
        assert "a new head" in load(classifier(), tmp_path / "w.safetensors")


# --- real weights --------------------------------------------------------------------------------


@needs_real_weights
@pytest.mark.parametrize("name", ["torchvision:resnet18", "resnet18"])
def test_real_weights_give_what_torchvision_computes(name):
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torch.load(REAL_RESNET18, weights_only=True))  # strictly
    theirs.eval()
    model = classifier(name, classes=1000)
    told = load(model, REAL_RESNET18, head="keep", classes=tuple(map(str, range(1000))))
    assert told == f"weights and head from {REAL_RESNET18}"
    images = pixels(2, side=64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.inference_mode():
        expected = theirs((images.float() / 255 - mean) / std)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-4, atol=1e-4)
        theirs.fc = nn.Identity()
        expected = theirs((images.float() / 255 - mean) / std)
        torch.testing.assert_close(model.features(images), expected, rtol=1e-4, atol=1e-4)


@needs_real_weights
@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet56-4bfd9763.th"])
@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18", "test_resnet"])
def test_a_foreign_network_is_refused_by_its_keys(file, name):
    with pytest.raises(UserError, match=r"does not fit this model \(.*layer") as caught:
        load(classifier(name), WEIGHTS / file)
    message = str(caught.value)
    assert "module." not in message  # the prefix that DataParallel left
    assert "set model.name to the architecture the weights were trained with" in message
    assert len(message) < 1000


# --- model folders -------------------------------------------------------------------------------


def dataset(classes=CLASSES, task="single_label"):
    return Dataset(
        place=DatasetPlace(where=""),
        task=task,
        classes=classes,
        fingerprint="f" * 64,
        description={},
    )


def config_of(name, *, channels=3, run="r"):
    return parse_config(
        {
            "run": {"dir": str(run)},
            "data": {"path": "d", "image_size": 32, "channels": channels, "crop_pct": 0.9},
            "model": {"name": name, "weights": "none", "dropout": 0.2},
            "stages": [{"name": "s", "epochs": 1, "lr": 0.1}],
        }
    )


def built(name, channels=3, seed=1):
    config = config_of(name, channels=channels)
    model, _ = build_model(config.model, config.data, classes=CLASSES, seed=seed)
    return moved_statistics(model).eval(), config


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18", "basic_cnn"])
def test_a_model_folder_comes_back_whole(tmp_path, name, channels):
    model, config = built(name, channels)
    write_model_folder(
        tmp_path / "best", model, config.model, dataset(), precision=config.precision
    )
    for given in (tmp_path, tmp_path / "best"):  # a run folder, or the model folder itself
        loaded = load_model(given)
        assert digest(loaded.model.state_dict()) == digest(model.state_dict())
        assert loaded.model.preprocessing == model.preprocessing
        assert loaded.model.dropout.p == 0.2
        assert (loaded.classes, loaded.task) == (CLASSES, "single_label")
        assert loaded.dataset_fingerprint == "f" * 64
        images = pixels(channels=channels)
        assert torch.equal(loaded.model.eval()(images), model(images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_timm_itself_loads_a_model_folder(tmp_path, name, channels):
    model, config = built(name, channels)
    write_model_folder(
        tmp_path / "best", model, config.model, dataset(), precision=config.precision
    )
    theirs = timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True).eval()
    images = pixels(channels=channels)
    settings = timm.data.resolve_model_data_config(theirs)
    mean = torch.tensor(settings["mean"]).view(1, -1, 1, 1)
    std = torch.tensor(settings["std"]).view(1, -1, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(theirs((images.float() / 255 - mean) / std), model(images))
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)
    assert theirs.num_classes == 3
    assert settings["input_size"] == (channels, 32, 32)
    assert (settings["crop_pct"], settings["interpolation"]) == (0.9, "bilinear")


def test_writing_again_replaces(tmp_path):
    for seed in (1, 2):
        model, config = built("test_resnet", seed=seed)
        write_model_folder(tmp_path, model, config.model, dataset(), precision=config.precision)
    assert digest(load_model(tmp_path).model.state_dict()) == digest(model.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_file_holds_native_names_only(tmp_path):
    model, config = built("torchvision:resnet18")
    write_model_folder(tmp_path, model, config.model, dataset(), precision=config.precision)
    theirs = torchvision.models.resnet18(num_classes=3)
    assert set(load_file(tmp_path / "model.safetensors")) == set(theirs.state_dict())


def test_preprocessing_travels_with_the_folder(tmp_path):
    """The folder's own mean and deviation count, not those a library knows for the name today."""
    model, config = built("test_resnet")
    write_model_folder(tmp_path, model, config.model, dataset(), precision=config.precision)
    description = json.loads((tmp_path / "config.json").read_text())
    description["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "config.json").write_text(json.dumps(description))
    loaded = load_model(tmp_path).model.eval()
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.preprocessing.std == (0.4, 0.5, 0.6)
    mean = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    with torch.inference_mode():
        expected = model.trunk((pixels().float() / 255 - mean) / std)
        torch.testing.assert_close(loaded.features(pixels()), expected)


def checkpoint_of(run, model, config, classes=CLASSES):
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    identity = {"classes": list(classes), "task": "single_label", "dataset_fingerprint": "f" * 64}
    snapshot = Snapshot(
        state=TrainState(step=5),
        model=model.state_dict(),
        optimizer={},
        stage_best={},
        ema={},
        scaler={},
        identity=identity,
    )
    return save_checkpoint(run, snapshot, keep=1)


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_a_checkpoint_folder_is_a_model_too(tmp_path, monkeypatch, name):
    model, config = built(name)
    folder = checkpoint_of(tmp_path / "run", model, config)
    loaded = load_model(folder)
    assert digest(loaded.model.state_dict()) == digest(model.state_dict())
    assert (loaded.classes, loaded.dataset_fingerprint) == (CLASSES, "f" * 64)
    monkeypatch.chdir(folder)
    assert load_model(".").classes == CLASSES


@pytest.mark.parametrize("classes", [CLASSES, ("x", "y", "z")])
@pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
def test_training_can_start_from_a_checkpoint_folder(tmp_path, name, classes):
    source, config = built(name)
    folder = checkpoint_of(tmp_path / "run", source, config)
    model = classifier(name)
    told = load(model, folder, classes=classes)
    assert digest(model.trunk.state_dict()) == digest(source.trunk.state_dict())
    assert torch.equal(model.head.weight, source.head.weight) == (classes == CLASSES)
    assert ("weights and head" in told) == (classes == CLASSES)


def test_training_starts_from_a_run_folder_with_its_head(tmp_path):
    source, config = built("test_resnet")
    write_model_folder(
        tmp_path / "best", source, config.model, dataset(), precision=config.precision
    )
    model = classifier()
    load(model, tmp_path)
    assert digest(model.state_dict()) == digest(source.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no model", "is not a model; give a run folder with best/, a checkpoint folder"),
        ("run without best", "has no best/ weights yet"),
        ("foreign config", "was not written by rtl-dist"),
        ("broken config", "was not written by rtl-dist"),
        ("other weights", "does not fit its config.json"),
        ("broken weights", "cannot be read as plain tensors"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, damage, message):
    if damage == "run without best":
        (tmp_path / "config.yaml").write_text("")
    elif damage != "no model":
        model, config = built("test_resnet")
        write_model_folder(tmp_path, model, config.model, dataset(), precision=config.precision)
    if damage == "foreign config":
        (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    elif damage == "broken config":
        (tmp_path / "config.json").write_text("{")
    elif damage == "other weights":
        save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    elif damage == "broken weights":
        (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
