"""Memory that runs out elsewhere than in a step's passes: the run goes on, with the same figures."""

from pathlib import Path

import pytest
import torch
from short_memory import refuse_copies, refuse_passes
from tiny_runs import make_dataset, metric_rows, results, same, train, weights

from rtl_dist.core.device_memory import Attempt
from rtl_dist.data.loading import loader
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.divided import FrozenPart
from rtl_dist.model.head import Head
from rtl_dist.training import solving

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")
ALL = {"name": "all", "steps": 4, "trainable": "all", "lr": 1e-2, "batchnorm": "train"}
HEAD = {"name": "head", "steps": 4, "trainable": "head", "lr": 1e-2}
SMALL = {"global": 16, "micro": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def require_same_run(run: Path, plain: Path, *, halvings: list[dict]) -> None:
    assert results(run)["microbatch_halvings"] == halvings
    assert same(weights(run), weights(plain))
    # to rounding: which kernel multiplies is chosen by the number of images
    for row, expected in zip(metric_rows(run), metric_rows(plain), strict=True):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            is_number = isinstance(value, float)
            assert value == (pytest.approx(expected[key], rel=1e-5) if is_number else expected[key])


@pytest.mark.parametrize("stage", [ALL, {**HEAD, "views": None}], ids=["step", "standardizing"])
def test_in_the_copy_to_the_device(tmp_path, dataset, monkeypatch, capsys, stage):
    changes = {"stages": [stage], "features": {"cache_dir": str(tmp_path / "features")}}
    plain = train(tmp_path, dataset, "plain", **changes, batch=SMALL)
    refuse_copies(monkeypatch, over=2)
    # nothing that was computed before is found: validation images are brought to the device, too
    changes["features"] = {"cache_dir": str(tmp_path / "others")}
    run = train(tmp_path, dataset, **changes)
    require_same_run(run, plain, halvings=[{"from_step": 0, "micro": 2}])
    told = capsys.readouterr().err
    assert (
        "out of memory with microbatches of 4: from step 0 on the canonical microbatch is 2" in told
    )


def test_in_computing_the_views_of_a_stage(tmp_path, dataset, monkeypatch, capsys):
    changes = {"stages": [{**HEAD, "views": 1}]}
    features = [{"cache_dir": str(tmp_path / name)} for name in ("some", "others")]
    plain = train(tmp_path, dataset, "plain", **changes, batch=SMALL, features=features[0])
    sizes = refuse_passes(monkeypatch, FrozenPart, over=3)
    run = train(tmp_path, dataset, **changes, features=features[1])
    require_same_run(run, plain, halvings=[{"from_step": 0, "micro": 2}])
    assert max(sizes) == 3  # of validation images, whose blocks are no microbatches
    assert (
        "out of memory computing features: 3 images at a time from here on"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("stage", "kind"),
    [(ALL, FrozenPart), ({**HEAD, "views": 1}, Head)],
    ids=["images", "features"],
)
def test_in_an_evaluation(tmp_path, dataset, monkeypatch, capsys, stage, kind):
    plain = train(tmp_path, dataset, "plain", stages=[stage])
    sizes = refuse_passes(monkeypatch, kind, over=4)
    run = train(tmp_path, dataset, stages=[stage])
    require_same_run(run, plain, halvings=[])
    assert sizes
    assert (
        "out of memory evaluating val: 3 images at a time from here on" in capsys.readouterr().err
    )


def test_not_one_image_of_an_evaluation_ends_the_run(tmp_path, dataset, monkeypatch, capsys):
    refuse_passes(monkeypatch, FrozenPart, over=0)
    train(tmp_path, dataset, code=1, stages=[ALL])
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "rtl-dist: out of memory evaluating val, one image at a time; use a smaller"
    )


def test_in_measuring_statistics_for_the_average(tmp_path, dataset, monkeypatch):
    """They are measured with microbatches as training has them, so those are made smaller."""
    forward, tried = Classifier.forward, []

    def limited(self, images):
        is_average = not next(self.parameters()).requires_grad
        if is_average and not images.is_meta:
            tried.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("injected")
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", limited)
    run = train(tmp_path, dataset, stages=[ALL], optim={"ema": 0.9})
    assert results(run)["microbatch_halvings"] == [{"from_step": 4, "micro": 2}]
    assert (tried[0], set(tried[1:])) == (4, {2})
    assert [row["step"] for row in metric_rows(run) if "val/top1" in row] == [4]


def test_in_solving_a_head(tmp_path, dataset, monkeypatch, capsys):
    stages = [{"name": "head", "trainable": "head", "solve": True}]
    plain = train(tmp_path, dataset, "plain", stages=stages)
    problem, asked = solving.head_problem, []

    def refuse_once(*arguments, **options):
        asked.append(True)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("injected")
        return problem(*arguments, **options)

    monkeypatch.setattr(solving, "head_problem", refuse_once)
    require_same_run(train(tmp_path, dataset, stages=stages), plain, halvings=[])
    assert "the head is solved on the CPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["copy", "evaluation"])
def test_on_a_real_gpu(tmp_path, dataset, monkeypatch, capsys, where):
    plain = train(tmp_path, dataset, "plain", stages=[ALL])
    ran_out = []
    if where == "copy":
        to_device = loader.to_device

        def crowded(batch, device):
            if len(batch.inputs) <= 2:
                return to_device(batch, device)
            with Attempt() as attempt:
                torch.empty(2**50, dtype=torch.uint8, device=device)  # no GPU has as much
            ran_out.append(attempt.ran_out)
            return batch

        monkeypatch.setattr(loader, "to_device", crowded)
    else:
        ran_out = refuse_passes(monkeypatch, FrozenPart, over=4)
    run = train(tmp_path, dataset, stages=[ALL])
    assert ran_out
    assert all(ran_out)
    told = "evaluating val: 3 images at a time" in capsys.readouterr().err
    assert told is (where == "evaluation")
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-4, atol=1e-5)
