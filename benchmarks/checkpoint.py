"""How long training waits for a checkpoint: written beside it, against written in its way.

    python benchmarks/checkpoint.py [--rounds 10] [--folder DIR] [--model resnet50]

The state is that of a ResNet-50 under AdamW with an average of its weights (some 410 MB). Sides
alternate. ``waits``: the time until the next step may begin, beside / in the way. ``step``: steps
of a small network on one thread while a checkpoint is written beside, against the same without.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch

from rtl_dist.records.checkpoint import Snapshot, save_checkpoint
from rtl_dist.records.checkpoint_writer import CheckpointWriter
from rtl_dist.records.state import TrainState


def snapshot(step: int, model: str) -> Snapshot:
    weights = timm.create_model(model).state_dict()
    moments = {f"{kind}/{k}": v.clone() for kind in ("exp_avg", "exp_avg_sq")
               for k, v in weights.items() if v.is_floating_point()}  # fmt: skip
    return Snapshot(
        state=TrainState(step=step),
        model=weights,
        optimizer=moments,
        ema={k: v.clone() for k, v in weights.items()},
        stage_best={},
        scaler={},
        identity={},
    )


def steps_s(network: torch.nn.Module, count: int) -> float:
    """Seconds of a step, the median of ``count``."""
    images = torch.zeros(8, 3, 96, 96)
    times = []
    for _ in range(count):
        began_at = time.perf_counter()
        network(images).sum().backward()
        times.append(time.perf_counter() - began_at)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", default="resnet50")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = Path(tempfile.mkdtemp(dir=arguments.folder))
    state, writer = snapshot(1, arguments.model), CheckpointWriter()
    network = timm.create_model("resnet18")
    size = sum(
        v.nbytes for part in (state.model, state.optimizer, state.ema) for v in part.values()
    )
    print(f"{size / 1e6:.0f} MB, torch {torch.__version__}")
    waits, slower = [], []
    try:
        for number in range(arguments.rounds):
            state.state.step = 2 * number
            began_at = time.perf_counter()
            save_checkpoint(run, state, keep=2)
            in_the_way = time.perf_counter() - began_at
            alone = steps_s(network, count=5)
            state.state.step += 1
            began_at = time.perf_counter()
            writer.write(run, state, keep=2, before=lambda: None)
            beside = time.perf_counter() - began_at
            meanwhile = steps_s(network, count=5)
            writer.wait()
            waits.append(beside / in_the_way)
            slower.append(meanwhile / alone)
            print(
                f"in the way {in_the_way:.2f} s, beside {beside:.3f} s, ratio {waits[-1]:.3f};"
                f" step {slower[-1]:.2f}"
            )
    finally:
        shutil.rmtree(run)
    for name, ratios in (("waits", waits), ("step", slower)):
        print(f"{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
