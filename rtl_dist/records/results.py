"""results.json: what a run says of itself at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtl_dist.core.files import read_object
from rtl_dist.records.state import TrainState


def read_results(run: Path) -> dict[str, Any]:
    """``results.json``, or {} where the run has none yet; ``status`` is done, stopped or failed."""
    return read_object(run / "results.json")


def results_of(state: TrainState, *, status: str, dataset_fingerprint: str) -> dict[str, Any]:
    """What ``results.json`` says of any run, however it ended."""
    return {
        "status": status,
        "best": None if state.best is None else vars(state.best),
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "skipped_steps": state.skipped_steps,
        "microbatch_halvings": [
            {"from_step": step, "micro": size} for step, size in state.halvings
        ],
        "bad_samples": {"count": state.bad_samples, "names": state.bad_names},
        "dataset_fingerprint": dataset_fingerprint,
        "elapsed_s": round(state.elapsed_s, 3),
    }
