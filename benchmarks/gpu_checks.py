"""Checks of a GPU by one process: what it is, its kernels, whole runs, the tests that need one."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_findings import Finding
from gpu_place import QUICKSTART, TRAIN, Ended, Place, few, in_run, run
from processes import ROOT

from rtl_dist.core.memory import available_memory

NOTEBOOK = "module://matplotlib_inline.backend_inline"  # what a Colab cell's processes inherit
QUICKSTART_TOP1 = 0.97  # of the validation images: below it, something is wrong with a precision


def environment_of(device: str) -> dict[str, Any]:
    """Versions and hardware, each as a plain value."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    found = {"commit": commit.stdout.strip() or "unknown", "device": device}
    if device == "cuda":
        one = torch.cuda.get_device_properties(0)
        found |= {
            "GPUs": f"{torch.cuda.device_count()} x {one.name}",
            "memory": f"{one.total_memory / 2**30:.0f} GiB",
            "capability": f"{one.major}.{one.minor}",
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    found |= {"torch": torch.__version__, "Python": platform.python_version()}
    return found | {"host memory": f"{available_memory() / 2**30:.0f} GiB"}


def kernels(place: Place) -> Iterator[Finding]:
    """Each precision multiplies, on kernels that were built for this GPU."""
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    images = torch.randn(8, 16, 32, 32, device=place.device).contiguous(
        memory_format=torch.channels_last
    )
    layer = torch.nn.Conv2d(16, 32, 3, padding=1).to(
        place.device, memory_format=torch.channels_last
    )
    expected = torch.nn.functional.conv2d(
        images.double().cpu(), layer.weight.double().cpu(), layer.bias.double().cpu(), padding=1
    )
    for name, dtype in dtypes.items():
        with torch.autocast(place.device, dtype, enabled=dtype != torch.float32):
            scores = layer(images)
            scores.float().square().mean().backward()
        off = (scores.double().cpu() - expected).abs().max().item() / expected.abs().max().item()
        yield Finding(
            check="kernels",
            what=f"a convolution and its gradient in {name}",
            found=f"off by {off:.1e} of the largest value",
            goal="below 0.02",
            ok=off < 0.02 and bool(layer.weight.grad.isfinite().all()),
        )
    if place.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        built = torch.cuda.get_arch_list()
        yield Finding(
            check="kernels",
            what=f"torch is built for sm_{major}{minor}",
            found=" ".join(built),
            goal="an sm of this generation",
            ok=any(arch.startswith(f"sm_{major}") for arch in built),
        )


def first_command(place: Place) -> Iterator[Finding]:
    """The README's first command, as a notebook's cell starts it."""
    command = ("-m", "accelerate.commands.launch", TRAIN, "--config", QUICKSTART)
    ended = run(*command, *few(place, *in_run(place, "first")), limit_s=120, MPLBACKEND=NOTEBOOK)
    folder = place.folder / "first"
    left = [name for name in ("results.json", "report.html") if (folder / name).is_file()]
    yield Finding(
        check="first command",
        what="accelerate launch, quickstart, under MPLBACKEND of a notebook",
        found=f"{ended.wall_s:.0f} s, {' and '.join(left) or 'no results'}; {ended.last_words}",
        goal="code 0, results.json and report.html",
        ok=ended.is_well and len(left) == 2,
    )


def gpu_tests(place: Place) -> Iterator[Finding]:
    """The tests that are marked ``gpu``."""
    command = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header")
    ended = run(*command, *(["tests/core"] if place.small else []), limit_s=180)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", ended.out)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", ended.out, re.MULTILINE)
    if place.device != "cuda":
        goal, ok = "", None
    else:
        goal, ok = "none fails", ended.is_well
    found = f"{ended.wall_s:.0f} s, {', '.join(counts) or ended.last_words} {' '.join(failed)}"
    yield Finding(check="tests", what="pytest -m gpu", found=found, goal=goal, ok=ok)


def quickstart(place: Place) -> Iterator[Finding]:
    """The quickstart in each precision, and the range test in fp16."""
    for precision in ("no", "bf16", *(["fp16"] if place.device == "cuda" else [])):
        name = f"quickstart-{precision}"
        ended = _train(place, name, f"precision={precision}")
        results = _results(place.folder / name)
        top1 = results.get("best", {}).get("value", 0.0)
        yield Finding(
            check="quickstart",
            what=f"precision {precision}",
            found=f"{ended.wall_s:.0f} s, val/top1 {top1:.3f}, {results.get('skipped_steps')}"
            f" steps skipped; {ended.last_words}",
            goal=f"code 0, val/top1 of {QUICKSTART_TOP1}",
            ok=ended.is_well and (place.small or top1 >= QUICKSTART_TOP1),
        )
    if place.device != "cuda":
        return
    command = ("-m", "rtl_dist", "find-lr", "--config", QUICKSTART)
    ended = run(*command, *in_run(place, "rates", "precision=fp16"), limit_s=90)
    yield Finding(
        check="quickstart",
        what="find-lr in fp16",
        found=f"{ended.wall_s:.0f} s; {ended.last_words}",
        goal="code 0: a skipped step does not end it",
        ok=ended.is_well,
    )


def chaos(place: Place) -> Iterator[Finding]:
    """Killed at random moments, with BatchNorm that learns and an average: the same bytes."""
    keys = ("stages.1.epochs=null", "stages.1.steps=20", "checkpoint.every=5 steps")
    learning = ("stages.1.batchnorm=train", "optim.ema=0.9")
    overrides = in_run(place, "chaos", *learning, *keys)
    command = ("-m", "rtl_dist", "chaos", "--config", QUICKSTART, "--kills", "2")
    ended = run(*command, *overrides, limit_s=400 if place.small else 150)
    yield Finding(
        check="chaos",
        what="two random SIGKILLs of a run with BatchNorm train and an average",
        found=f"{ended.wall_s:.0f} s; {ended.last_words}",
        goal="the same bytes",
        ok=ended.is_well,
    )


def _train(place: Place, name: str, *overrides: str) -> Ended:
    config = few(place, *in_run(place, name, *overrides))
    return run(TRAIN, "--config", QUICKSTART, *config, limit_s=90)


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}
