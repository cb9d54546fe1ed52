"""A model as a folder that timm itself loads, and a checkpoint as one."""

import errno
import json

import pytest
import timm
import torch
import torchvision
from networks import CLASSES, classifier, moved_statistics, pixels
from safetensors.torch import load_file, save_file

from rtl_dist.config import parse_config, to_yaml
from rtl_dist.core.errors import UserError
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.data.format.split import DatasetPlace
from rtl_dist.model import folder
from rtl_dist.model.build import build_model
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.folder import load_model, write_calibration, write_model_folder
from rtl_dist.model.freezing import digest
from rtl_dist.model.weights import load_weights
from rtl_dist.records.checkpoint import Snapshot, save_checkpoint
from rtl_dist.records.state import TrainState


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
        assert loaded.model.head.dropout.p == 0.2
        assert (loaded.classes, loaded.task) == (CLASSES, "single_label")
        assert loaded.dataset_fingerprint == "f" * 64
        images = pixels(channels=channels)
        assert torch.equal(loaded.model.eval()(images), model(images))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet", "resnet18.tv_in1k", "torchvision:resnet18"])
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


CALIBRATION = Calibration(
    temperature=0.37,
    abstain_below=0.8,
    precision_target=0.95,
    set_quantile=0.1,
    coverage=0.9,
    num_samples=20,
    split="val",
    dataset_fingerprint="f" * 64,
)
OF_LABELS = Calibration(temperature=2.0, thresholds=(0.25, 0.5, 1.0), precision_target=0.9)


@pytest.mark.parametrize(
    ("task", "calibration"), [("single_label", CALIBRATION), ("multi_label", OF_LABELS)]
)
def test_a_calibration_comes_back_and_timm_still_loads_the_folder(tmp_path, task, calibration):
    model, config = built("test_resnet")
    data = dataset(task=task)
    write_model_folder(tmp_path, model, config.model, data, precision=config.precision)
    plain = (tmp_path / "config.json").read_bytes()
    assert load_model(tmp_path).calibration == Calibration()
    write_calibration(tmp_path, calibration)
    assert load_model(tmp_path).calibration == calibration
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    write_calibration(tmp_path, Calibration())
    assert (tmp_path / "config.json").read_bytes() == plain
    write_calibration(tmp_path, calibration)  # other weights make it void
    write_model_folder(tmp_path, model, config.model, data, precision=config.precision)
    assert (tmp_path / "config.json").read_bytes() == plain


def test_new_weights_void_the_calibration_before_they_come(tmp_path, monkeypatch):
    model, config = built("test_resnet")
    write_model_folder(tmp_path, model, config.model, dataset(), precision=config.precision)
    write_calibration(tmp_path, CALIBRATION)
    before = digest(load_model(tmp_path).model.state_dict())

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "save_tensors", no_space)
    other, config = built("test_resnet", seed=2)
    with pytest.raises(OSError, match="No space"):
        write_model_folder(tmp_path, other, config.model, dataset(), precision=config.precision)
    loaded = load_model(tmp_path)
    assert digest(loaded.model.state_dict()) == before
    assert loaded.calibration == Calibration()


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
    told = load_weights(model, str(folder), head="auto", classes=classes)
    assert digest(model.trunk.state_dict()) == digest(source.trunk.state_dict())
    assert torch.equal(model.head.weight, source.head.weight) == (classes == CLASSES)
    assert ("weights and head" in told) == (classes == CLASSES)


def test_training_starts_from_a_run_folder_with_its_head(tmp_path):
    source, config = built("test_resnet")
    write_model_folder(
        tmp_path / "best", source, config.model, dataset(), precision=config.precision
    )
    model = classifier()
    load_weights(model, str(tmp_path), head="auto", classes=CLASSES)
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


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("pretrained_cfg.mean", [0.5, 0.5], "mean is no number for each of 3 channels but [0.5, 0.5]"),
        ("pretrained_cfg.mean", ["a", 0, 0], "mean is no number for each of 3 channels"),
        ("pretrained_cfg.mean", [1e300, 0, 0], "mean is no number for each of 3 channels"),
        ("pretrained_cfg.std", [0, 1, 1], "std must be above 0"),
        ("pretrained_cfg.std", None, "std is no number for each of 3 channels but None"),
        ("pretrained_cfg.crop_pct", 5e-324, "crop_pct: must be 0 or lie in"),
        ("pretrained_cfg.input_size", [3, 100000, 100000], "image_size: must be at most 4,096"),
        ("pretrained_cfg.input_size", [3, 32], "input_size is no list of 3 of int but [3, 32]"),
        ("pretrained_cfg.input_size", [7, 32, 32], "channels: must be one of 1, 3; found 7"),
        ("pretrained_cfg", [], "pretrained_cfg is no section with keys but []"),
        ("label_names", [1, 2, 3], "label_names is no list of str but [1, 2, 3]"),
        ("label_names", [], "label_names must name each class once"),
        ("label_names", ["a", "a"], "label_names must name each class once"),
        ("label_names", [str(n) for n in range(300_000)], "fc.weight is (3, 96) instead of (300000, 96)"),
        ("rtl_dist.model.name", "vit_giant_patch14_clip_224", "cls_token is missing"),
        ("rtl_dist.model.name", "resnet19", "timm has no model 'resnet19'"),
        ("rtl_dist.model.dropout", 1e308, "dropout: must be 0 or lie in"),
        ("rtl_dist.model.deep", 1, "unknown key deep"),
        ("rtl_dist.precision", "bf8", "rtl_dist.precision is none of auto, no, fp16, bf16, fp64 but 'bf8'"),
        ("rtl_dist.task", ["x"], "rtl_dist.task is none of single_label, multi_label but ['x']"),
        ("rtl_dist.dataset_fingerprint", 7, "dataset_fingerprint is no text but 7"),
        ("rtl_dist.calibration", [], "rtl_dist.calibration is no section with keys but []"),
        ("rtl_dist.calibration", {"bias": 1}, "rtl_dist.calibration has the unknown key 'bias'"),
        ("rtl_dist.calibration", {"temperature": 0}, "temperature is no number in 0.001 to 1000 but 0"),
        ("rtl_dist.calibration", {"temperature": float("nan")}, "temperature is no number in 0.001 to 1000"),
        ("rtl_dist.calibration", {"temperature": True}, "temperature is no number in 0.001 to 1000 but True"),
        ("rtl_dist.calibration", {"coverage": "0.9"}, "coverage is no number in 0 to 1 but '0.9'"),
        ("rtl_dist.calibration", {"abstain_below": 9**4000}, "abstain_below is no number in 0 to 1 but a number of more"),
        ("rtl_dist.calibration", {"num_samples": 1.5}, "num_samples is no whole number but 1.5"),
        ("rtl_dist.calibration", {"split": 7}, "rtl_dist.calibration.split is no text but 7"),
        ("rtl_dist.calibration", {"thresholds": [0.5]}, "thresholds is no number for each class but [0.5]"),
        ("rtl_dist.calibration", {"thresholds": [0.5, None, 1]}, "thresholds is no number in 0 to 1 but None"),
        ("rtl_dist.calibration", {"thresholds": [0.5, 0.5, 1]}, "thresholds goes with no single_label model"),
        ("rtl_dist", "x", "rtl_dist is no section with keys but 'x'"),
    ],
)  # fmt: skip
def test_a_description_that_is_odd_is_refused_in_a_line_before_anything_is_built(
    tmp_path, path, value, said
):
    model, config = built("test_resnet")
    write_model_folder(tmp_path, model, config.model, dataset(), precision=config.precision)
    content = node = json.loads((tmp_path / "config.json").read_text())
    *parents, last = path.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["[" * 200_000, "", "[]", '{"rtl_dist": 9' + "9" * 5000 + "}"])
def test_a_description_that_is_none_is_refused(tmp_path, text):
    model, config = built("test_resnet")
    write_model_folder(tmp_path, model, config.model, dataset(), precision=config.precision)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json was not written by rtl-dist \("):
        load_model(tmp_path)
