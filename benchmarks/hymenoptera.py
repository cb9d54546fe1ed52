"""Our recipes beside the loop of PyTorch's transfer-learning tutorial, on the tutorial's own data.

Both start from the same ResNet-18 weights and run as processes of their own, in turn, seed by seed;
their times are of the whole process, start-up and (ours) packing included. "frozen" is the
tutorial's fixed feature extractor beside ``configs/hymenoptera_head.yaml``, "finetune" its
fine-tuning beside ``configs/hymenoptera.yaml``. Both report the best validation accuracy of any
evaluation.

    python benchmarks/hymenoptera.py --data hymenoptera_data --weights resnet18.pth --seeds 0 1 2

``--data`` holds ``train/<class>/`` and ``val/<class>/``. About 25 minutes on two quiet CPU cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"frozen": "hymenoptera_head.yaml", "finetune": "hymenoptera.yaml"}


def run(*command: str) -> tuple[float, str]:
    """Runs a process; returns its wall time in seconds and what it printed."""
    started_at = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return time.perf_counter() - started_at, done.stdout


def tutorial(data: Path, weights: Path, mode: str, seed: int) -> tuple[float, float]:
    """(best validation top-1, seconds) of the tutorial's loop."""
    seconds, out = run(
        str(ROOT / "benchmarks/tutorial_loop.py"),
        *("--data", str(data), "--weights", str(weights), "--mode", mode, "--seed", str(seed)),
    )
    return json.loads(out)["best_val_top1"], seconds


def ours(data: Path, weights: Path, mode: str, seed: int, folder: Path) -> tuple[float, float]:
    """(best validation top-1, seconds) of ``rtl-dist pack`` and the shipped config."""
    packed, run_folder = folder / f"data-{mode}-{seed}", folder / f"run-{mode}-{seed}"
    pack_s, _ = run("-m", "rtl_dist.cli", "pack", str(data), str(packed))
    train_s, _ = run(
        str(ROOT / "rtl_dist/train.py"),
        *("--config", str(ROOT / "configs" / CONFIGS[mode])),
        *(f"data.path={packed}", f"run.dir={run_folder}", f"model.weights={weights}"),
        *(f"seed={seed}", "track.wandb=off"),
    )
    results = json.loads((run_folder / "results.json").read_text())
    return results["best"]["value"], pack_s + train_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    results: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for mode in CONFIGS:
                pair = {
                    "tutorial": tutorial(arguments.data, arguments.weights, mode, seed),
                    "rtl_dist": ours(arguments.data, arguments.weights, mode, seed, Path(folder)),
                }
                for side, (top1, seconds) in pair.items():
                    results.setdefault((mode, side), []).append((top1, seconds))
                    print(
                        f"seed {seed} {mode:9} {side:9} {top1:.4f} in {seconds:6.1f} s", flush=True
                    )
    for mode in CONFIGS:
        sides = {side: results[mode, side] for side in ("tutorial", "rtl_dist")}
        tops = {side: statistics.mean(t for t, _ in runs) for side, runs in sides.items()}
        times = {side: statistics.mean(s for _, s in runs) for side, runs in sides.items()}
        print(
            f"{mode}: mean top-1 {tops['rtl_dist']:.4f} (ours) against {tops['tutorial']:.4f};"
            f" time {times['rtl_dist'] / times['tutorial']:.2f} of the tutorial's"
        )


if __name__ == "__main__":
    main()
