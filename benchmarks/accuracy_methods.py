"""The methods of accuracy.py, each run as processes of its own on a prepared set."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accuracy_sets import Prepared
from processes import BENCHMARKS, ROOT, run_python
from sides import evaluations_of

TINY_BACKBONE = ROOT / "rtl_dist/assets/tiny_resnet_cifar10"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation on the validation split.

    elapsed_s, cpu_s: since the method's first process began, until the evaluation was done.
    value: top-1, multi-label mAP.
    """

    elapsed_s: float
    cpu_s: float
    value: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What a method did in one cell.

    cpu_s, wall_s: of the whole, start-up and (ours) packing and the report included.
    num_images: how many went through the backbone, in training, for features and to evaluate.
    details: what else is worth keeping.
    """

    cpu_s: float
    wall_s: float
    num_images: int
    evaluations: list[Evaluation]
    details: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What a method is to do.

    weights: of the backbone of photographs, a torchvision ResNet-18.
    epochs: None: each method's own number; else that of all that have one, for trials.
    work: an empty folder.
    """

    prepared: Prepared
    weights: Path
    seed: int
    epochs: int | None
    work: Path

    @property
    def scores(self) -> Path:
        """Where the method writes what it says of every validation image."""
        return self.work / "scores.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One side.

    needs: the module that must be installed.
    only_photographs: whether it can do neither several labels nor the tiny backbone.
    """

    run: Callable[[Cell], Ran]
    needs: str = "torch"
    only_photographs: bool = False

    def fits(self, prepared: Prepared) -> bool:
        return not (self.only_photographs and (prepared.is_multi_label or prepared.is_tiny))


def run_ours(cell: Cell, *, head_only: bool) -> Ran:
    """``rtl-dist pack`` and one job of the shipped config; only what names data, weights, sizes and
    folders is overridden."""
    prepared, work = cell.prepared, cell.work
    data, run_folder = work / "data", work / "run"
    source = "digits" if prepared.is_tiny else str(prepared.folder)
    pack = run_python("-m", "rtl_dist.cli", "pack", source, str(data))
    overrides = [f"data.path={data}", f"run.dir={run_folder}", f"seed={cell.seed}"]
    overrides += [f"features.cache_dir={work / 'features'}", "track.wandb=off"]
    if not prepared.is_tiny:
        overrides += [f"data.image_size={prepared.image_size}"]
        overrides += ["model.name=torchvision:resnet18", f"model.weights={cell.weights}"]
    config = _our_config(cell, head_only=head_only)
    script = str(ROOT / "rtl_dist/train.py")
    train = run_python(script, "--config", str(config), *overrides, look=True, cwd=ROOT)
    run_python(str(BENCHMARKS / "score_ours.py"), str(run_folder), str(data), str(cell.scores))
    results = json.loads((run_folder / "results.json").read_text())
    found = evaluations_of(run_folder, train, results["best"]["metric"])
    return Ran(
        cpu_s=pack.cpu_s + train.cpu_s,
        wall_s=pack.wall_s + train.wall_s,
        num_images=_images_of_ours(train.err, run_folder, num_val=len(prepared.labels)),
        evaluations=[
            Evaluation(
                elapsed_s=pack.wall_s + at, cpu_s=pack.cpu_s + train.cpu_s_at(at), value=value
            )
            for at, value in found
        ],
        details={"pack_cpu_s": pack.cpu_s, "best": results["best"]},
    )


def _our_config(cell: Cell, *, head_only: bool) -> Path:
    shipped = ROOT / "configs" / ("quickstart.yaml" if cell.prepared.is_tiny else "transfer.yaml")
    tree = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    if head_only:
        del tree["stages"][1:]
    if cell.epochs is not None:
        for stage in tree["stages"]:
            if not stage.get("solve"):
                stage["epochs"] = cell.epochs
    config = cell.work / shipped.name
    config.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return config


def _images_of_ours(log: str, run_folder: Path, *, num_val: int) -> int:
    """As the job says it: features once an image and view, those that a head is solved on as well;
    each image of a step of a stage without features, and of its evaluations unless they have
    features.

    Raises:
        ValueError: the log tells of other stages than the metrics.
    """
    num_images = sum(map(_number, re.findall(r"features of ([\d,]+) images", log)))
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    begins = r"^(?=[\d:]+ stage \S+: (?:.* steps of [\d,]+ images|solving .* without steps$))"
    stages = re.split(begins, log, flags=re.MULTILINE)[1:]
    names = list(dict.fromkeys(row["stage"] for row in rows))
    if len(stages) != len(names):
        raise ValueError(f"{len(stages)} stages in the log, and in the metrics {names}")
    begun_at = 0
    for name, of_stage in zip(names, stages, strict=True):
        own = [row for row in rows if row["stage"] == name]
        steps, begun_at = own[-1]["step"] - begun_at, own[-1]["step"]
        first, rest = of_stage.split("\n", 1)
        if "on cached features" in first:
            continue
        if steps:
            num_images += steps * _number(first.split(" steps of ")[1].split()[0])
        if not re.search(r"features of [\d,]+ images of val", rest):
            num_images += num_val * sum("val/loss" in row for row in own)
    results = json.loads((run_folder / "results.json").read_text())
    return num_images + (results.get("test") or {}).get("num_samples", 0)


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def run_loop(cell: Cell, script: str, *options: str) -> Ran:
    """One of the loops of this folder, which print a JSON object."""
    prepared = cell.prepared
    weights = TINY_BACKBONE if prepared.is_tiny else cell.weights
    arguments = ["--data", str(prepared.folder), "--weights", str(weights)]
    arguments += ["--seed", str(cell.seed), "--scores", str(cell.scores)]
    arguments += ["--image-size", str(prepared.image_size), *options]
    if cell.epochs is not None and script != "logistic_regression.py":
        arguments += ["--epochs", str(cell.epochs)]
    done = run_python(str(BENCHMARKS / script), *arguments, look=True)
    told = json.loads(done.out)
    history = told.pop("history")
    start_up_s = done.wall_s - told["seconds"]  # its end, well under a second, counts as start-up
    an_epoch = prepared.num_train + len(prepared.labels)  # where all goes through all each epoch
    return Ran(
        cpu_s=done.cpu_s,
        wall_s=done.wall_s,
        num_images=told.get("images", len(history) * an_epoch),
        evaluations=[
            Evaluation(
                elapsed_s=start_up_s + row["elapsed_s"],
                cpu_s=done.cpu_s_at(start_up_s + row["elapsed_s"]),
                value=row["value"] if "value" in row else row["val_top1"],
            )
            for row in history
        ],
        details=told,
    )


def run_logistic_regression(cell: Cell) -> Ran:
    # in the precision of the config that it is measured against
    options = ("--float32",) if cell.prepared.is_tiny else ()
    return run_loop(cell, "logistic_regression.py", *options)


def run_practitioner(cell: Cell) -> Ran:
    """Digits are no photographs: no flips, gentler crops, and rates for a tiny network."""
    options: tuple[str, ...] = ()
    if cell.prepared.is_tiny:
        options = ("--no-flip", "--min-crop", "0.6", "--batchnorm", "train", "--float32")
        options += ("--lr", "3e-3", "--head-lr", "1e-2")
    return run_loop(cell, "practitioner_loop.py", *options)


METHODS = {
    "ours-head": Method(run=lambda cell: run_ours(cell, head_only=True)),
    "logreg": Method(run=run_logistic_regression),
    "ours": Method(run=lambda cell: run_ours(cell, head_only=False)),
    "practitioner": Method(run=run_practitioner),
    "tutorial": Method(
        run=lambda cell: run_loop(cell, "tutorial_loop.py", "--mode", "finetune"),
        only_photographs=True,
    ),
    "lightning": Method(
        run=lambda cell: run_loop(cell, "lightning_loop.py", "--mode", "finetune"),
        needs="lightning",
        only_photographs=True,
    ),
    "fastai": Method(
        run=lambda cell: run_loop(cell, "fastai_loop.py", "--mode", "finetune"),
        needs="fastai",
        only_photographs=True,
    ),
}
