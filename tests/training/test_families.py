"""Networks of other families than ResNets: built, frozen and trained by their stages, or refused
with the reason before anything is trained."""

from pathlib import Path

import pytest
from tiny_runs import make_dataset, results, train, weights

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("name", "side", "top"),
    [
        ("test_vit", 32, "blocks.5+"),
        ("test_convnext", 32, "stages.3+"),
        ("test_efficientnet", 32, "blocks.4+"),
        ("torchvision:mobilenet_v3_small", 32, "classifier+"),
    ],
)
def test_a_family_is_trained_by_its_stages(tmp_path, dataset, name, side, top):
    stages = [
        {"name": "head", "steps": 1, "trainable": "head", "lr": 1e-3, "views": 1},
        {"name": "top", "steps": 1, "trainable": top, "lr": 1e-3, "batchnorm": "train"},
        {"name": "all", "steps": 1, "lr": 1e-3, "batchnorm": "train", "layer_decay": 0.5},
    ]
    changes = {"model": {"name": name, "weights": "none"}, "batch": {"global": 4, "micro": 4}}
    changes |= {
        "data__image_size": side,
        "data__val": "test",
        "checkpoint": {"every": "1 step", "keep": 9},
    }
    run = train(tmp_path, dataset, stages=stages, **changes)
    assert results(run)["status"] == "done"
    assert results(run)["frozen_ok"]
    assert weights(run)


@pytest.mark.parametrize(
    ("name", "side", "said"),
    [
        ("vit_tiny_patch16_224", 32, "model.name: vit_tiny_patch16_224 cannot take images of 32 x 32 (Input height (32) doesn't match model (224).); set data.image_size, and those of stages, to 224"),
        ("torchvision:inception_v3", 32, "cannot take images of 32 x 32"),
        ("torchvision:googlenet", 64, "gives more than one output in training"),
    ],
)  # fmt: skip
def test_a_network_that_does_not_go_with_the_images_is_refused(
    tmp_path, dataset, capfd, name, side, said
):
    stages = [{"name": "all", "steps": 1, "lr": 1e-3}]
    changes = {"model": {"name": name, "weights": "none"}, "data__image_size": side}
    run = train(tmp_path, dataset, code=2, stages=stages, **changes)
    assert said in capfd.readouterr().err
    assert not run.exists()
