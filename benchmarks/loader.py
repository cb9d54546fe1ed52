"""Input pipelines beside each other: the same photographs, crop, flip, batch and workers.

    python benchmarks/loader.py --images FOLDER [--repeats 5] [--batches 40] [--sides 'A;B;...']

`FOLDER` holds class folders of JPEGs, one level or more above them. Each side runs in a process of
its own, the sides alternating; a side that is not installed is left out, saying so. Printed: the
median over the repeats, and ratios within each repeat (median, lowest to highest).

images/CPU-s   images by the CPU time of the process and its workers, from the second batch on
main us        CPU time of the training process an image, its threads included
first s        from `iter(loader)` to the first batch: starting the workers, reading, decoding
memory MB      the most that the process and its workers took together (PSS, imports included)

Sides:
  ours                the packed data set, region decoding where the extension is built
  ours, whole         the same, decoding whole images with torchvision
  imagefolder         torchvision's ImageFolder and transforms on PIL images, float32
  webdataset          the pipeline of webdataset's documentation, PIL, float32
  webdataset, uint8   the same with our decoder and transform, uint8
  streaming           MosaicML Streaming's StreamingDataset on its own shards, PIL, float32
  dali                NVIDIA DALI on the CPU: webdataset reader, region decoding, uint8
  decoder             the limit: decode, crop and resize in memory, in as many processes
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIDE, BATCH = 224, 64
CROP_SCALE = (float(os.environ.get("CROP_SCALE", "0.08")), 1.0)  # torchvision's default
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NEEDS = {"streaming": "streaming", "dali": "nvidia.dali"}
TICKS = os.sysconf("SC_CLK_TCK")


# --- the sides: each makes a loader of endless or long batches ------------------------------------


def ours(data: Path, workers: int, *, first_step: int = 0, region: bool = True) -> Iterator[Any]:
    import torch

    import rtl_dist.data.images.region as room
    from rtl_dist.config import AugmentConfig
    from rtl_dist.data.format.dataset import open_dataset
    from rtl_dist.data.images.augment import TrainTransform
    from rtl_dist.data.loading.loader import make_loader
    from rtl_dist.data.loading.microbatches import TrainingMicrobatches, microbatch_positions
    from rtl_dist.data.order.epochs import EpochOrder

    if region and not room.available():
        raise SystemExit("the extension is not built; see README.md")
    if not region:
        room._native = None
        room.available.cache_clear()
    split = open_dataset(data / "packed").split("train")
    microbatches = TrainingMicrobatches(
        split,
        TrainTransform(AugmentConfig(crop_scale=CROP_SCALE), image_size=SIDE, channels=3),
        order=EpochOrder(shard_sizes=split.shards.sizes(), seed=0),
        size=BATCH,
        views=None,
    )
    positions = microbatch_positions(
        first_step,
        first_step + 10**6,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
    )
    loader = make_loader(microbatches, positions, workers=workers, device=torch.device("cpu"))
    return ((batch.inputs, batch.labels) for batch in loader)


def ours_whole(data: Path, workers: int) -> Iterator[Any]:
    return ours(data, workers, region=False)


def pil_transform() -> Callable[[Any], Any]:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, CROP_SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def imagefolder(data: Path, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    images = ImageFolder(str(data / "folder" / "train"), pil_transform())
    loader = DataLoader(
        images, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    return endlessly(loader)


def shard_pattern(data: Path) -> str:
    shards = sorted((data / "packed" / "train").glob("*.tar"))
    return str(data / "packed" / "train" / f"train-{{000000..{len(shards) - 1:06d}}}.tar")


def webdataset(data: Path, workers: int) -> Iterator[Any]:
    import webdataset as wds

    dataset = (
        wds.WebDataset(shard_pattern(data), resampled=True)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png", "cls")
        .map_tuple(pil_transform(), identity)
        .batched(BATCH)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


class OurView:
    def __init__(self) -> None:
        from rtl_dist.config import AugmentConfig
        from rtl_dist.data.images.augment import TrainTransform

        self._transform = TrainTransform(
            AugmentConfig(crop_scale=CROP_SCALE), image_size=SIDE, channels=3
        )
        self._drawn = itertools.count()

    def __call__(self, content: bytes) -> Any:
        return self._transform(content, next(self._drawn))


def webdataset_uint8(data: Path, workers: int) -> Iterator[Any]:
    import webdataset as wds

    import rtl_dist.data.images.region as room

    room._native = None  # decoding as webdataset's users could: torchvision, whole images
    room.available.cache_clear()
    dataset = (
        wds.WebDataset(shard_pattern(data), resampled=True)
        .shuffle(1000)
        .to_tuple("jpg;png", "cls")
        .map_tuple(OurView(), int)
        .batched(BATCH)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def streaming(data: Path, workers: int) -> Iterator[Any]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Images(StreamingDataset):
        transform = staticmethod(pil_transform())

        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return self.transform(sample["image"].convert("RGB")), sample["label"]

    images = Images(local=str(data / "mds"), shuffle=True, batch_size=BATCH)
    return endlessly(DataLoader(images, BATCH, num_workers=workers, drop_last=True))


def dali(data: Path, workers: int) -> Iterator[Any]:
    from nvidia.dali import fn, pipeline_def, types

    shards = sorted(str(path) for path in (data / "packed" / "train").glob("*.tar"))

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None)
    def pipeline() -> Any:
        content, label = fn.readers.webdataset(
            paths=shards, ext=["jpg", "cls"], random_shuffle=True, initial_fill=1000
        )
        image = fn.decoders.image_random_crop(
            content, random_area=CROP_SCALE, random_aspect_ratio=[0.75, 4 / 3]
        )
        image = fn.resize(image, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR)
        image = fn.flip(image, horizontal=fn.random.coin_flip())
        return fn.transpose(image, perm=[2, 0, 1]), label

    made = pipeline()
    made.build()

    def batches() -> Iterator[Any]:
        import torch

        while True:
            images, labels = made.run()
            yield torch.from_dlpack(images.as_tensor()), labels

    return batches()


def decoder(data: Path, workers: int) -> Iterator[Any]:
    """Every process crops, from memory, what it read before; nothing travels."""
    from rtl_dist.data.format.dataset import open_dataset
    from rtl_dist.data.format.reader import SampleReader

    split = open_dataset(data / "packed").split("train")
    reader = SampleReader(split)
    contents = [reader.read(i) for i in range(min(512, split.num_samples))]
    context = multiprocessing.get_context("fork")
    done: Any = context.Semaphore(0)

    def work() -> None:
        import torch

        torch.set_num_threads(1)
        view = OurView()
        for number, content in enumerate(itertools.cycle(contents), start=1):
            view(content)
            if number % BATCH == 0:
                done.release()

    started = [context.Process(target=work, daemon=True) for _ in range(workers)]
    for process in started:
        process.start()
    try:
        while True:
            done.acquire()
            yield [0] * BATCH, None
    finally:
        for process in started:
            process.kill()


SIDES: dict[str, Callable[[Path, int], Iterator[Any]]] = {
    "ours": ours,
    "ours, whole": ours_whole,
    "imagefolder": imagefolder,
    "webdataset": webdataset,
    "webdataset, uint8": webdataset_uint8,
    "streaming": streaming,
    "dali": dali,
    "decoder": decoder,
}


def identity(value: Any) -> Any:
    return value


def endlessly(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


# --- one measurement, in a process of its own -----------------------------------------------------


def measure(side: str, data: Path, workers: int, batches: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    first = []
    for _ in range(2):  # the first time, imports and the pages of files count too
        started = time.perf_counter()
        loader = SIDES[side](data, workers)
        next(loader)
        first.append(time.perf_counter() - started)
        if len(first) == 1:
            del loader
            gc.collect()
    next(loader)
    cpu, main, clock = tree_cpu_s(), time.process_time(), time.perf_counter()
    images = sum(len(next(loader)[0]) for _ in range(batches))
    clock = time.perf_counter() - clock
    return {
        "images_per_cpu_s": images / (tree_cpu_s() - cpu),
        "images_per_s": images / clock,
        "main_us": (time.process_time() - main) / images * 1e6,
        "first_s": first[-1],
    }


def measure_seek(data: Path, workers: int, repeats: int) -> list[float]:
    """Time to the first batch in mid epoch 7 by that of a fresh start, alternating."""
    from rtl_dist.data.format.dataset import open_dataset

    num_samples = open_dataset(data / "packed").split("train").num_samples
    far = int(7.4 * num_samples) // BATCH
    times: dict[int, list[float]] = {0: [], far: []}
    for _ in range(repeats + 1):
        for step in times:
            started = time.perf_counter()
            loader = ours(data, workers, first_step=step)
            next(loader)
            times[step].append(time.perf_counter() - started)
            loader.close()  # type: ignore[attr-defined]
    return [b / a for a, b in list(zip(times[0], times[far], strict=True))[1:]]


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family(int(child))
    return found


def tree_cpu_s() -> float:
    """CPU seconds of this process and its children so far."""
    total = 0
    for pid in family(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))  # and of children that ended
    return total / TICKS


# --- all of them --------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where to prepare (default: a temporary folder)")
    parser.add_argument("--resize", type=int, help="pack and copy at this short side")
    parser.add_argument("--crop-scale", default="0.08", help="least area of a crop")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", default="all", help="names separated by ';'")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["CROP_SCALE"] = arguments.crop_scale  # for the processes of the sides
    if arguments.one:
        result: Any
        if arguments.one == "seek":
            result = measure_seek(arguments.images, arguments.workers, arguments.repeats)
        else:
            result = measure(arguments.one, arguments.images, arguments.workers, arguments.batches)
        print(json.dumps(result), flush=True)
        os.killpg(0, signal.SIGKILL)  # with all that a library left running
    with tempfile.TemporaryDirectory() as temporary:
        compare(arguments, arguments.work or Path(temporary))


def compare(arguments: argparse.Namespace, work: Path) -> None:
    sides = list(SIDES) if arguments.sides == "all" else arguments.sides.split(";")
    for side in [side for side in sides if not is_installed(side)]:
        print(f"{side}: {NEEDS[side]} is not installed, left out")
        sides.remove(side)
    prepare(arguments.images, work, with_mds="streaming" in sides, resize=arguments.resize)
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats):
        for side in list(sides):
            try:
                results[side].append(run_side(side, work, arguments))
            except RuntimeError as error:
                print(f"{side}: left out: {error}")
                sides.remove(side)
        print(f"repeat {repeat + 1} of {arguments.repeats}", file=sys.stderr, flush=True)
    print_table({side: results[side] for side in sides})
    if "ours" in sides:
        ratios = run_one("seek", work, arguments)[0]
        print(
            f"first batch in mid epoch 7 / at the start: {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def is_installed(side: str) -> bool:
    needed = NEEDS.get(side)
    try:
        return needed is None or importlib.util.find_spec(needed) is not None
    except ModuleNotFoundError:
        return False


def prepare(images: Path, work: Path, *, with_mds: bool, resize: int | None) -> None:
    """The same files as a folder, as shards and as MDS; 2,000 or more, names repeating."""
    from PIL import Image

    from rtl_dist.prepare.packing.pack import pack

    train = work / "folder" / "train"
    if not train.exists():
        found = sorted(
            path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
        )
        copies = max(1, -(-2000 // len(found)))
        for path, copy in itertools.product(found, range(copies)):
            target = train / path.parent.name / f"{copy}_{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if resize is None:
                os.symlink(path.resolve(), target)
            else:
                with Image.open(path) as image:
                    rgb = image.convert("RGB")
                    scale = resize / min(rgb.size)
                    size = (round(rgb.width * scale), round(rgb.height * scale))
                    rgb.resize(size, Image.Resampling.BICUBIC).save(target, quality=92)
    if not (work / "packed" / "dataset.json").exists():
        print(pack(str(work / "folder"), work / "packed", shard_size=250, show_progress=False))
    if with_mds and not (work / "mds").exists():
        from streaming import MDSWriter

        with MDSWriter(out=str(work / "mds"), columns={"image": "jpeg", "label": "int"}) as writer:
            for label, folder in enumerate(sorted(train.iterdir())):
                for path in sorted(folder.iterdir()):
                    writer.write(
                        {"image": Image.open(io.BytesIO(path.read_bytes())), "label": label}
                    )


def run_side(side: str, work: Path, arguments: argparse.Namespace) -> dict[str, float]:
    result, memory_mb = run_one(side, work, arguments)
    return {**result, "memory_mb": memory_mb}


def run_one(side: str, work: Path, arguments: argparse.Namespace) -> tuple[Any, float]:
    command = [sys.executable, __file__, "--images", str(work), "--one", side]
    command += ["--workers", str(arguments.workers), "--batches", str(arguments.batches)]
    command += ["--repeats", str(arguments.repeats), "--crop-scale", arguments.crop_scale]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    most = [0.0]
    watcher = threading.Thread(target=watch_memory, args=(process, most), daemon=True)
    watcher.start()
    output, errors = process.communicate(timeout=600)
    watcher.join()
    if not output.strip():
        raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else "it failed")
    return json.loads(output.strip().splitlines()[-1]), most[0]


def watch_memory(process: subprocess.Popen[str], most: list[float]) -> None:
    while process.poll() is None:
        total = 0
        try:
            for pid in family(process.pid):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            pass  # a process ended meanwhile
        most[0] = max(most[0], total / 1024)
        time.sleep(0.5)


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    import platform

    import torch
    import torchvision
    import webdataset

    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, webdataset"
        f" {webdataset.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
    against = [
        side for side in ("webdataset", "webdataset, uint8", "imagefolder") if side in results
    ]
    head = (
        f"{'':20}{'images/CPU-s':>13}{'images/s':>10}{'main us':>9}{'first s':>9}{'memory MB':>11}"
    )
    print(head + "".join(f"{'x ' + side:>26}" for side in against))
    for side, runs in results.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        line = f"{side:20}{middle['images_per_cpu_s']:13.0f}{middle['images_per_s']:10.0f}"
        line += f"{middle['main_us']:9.1f}{middle['first_s']:9.2f}{middle['memory_mb']:11.0f}"
        for other in against:
            ratios = [
                run["images_per_cpu_s"] / base["images_per_cpu_s"]
                for run, base in zip(runs, results[other], strict=False)
            ]
            text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            line += f"{text:>26}"
        print(line)


if __name__ == "__main__":
    main()
