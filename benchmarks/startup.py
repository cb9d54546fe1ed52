"""How long a start takes beside ``python -c "import torch, torchvision, timm, accelerate"``.

Ours is ``python rtl_dist/train.py`` up to the end of the first optimizer step, seen by the row it
writes, with W&B off and offline (the default without a login); and ``rtl-dist --help``. Each is a
process of its own, in turn with the imports alone; times are of the wall and of the CPU (that of
loader workers and W&B's service included), with a warm page cache. The data are the digits at 32
pixels, the network timm's ResNet-18 without weights, a step 32 images.

    python benchmarks/startup.py [--rounds 10]

About 5 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from spread import spread

from rtl_dist.prepare.packing.pack import pack

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = "import torch, torchvision, timm, accelerate"
MOST_START, MOST_HELP = 1.3, 0.1
CONFIG = """
run: {{dir: "", log_every: 1 steps}}
data: {{path: {folder}/digits, image_size: 32, crop_pct: 1.0}}
model: {{name: resnet18, weights: none}}
stages: [{{name: all, steps: 100, lr: 1e-3, batchnorm: train}}]
batch: {{global: 32}}
"""
Times = tuple[float, float]  # seconds of wall and of CPU


def to_the_end(*command: str) -> Times:
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return seconds, usage.ru_utime + usage.ru_stime


def to_the_first_step(folder: Path, wandb: str) -> Times:
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as run:
        command = [sys.executable, str(ROOT / "rtl_dist/train.py")]
        command += ["--config", str(folder / "config.yaml")]
        command += [f"run.dir={run}", f"track.wandb={wandb}"]
        said, rows = Path(run, "said"), Path(run, "metrics.jsonl")
        with said.open("w") as out:
            began = time.monotonic()
            job = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            while not (rows.exists() and rows.stat().st_size):
                if job.poll() is not None:
                    sys.exit(f"the job failed:\n{said.read_text()}")
                time.sleep(0.005)
            seconds = time.monotonic() - began
            processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
            # of each process, and of what it has waited for
            return seconds, sum(sum(process.cpu_times()[:4]) for process in processes)
        finally:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    program = str(Path(sys.executable).with_name("rtl-dist"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack("digits", folder / "digits", show_progress=False)
        (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
        sides: dict[str, tuple[Callable[[], Times], float | None]] = {
            "the four imports": (lambda: to_the_end(sys.executable, "-c", IMPORTS), None),
            "without Python's exit": (
                lambda: to_the_end(sys.executable, "-c", f"{IMPORTS}, os; os._exit(0)"),
                None,
            ),
            "first step, W&B off": (lambda: to_the_first_step(folder, "off"), MOST_START),
            "first step, W&B offline": (lambda: to_the_first_step(folder, "offline"), MOST_START),
            "rtl-dist --help": (lambda: to_the_end(program, "--help"), MOST_HELP),
        }
        for measure, _ in sides.values():
            measure()  # brings files into the page cache, and byte code to the disk
        found = [{side: measure() for side, (measure, _) in sides.items()} for _ in range(rounds)]
    base = next(iter(sides))
    print(f"{rounds} rounds: median (least to most); x: of the imports, to their end, in its round")
    for side, (_, most) in sides.items():
        line, kept = f"{side:23}", True
        for clock, what in enumerate(("wall", "CPU")):
            ratios = [row[side][clock] / row[base][clock] for row in found]
            line += f"  {what} {spread([row[side][clock] for row in found])} s, x {spread(ratios)}"
            kept &= most is None or statistics.median(ratios) <= most
        print(line if most is None else f"{line}  at most {most}: {'yes' if kept else 'NO'}")


if __name__ == "__main__":
    main()
