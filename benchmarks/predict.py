"""Images a second of `predict`, `evaluate` and a bare loop, and what many inputs take of memory.

    python benchmarks/predict.py [--images 2000] [--side 224] [--repeats 3] [--model resnet18]
    python benchmarks/predict.py --inputs 2000,200000 [--side 16] [--model basic_cnn]

Rates: a data set of JPEGs (coarse noise, 256 a side) and a model of chance are made; then each side
goes through its `val`, from reading the model on, in this process and its workers. They alternate,
and ratios are within a repeat (median, lowest to highest), of the images by CPU second where the
machine has other work to do.

predict        rtl-dist predict MODEL DATA --split val --out F.csv
evaluate       what rtl-dist evaluate MODEL --data DATA --split val does until it draws
loop           DataLoader on the same files: torchvision decodes, resizes and crops, the same
               network without autograd in the same precision, softmax, and nothing written

Memory: `predict` of a list on stdin that names one small image so many times, of a tar of as many
members, each with the peak of the process (VmHWM), workers not counted.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from processes import ROOT
from spread import spread

PEAK = (
    "import sys; from rtl_dist.cli import main; code = main(sys.argv[1:]);"
    "lines = open('/proc/self/status').read().split('VmHWM:')[1].split();"
    "sys.stderr.write(f'\\npeak {lines[0]}\\n'); sys.exit(code)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--inputs", help="numbers of inputs: measure memory instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", options.model, options.side)
        if options.inputs:
            memory(Path(folder), model, [int(one) for one in options.inputs.split(",")])
        else:
            rates(Path(folder), model, options)


# --- rates -------------------------------------------------------------------------------------


def rates(folder: Path, model: Path, options: argparse.Namespace) -> None:
    data = make_data(folder / "data", options.images)
    sides: dict[str, Callable[[], None]] = {
        "predict": lambda: predicted(model, data, folder / "o.csv", options.workers),
        "evaluate": lambda: evaluated(model, data, options.workers),
        "loop": lambda: looped(model, data.parent / "images" / "val", options.workers),
    }
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    sides["predict"]()  # imports, and what is made once
    for repeat in range(options.repeats):
        for side in list(sides) if repeat % 2 == 0 else list(sides)[::-1]:
            before = time.monotonic(), cpu_s()
            sides[side]()
            after = time.monotonic(), cpu_s()
            wall, cpu = (options.images / (b - a) for a, b in zip(before, after, strict=True))
            found[side].append((wall, cpu))
    for side in sides:
        wall, cpu = (statistics.median(column) for column in zip(*found[side], strict=True))
        print(f"{side:9} {wall:8.1f} images/s, {cpu:8.1f} images/CPU-s")
    for other in ("evaluate", "loop"):
        for what, place in (("images/s", 0), ("images/CPU-s", 1)):
            pairs = zip(found["predict"], found[other], strict=True)
            ratios = [ours[place] / theirs[place] for ours, theirs in pairs]
            print(f"predict / {other}, {what}: {spread(ratios, 3)}")


def cpu_s() -> float:
    """Of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def predicted(model: Path, data: Path, out: Path, workers: int) -> None:
    from rtl_dist.inference.predict import Request, predict

    predict(Request(model=str(model), inputs=[str(data)], split="val", out=out, workers=workers))


def evaluated(model: Path, data: Path, workers: int) -> None:
    from rtl_dist.data.format.dataset import open_dataset
    from rtl_dist.distributed.runtime import Runtime
    from rtl_dist.model.folder import load_model
    from rtl_dist.report.model_evaluation import score_with

    loaded = load_model(model)
    with Runtime(loaded.precision) as runtime:
        score_with(
            loaded.model,
            open_dataset(data),
            "val",
            calibration=loaded.calibration,
            runtime=runtime,
            workers=workers,
        )


def looped(model: Path, files: Path, workers: int) -> None:
    """What anyone would write."""
    import torch
    from torchvision.transforms import v2

    from rtl_dist.model.folder import load_model

    network = load_model(model).model.eval().to(memory_format=torch.channels_last)
    view = network.preprocessing
    transform = v2.Compose(
        [v2.Resize(int(view.image_size / view.crop_pct)), v2.CenterCrop(view.image_size)]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    images = Files(sorted(files.rglob("*.jpeg")), transform)
    with torch.inference_mode():
        for batch in torch.utils.data.DataLoader(images, 64, num_workers=workers):
            network(batch.to(device)).softmax(1).cpu().numpy()


class Files:
    def __init__(self, files: list[Path], transform: Callable[[Any], Any]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Any:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg

        content = torch.frombuffer(bytearray(self.files[number].read_bytes()), dtype=torch.uint8)
        return self.transform(decode_jpeg(content, ImageReadMode.RGB))


# --- memory ------------------------------------------------------------------------------------


def memory(folder: Path, model: Path, counts: list[int]) -> None:
    image = picture(0, 16)
    (folder / "one.jpg").write_bytes(image)
    for count in counts:
        lines = f"{folder}/one.jpg\n".encode() * count
        report("stdin", count, model, "-", folder / "o.csv", lines)
        tar = folder / "many.tar"
        write_tar(tar, image, count)
        report("tar", count, model, str(tar), folder / "o.csv", b"")
        tar.unlink()


def report(what: str, count: int, model: Path, given: str, out: Path, lines: bytes) -> None:
    began_at = time.monotonic()
    words = ["predict", str(model), given, "--out", str(out), "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words],
        input=lines,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    told = done.stderr.decode()
    if done.returncode:
        sys.exit(told)
    peak = int(told.split("peak ")[-1]) / 1e3
    with out.open() as file:
        rows = sum(1 for _ in file) - 1
    seconds = time.monotonic() - began_at
    print(f"{what:6} {count:9,} inputs: peak {peak:7.1f} MB, {rows:,} rows, {seconds:.0f} s")


def write_tar(path: Path, image: bytes, count: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number:07d}.jpg")
            info.size = len(image)
            tar.addfile(info, io.BytesIO(image))


# --- what they are given -----------------------------------------------------------------------


def make_model(folder: Path, name: str, side: int) -> Path:
    from rtl_dist.config import DataConfig, ModelConfig
    from rtl_dist.core.tasks import SINGLE_LABEL
    from rtl_dist.data.format.dataset import Dataset
    from rtl_dist.data.format.split import DatasetPlace
    from rtl_dist.model.build import make_classifier
    from rtl_dist.model.folder import write_model_folder

    dataset = Dataset(
        place=DatasetPlace(where=""),
        task=SINGLE_LABEL,
        classes=("a", "b"),
        fingerprint="0" * 64,
        description={},
    )
    config = ModelConfig(name=name, weights="none")
    model = make_classifier(config, DataConfig(path="", image_size=side), num_classes=2, seed=0)
    write_model_folder(folder, model, config, dataset, precision="no")
    return folder


def make_data(folder: Path, count: int) -> Path:
    """A data set of which ``val`` has so many images, two classes."""
    from rtl_dist.prepare.packing.pack import pack

    for number in range(count):
        file = folder / "images" / "val" / "ab"[number % 2] / f"{number:06d}.jpeg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number, 256))
    for name in "ab":
        file = folder / "images" / "train" / name / "0.jpeg"
        file.parent.mkdir(parents=True)
        file.write_bytes(picture(0, 16))
    pack(str(folder / "images"), folder / "packed", show_progress=False)
    return folder / "packed"


def picture(seed: int, side: int) -> bytes:
    """A JPEG of coarse noise, which costs about what a photograph does."""
    noise = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3))
    image = Image.fromarray(noise.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    main()
