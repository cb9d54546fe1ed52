"""How many operations a fine-tuning step asks of the device, ours beside a bare loop's.

    python benchmarks/step_operations.py [--network resnet50] [--batch 2] [--size 32]

Counted, not timed (``device_operations.py``), so it says the same on any machine, in seconds: for
each way in which a step can be taken, how many kernels our step and the bare loop's start, and
their ratio. With ``--most N`` also which operations ours has more of.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from device_operations import count_operations
from step_sides import NUM_CLASSES, Side, Task, bare, ours

WAYS: tuple[dict[str, Any], ...] = (
    {"batchnorm": "frozen"},
    {"batchnorm": "train"},
    {"batchnorm": "train", "ema": 0.999},
)
WARM_UP_STEPS = 2  # the first makes gradients, the optimizer's state and what is looked at once


def make_task(network: str, *, batch: int, size: int, **way: Any) -> Task:
    """A batch of noise on the device that there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Task(
        images=torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, device=device),
        labels=torch.randint(NUM_CLASSES, (batch,), device=device),
        device=device,
        network=network,
        **way,
    )


def counts_of(side: Side, task: Task) -> Counter[str]:
    """The operations of one of a side's steps, when what is done once is done."""
    with side(task) as step:
        for _ in range(WARM_UP_STEPS):
            step()
        return count_operations(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet50", help="of torchvision")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--most", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.network}")
    for way in WAYS:
        task = make_task(arguments.network, batch=arguments.batch, size=arguments.size, **way)
        counts = [counts_of(side, task) for side in (ours, bare)]
        mine, theirs = (count.total() for count in counts)
        name = ", ".join(f"{key} {value}" for key, value in way.items())
        print(f"{name:28} ours {mine:5} bare {theirs:5} ratio {mine / theirs:.3f}")
        for operation, more in (counts[0] - counts[1]).most_common(arguments.most):
            print(f"    {operation:32} {more:+}")


if __name__ == "__main__":
    main()
