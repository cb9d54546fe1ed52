"""Speed of a whole fine-tuning step in one process, a synthetic batch held in memory.

    python benchmarks/finetune_step.py [--rounds 12] [--steps 2] [--batch 32] [--batchnorm frozen]

ResNet-18 at 224 px, forward, loss, backward, clipping where the side has it, and the optimizer's
step; no loader. Sides (``step_sides.py``) take turns, round by round, on the GPU if there is one,
else on all CPU cores. Printed: images/s (median over the rounds, lowest to highest), and ratios
within each round likewise.

About 90 seconds on two quiet CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import torch
import torch.distributed as dist
from spread import spread
from step_sides import NUM_CLASSES, SIDES, Step, Task

WARM_UP_STEPS = 3


def images_per_second(step: Step, task: Task, num_steps: int) -> float:
    """Speed over some steps, the device's work included."""
    started_at = time.perf_counter()
    for _ in range(num_steps):
        step()
    if task.device.type == "cuda":
        torch.cuda.synchronize()
    return num_steps * len(task.images) / (time.perf_counter() - started_at)


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
    speeds: dict[str, list[float]] = {side: [] for side in arguments.sides}
    with contextlib.ExitStack() as opened:
        steps = {side: opened.enter_context(SIDES[side](task)) for side in speeds}
        for step in steps.values():
            images_per_second(step, task, WARM_UP_STEPS)
        for _ in range(arguments.rounds):
            for side, step in steps.items():
                speeds[side].append(images_per_second(step, task, arguments.steps))
    if dist.is_initialized():  # ours leaves it, too
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
