r"""How good the models are: data sets x methods x seeds, each side a fair whole, ours as shipped.

    python benchmarks/accuracy.py --data ../shared/data --out runs/accuracy \
        [--sets monkey10 digits] [--methods ours logreg practitioner] [--seeds 0 1 2]
    python benchmarks/accuracy.py --out runs/accuracy --table

Each cell (set, method, seed) becomes `OUT/<set>.<method>.<seed>.json`, and beside it an `.npz` of
what the method said of every validation image, from which its figures come. A cell that is there is
not run again. Backbone, images and splits are the same for all methods of a row; the weights of
photographs are one torchvision ResNet-18 state dict, by default that of `DATA/weights`.

Every method runs as processes of its own, start-up and (ours) packing, evaluations and the report
included in what it costs. All but logistic regression report the best evaluation on the
validation split; how many each took its best of is in the cell (`evaluations`, with CPU and wall
seconds each).

Methods:
  ours-head     stage 0 of `configs/transfer.yaml` (digits: `quickstart.yaml`) alone
  logreg        `logistic_regression.py`: frozen features, scaling and C by cross-validation
  ours          the config whole
  practitioner  `practitioner_loop.py`: AdamW, cosine, BatchNorm held, bfloat16
  tutorial      `tutorial_loop.py`: the loop of PyTorch's transfer-learning tutorial, 15 epochs
  lightning     `lightning_loop.py`: `BackboneFinetuning`, from epoch 5 of 15 all
  fastai        `fastai_loop.py`: `fine_tune(15)`
The last three are for photographs of one label.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accuracy_figures import figures
from accuracy_methods import METHODS, Cell
from accuracy_sets import SETS, prepare
from accuracy_table import table
from processes import ProcessFailed

WEIGHTS = "weights/resnet18_imagenet-trunk_layer4-refit.pth"


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.table:
        print(table(read_cells(out)))
        return
    methods = installed(arguments.methods)
    failed = 0
    for seed in arguments.seeds:
        for name in arguments.sets:
            for method in methods:
                try:
                    run_cell(arguments, out, name, method, seed)
                except ProcessFailed as failure:
                    failed += 1
                    print(f"{name} {method} {seed}: {failure}", file=sys.stderr, flush=True)
    print(table(read_cells(out)))
    if failed:
        sys.exit(f"{failed} cells failed; run the same command again for them alone")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="all sets")
    parser.add_argument("--weights", type=Path, help=f"default: DATA/{WEIGHTS}")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="cells")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, help="of photographs, for trials")
    parser.add_argument("--epochs", type=int, help="of all methods and stages, for trials")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    return parser.parse_args()


def installed(wanted: list[str]) -> list[str]:
    """The methods that can run; the others are named on stdout."""
    found = []
    for name in wanted:
        if importlib.util.find_spec(METHODS[name].needs) is None:
            print(f"{name}: {METHODS[name].needs} is not installed, left out", flush=True)
        else:
            found.append(name)
    return found


def run_cell(arguments: argparse.Namespace, out: Path, name: str, method: str, seed: int) -> None:
    """Runs a cell, unless it is there or the method cannot do such a set.

    Raises:
        ProcessFailed: a process of the method did.
    """
    file = out / f"{name}.{method}.{seed}.json"
    options = {"image_size": arguments.image_size, "epochs": arguments.epochs}
    if file.exists():
        had = json.loads(file.read_text())["options"]
        if had != options:
            sys.exit(f"{file} was made with {had}, not {options}: take another --out")
        return
    data = arguments.data.resolve()
    prepared = prepare(name, data, seed, out / "sets", arguments.image_size)
    if not METHODS[method].fits(prepared):
        print(f"{name} {method}: only for photographs of one label, left out", flush=True)
        return
    for path in filter(Path.is_file, prepared.folder.rglob("*")):
        path.read_bytes()  # so that no side pays for files that are not in the page cache
    weights = (arguments.weights or data / WEIGHTS).resolve()
    with tempfile.TemporaryDirectory() as work:
        cell = Cell(
            prepared=prepared,
            weights=weights,
            seed=seed,
            epochs=arguments.epochs,
            work=Path(work),
        )
        ran = METHODS[method].run(cell)
        found = figures(prepared, cell.scores)
        shutil.copyfile(cell.scores, file.with_suffix(".npz"))
    told = {
        "set": name,
        "method": method,
        "seed": seed,
        "options": options,
        "torch": version("torch"),
        "num_train": prepared.num_train,
        "metric": prepared.metric,
        "figures": found,
        **dataclasses.asdict(ran),
    }
    new = file.with_suffix(".new")
    new.write_text(json.dumps(told, indent=1))
    os.replace(new, file)
    print(
        f"{name} {method} {seed}: {prepared.metric} {found['all']['value']:.4f},"
        f" {ran.cpu_s:.1f} CPU-s, {ran.num_images:,} images, {len(ran.evaluations)} evaluations",
        flush=True,
    )


def read_cells(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """All that are there, in the order of sets and methods."""
    cells = [json.loads(file.read_text()) for file in out.glob("*.json")]
    sets, methods = list(SETS), list(METHODS)
    cells.sort(key=lambda c: (sets.index(c["set"]), methods.index(c["method"]), c["seed"]))
    return {(cell["set"], cell["method"], cell["seed"]): cell for cell in cells}


if __name__ == "__main__":
    main()
