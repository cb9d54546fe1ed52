"""Speed of a whole fine-tuning step in one process, a synthetic batch held in memory.

    python benchmarks/finetune_step.py [--rounds 12] [--steps 2] [--batch 32] [--batchnorm frozen]

ResNet-18 at 224 px, forward, loss, backward, clipping where the side has it, and the optimizer's
step; no loader. Sides take turns, round by round, on the GPU if there is one, else on all CPU
cores. Printed: images/s (median over the rounds, lowest to highest), and ratios within each round
likewise.

Sides:
  ours        rtl_dist's StageTrainer
  bare        the least that does the same: DistributedDataParallel around the network (a group of
              one process), bfloat16 autocast, channels-last, fused AdamW, label smoothing 0.1,
              gradients clipped to norm 1, BatchNorm as ``--batchnorm`` says (frozen, as ours is
              by default, or train)
  reference   the defaults of torchvision's reference script and timm's train.py: float32, NCHW, SGD
              with momentum, BatchNorm in training mode, no clipping; not distributed

About 90 seconds on two quiet CPU cores.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

from rtl_dist.config import parse_config
from rtl_dist.data.loading.batch import Batch
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.training.begin import open_data, open_run
from rtl_dist.training.resolve import resolve
from rtl_dist.training.stage_trainer import StageTrainer

NUM_CLASSES = 10
WARM_UP_STEPS = 3

Step = Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a step works on.

    images: uint8 (batch, 3, 224, 224), contiguous, as a loader hands them over.
    batchnorm: as in the config of a stage; of sides ``ours`` and ``bare``.
    """

    images: torch.Tensor
    labels: torch.Tensor
    device: torch.device
    batchnorm: Literal["frozen", "train"]


def ours(task: Task) -> Step:
    """A call that takes one of ``StageTrainer``'s steps on ``task``'s batch: all that happens
    between two boundaries, its totals, proofs, statistics and seeding included. The data set it is
    opened on serves only to open it."""
    folder = Path(tempfile.mkdtemp(prefix="finetune_step-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for number in range(NUM_CLASSES):
        (folder / "images" / str(number)).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "images" / str(number) / "0.png")
        Image.new("RGB", (32, 32), "red").save(folder / "images" / str(number) / "1.png")
    pack(str(folder / "images"), folder / "data", val_fraction=0.5, workers=1, show_progress=False)
    size = len(task.images)
    config = parse_config(
        {
            "run": {"dir": str(folder / "run")},
            "data": {"path": str(folder / "data"), "workers": 0},
            "model": {"name": "torchvision:resnet18", "weights": "none"},
            "stages": [{"name": "all", "steps": 10**9, "lr": 1e-4, "batchnorm": task.batchnorm}],
            "optim": {"schedule": "constant", "warmup": 0},
            "batch": {"global": size, "micro": size},
            "compile": False,
            "track": {"wandb": "off"},
        }
    )
    runtime = Runtime(config.precision)
    run_folder = folder / "run"
    run_folder.mkdir()
    dataset = open_data(config, runtime)
    opened = contextlib.ExitStack()
    atexit.register(opened.close)
    run, remaining, _ = opened.enter_context(
        open_run(resolve(config, runtime, dataset), runtime, run_folder, dataset)
    )
    stage, *_ = remaining
    trainer = StageTrainer(stage, run, lr=1e-4, num_steps=1)
    batch = Batch(task.images, task.labels, torch.zeros(size, dtype=torch.int64), [])
    trainer._batches.iterator = itertools.repeat(batch)

    def step() -> None:
        outcome = trainer.step()
        runtime.agree(bad_samples=0, failure=outcome.failure)
        trainer.accept(outcome)

    return step


def bare(task: Task) -> Step:
    """The bare loop with our settings."""
    model = resnet18(num_classes=NUM_CLASSES).to(task.device, memory_format=torch.channels_last)
    model.train()
    if task.batchnorm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.05, fused=True)
    mean = torch.tensor([0.485, 0.456, 0.406], device=task.device).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=task.device).view(1, 3, 1, 1)

    def step() -> None:
        pixels = task.images.float().div_(255).sub_(mean).div_(std)
        with torch.autocast(task.device.type, torch.bfloat16):
            logits = wrapped(pixels.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, task.labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def reference(task: Task) -> Step:
    """The loop of the reference scripts with their defaults."""
    model = resnet18(num_classes=NUM_CLASSES).to(task.device).train()
    images = task.images.float().div(255)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), task.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


SIDES: dict[str, Callable[[Task], Step]] = {"ours": ours, "bare": bare, "reference": reference}


def images_per_second(step: Step, task: Task, num_steps: int) -> float:
    """Speed over some steps, the device's work included."""
    started_at = time.perf_counter()
    for _ in range(num_steps):
        step()
    if task.device.type == "cuda":
        torch.cuda.synchronize()
    return num_steps * len(task.images) / (time.perf_counter() - started_at)


def spread(values: list[float], digits: int) -> str:
    """Median (lowest to highest)."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="a side and round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batchnorm", choices=("frozen", "train"), default="frozen")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    torch.manual_seed(0)
    task = Task(
        images=torch.randint(256, (arguments.batch, 3, 224, 224), dtype=torch.uint8, device=device),
        labels=torch.randint(NUM_CLASSES, (arguments.batch,), device=device),
        device=device,
        batchnorm=arguments.batchnorm,
    )
    steps: dict[str, Step] = {}
    for side in arguments.sides:
        steps[side] = SIDES[side](task)
    speeds: dict[str, list[float]] = {side: [] for side in steps}
    for step in steps.values():
        images_per_second(step, task, WARM_UP_STEPS)
    for _ in range(arguments.rounds):
        for side, step in steps.items():
            speeds[side].append(images_per_second(step, task, arguments.steps))
    dist.destroy_process_group()
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {name}, batch {arguments.batch}, BatchNorm"
        f" {arguments.batchnorm}, {arguments.rounds} rounds of {arguments.steps} steps"
    )
    for side, values in speeds.items():
        print(f"{side:10} {spread(values, 1)} images/s")
    measured = list(speeds)
    for i, side in enumerate(measured):
        for other in measured[i + 1 :]:
            ratios = [a / b for a, b in zip(speeds[side], speeds[other], strict=True)]
            print(f"{side} / {other}: {spread(ratios, 3)}")


if __name__ == "__main__":
    main()
