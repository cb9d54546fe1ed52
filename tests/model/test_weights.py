"""Weights from anywhere: files of every kind, their heads, and what is no file of weights."""

import contextlib
import json
import pickle
import random

import pytest
import torch
import torchvision
from networks import CLASSES, classifier, moved_statistics, pixels
from pack_images import REAL_DATA
from safetensors.torch import save_file
from small_sets import Canary
from torch import nn

from rtl_dist.core.errors import UserError
from rtl_dist.model.freezing import digest
from rtl_dist.model.weights import load_weights, read_state_dict

WEIGHTS = REAL_DATA / "weights"
REAL_RESNET18 = WEIGHTS / "resnet18_imagenet-trunk_layer4-refit.pth"
needs_real_weights = pytest.mark.skipif(
    not REAL_RESNET18.exists(), reason=f"no real weights at {WEIGHTS}"
)


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
