"""``rtl-dist predict --explain`` and ``--grid``: pictures that say what the rows say."""

import numpy as np
import pytest
import torch
from model_folders import model_folder
from PIL import Image
from torch import nn

from rtl_dist.cli import main
from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.inference.drawn import Explainer, grid_of, lines_of
from rtl_dist.inference.opening import open_predictor
from rtl_dist.inference.prediction import Prediction
from rtl_dist.model.calibration import Calibration

# torchvision 0.29 announces that its decoder will move to another package.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
CLASSES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine of them, one of which is none."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(9):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d} ä.png")
    (folder / "03 ä.png").write_text("no image")
    return folder


def predict(model, images, out, *words, code=0):
    words = [str(model), str(images), "--out", str(out), "--workers", "0", *map(str, words)]
    assert main(["predict", *words, "--allow-errors", "1"]) == code


def prediction(probabilities, *, task=SINGLE_LABEL, **options):
    values = None if probabilities is None else np.array(probabilities, dtype=np.float32)
    calibration = Calibration(**options.pop("calibration", {}))
    return Prediction(
        source="photos/2024/one.jpg",
        task=task,
        classes=CLASSES,
        calibration=calibration,
        probabilities=values,
        **options,
    )


def test_each_input_has_a_heatmap_and_the_first_ones_are_in_the_grid(
    model, images, tmp_path, capsys
):
    out, folder, picture = tmp_path / "out.csv", tmp_path / "maps", tmp_path / "new" / "grid.png"
    predict(model, images, out, "--explain", folder, "--grid", picture)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 8  # all but the one that cannot be read
    assert names[:4] == [f"{n:08d}-{n:02d}__.png" for n in (0, 1, 2, 4)]
    with Image.open(folder / names[0]) as page:
        assert page.width > 640  # a picture, and its heatmap beside it
        pixels = np.asarray(page.convert("RGB")).astype(int)
    left, right = pixels[12:332, 12:332], pixels[12:332, 336:656]
    assert (np.abs(left - right).max(2) > 20).mean() > 0.5
    with Image.open(picture) as grid:
        assert grid.width > 3 * 320
    said = capsys.readouterr().err
    assert "heatmaps of layer layer3, class activation maps: their mean and" in said

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    predict(model, images, out, "--explain", folder, "--grid", picture)  # the same again
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    plain = tmp_path / "plain.csv"
    predict(model, images, plain)
    assert plain.read_bytes() == out.read_bytes()


def test_what_stands_below_a_picture():
    name = "2024/one.jpg"
    assert lines_of(prediction([0.2, 0.7, 0.1])) == ["dog  70.0 %", "cat 20.0 %", name]
    unsure = prediction([0.2, 0.7, 0.1], calibration={"abstain_below": 0.8})
    assert lines_of(unsure)[0] == "dog?  70.0 %"
    several = prediction([0.6, 0.7, 0.1], task=MULTI_LABEL)
    assert lines_of(several) == ["dog 70 %, cat 60 %", "", name]
    none = prediction([0.2, 0.3, 0.1], task=MULTI_LABEL)
    assert lines_of(none) == ["no label", "dog 30.0 %, cat 20.0 %", name]
    unread = prediction(None, error="is not a JPEG")
    assert lines_of(unread) == ["no prediction", "is not a JPEG", name]


def test_a_grid_says_of_how_many_it_shows_the_first(model):
    images = torch.zeros((64, 3, 8, 8), dtype=torch.uint8)
    some = [prediction([0.2, 0.7, 0.1])] * 64
    all_of_them = grid_of(some, images, total=64, title="m")
    assert grid_of(some, images, total=64, title="m") == all_of_them
    assert grid_of(some, images, total=65, title="m") != all_of_them


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--grid", "{tmp}/grid.jpg"], "--grid: {tmp}/grid.jpg must end in .png"),
        (["--grid", "{tmp}/file/grid.png"], "--grid: cannot write {tmp}/file/grid.png: "),
        (["--explain", "{tmp}/file"], "--explain: cannot write into {tmp}/file: "),
        (["--explain", "{tmp}"], "--explain: {tmp} holds file, which is none of ours"),
    ],
)
def test_places_that_cannot_be_had_are_told(model, images, tmp_path, capsys, words, told):
    (tmp_path / "file").write_text("mine")
    out = images.parent / f"{tmp_path.name}.csv"
    predict(model, images, out, *(word.format(tmp=tmp_path) for word in words), code=2)
    assert told.format(tmp=tmp_path) in capsys.readouterr().err
    assert not out.exists()


def test_a_network_without_places_is_told_by_its_name(model, images, tmp_path, capsys, monkeypatch):
    def without_places(*arguments):
        loaded = load(*arguments)
        width = loaded.model.head.in_features
        loaded.model.trunk = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, width))
        return loaded

    from rtl_dist.inference import opening as room

    load = room.open_model
    monkeypatch.setattr(room, "open_model", without_places)
    predict(model, images, tmp_path / "o.csv", "--explain", tmp_path / "maps", code=2)
    assert "no heatmap can be made: no layer of this network" in capsys.readouterr().err


def test_what_was_exported_has_no_heatmaps(model, tmp_path):
    exported = open_predictor(model)
    exported.loaded.model.shows_layers = False
    with pytest.raises(UserError, match="was exported, and no heatmaps can be made of it; give"):
        Explainer(tmp_path / "maps", exported)
    assert not (tmp_path / "maps").exists()
