"""The sides that a fine-tuning step is measured on: ours, a bare loop, and the reference scripts'.

- ours: rtl_dist's StageTrainer.
- bare: the least that does the same: bfloat16 autocast, channels-last, fused AdamW, label smoothing
  0.1, gradients clipped to norm 1, BatchNorm frozen or train as ours, and where asked an average
  of the weights in ``torch._foreach`` operations; DistributedDataParallel around the network where
  a process group was made (of one process), as torchrun's users have it.
- reference: the defaults of torchvision's reference script and timm's train.py: float32, NCHW, SGD
  with momentum, BatchNorm in training mode, no clipping; not distributed.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rtl_dist.config import parse_config
from rtl_dist.data.loading.batch import Batch
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.training.begin import open_data, open_run
from rtl_dist.training.resolve import resolve
from rtl_dist.training.stage_trainer import StageTrainer

NUM_CLASSES = 10

Step = Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a step works on.

    network: torchvision's name of it.
    images: uint8 (batch, 3, S, S), contiguous, as a loader hands them over.
    batchnorm: as in the config of a stage; of sides ``ours`` and ``bare``.
    ema: decay of the average of the weights, 0: none; of the same sides.
    compiled: by torch.compile; of side ``ours``.
    """

    images: torch.Tensor
    labels: torch.Tensor
    device: torch.device
    network: str = "resnet18"
    batchnorm: Literal["frozen", "train"] = "frozen"
    ema: float = 0.0
    compiled: bool = False


Side = Callable[[Task], AbstractContextManager[Step]]


@contextmanager
def ours(task: Task) -> Iterator[Step]:
    """Within the block, a call that takes one of ``StageTrainer``'s steps on ``task``'s batch: all
    that happens between two boundaries, its totals, proofs, statistics and seeding included. The
    data set it is opened on serves only to open it."""
    with tempfile.TemporaryDirectory(prefix="step-") as folder, _opened(task, Path(folder)) as step:
        yield step


@contextmanager
def _opened(task: Task, folder: Path) -> Iterator[Step]:
    for number in range(NUM_CLASSES):
        (folder / "images" / str(number)).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "images" / str(number) / "0.png")
        Image.new("RGB", (32, 32), "red").save(folder / "images" / str(number) / "1.png")
    pack(str(folder / "images"), folder / "data", val_fraction=0.5, workers=1, show_progress=False)
    size = len(task.images)
    config = parse_config(
        {
            "run": {"dir": str(folder / "run")},
            "data": {
                "path": str(folder / "data"),
                "workers": 0,
                "image_size": task.images.shape[-1],
            },
            "model": {"name": f"torchvision:{task.network}", "weights": "none"},
            "stages": [{"name": "all", "steps": 10**9, "lr": 1e-4, "batchnorm": task.batchnorm}],
            "optim": {"schedule": "constant", "warmup": 0, "ema": task.ema},
            "batch": {"global": size, "micro": size},
            "compile": task.compiled,
            "track": {"wandb": "off"},
        }
    )
    run_folder = folder / "run"
    run_folder.mkdir()
    with Runtime(config.precision) as runtime:
        dataset = open_data(config, runtime)
        resolved = resolve(config, runtime, dataset)
        with open_run(resolved, runtime, run_folder, dataset) as (run, (stage, *_), _):
            trainer = StageTrainer(stage, run, num_steps=1)
            batch = Batch(task.images, task.labels, torch.zeros(size, dtype=torch.int64), [])
            trainer._batches.iterator = itertools.repeat(batch)

            def step() -> None:
                outcome = trainer.step()
                runtime.agree(bad_samples=0, failure=outcome.failure)
                trainer.accept(outcome)

            yield step
            trainer.close()


@contextmanager
def bare(task: Task) -> Iterator[Step]:
    """The bare loop with our settings."""
    model = torchvision.models.get_model(task.network, num_classes=NUM_CLASSES)
    model.to(task.device, memory_format=torch.channels_last).train()
    if task.batchnorm == "frozen":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    wrapped: nn.Module = model
    if dist.is_initialized():
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.05, fused=True)
    mean = torch.tensor([0.485, 0.456, 0.406], device=task.device).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=task.device).view(1, 3, 1, 1)
    followed = [value for value in model.state_dict().values() if value.is_floating_point()]
    average = copy.deepcopy(followed) if task.ema else []

    def step() -> None:
        pixels = task.images.float().div_(255).sub_(mean).div_(std)
        with torch.autocast(task.device.type, torch.bfloat16):
            logits = wrapped(pixels.contiguous(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, task.labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average:
            torch._foreach_lerp_(average, followed, 1 - task.ema)

    yield step


@contextmanager
def reference(task: Task) -> Iterator[Step]:
    """The loop of the reference scripts with their defaults."""
    model = torchvision.models.get_model(task.network, num_classes=NUM_CLASSES)
    model.to(task.device).train()
    images = task.images.float().div(255)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(images), task.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    yield step


SIDES: dict[str, Side] = {"ours": ours, "bare": bare, "reference": reference}
