"""What two runs of the same config must agree on to the byte, as sha256 sums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rtl_dist.core.files import read_object, sha256_of
from rtl_dist.records.results import read_results

_NOT_A_RESULT = ("checkpoints", "heartbeats", "wandb")  # what a run needs on its way
_MISSING = "missing"


def run_hashes(run: Path) -> dict[str, str]:
    """sha256 sums of a finished run by what they are of; what the run does not have is left out."""
    newest = newest_checkpoint(run)
    files = [] if newest is None else sorted(newest.glob("*.safetensors"))
    files += [run / "best" / "model.safetensors", run / "ledger" / "samples.jsonl"]
    hashes = {str(path.relative_to(run)): sha256_of(path) for path in files if path.exists()}
    if newest is not None:
        hashes["resolved config"] = _hash(read_object(newest / "state.json").get("identity"))
    hashes["metrics.jsonl without times"] = _hash([_without_times(row) for row in rows_of(run)])
    results = read_results(run)
    hashes["results.json's best and test"] = _hash([results.get("best"), results.get("test")])
    hashes["names of files"] = _hash(_names(run))
    return hashes


def differing(hashes: dict[str, dict[str, str]]) -> list[str]:
    """What is not the same in all runs; ``hashes`` by run, as ``run_hashes`` has them."""
    return [row for row in _rows(hashes) if len(_values(hashes, row)) > 1]


def table(hashes: dict[str, dict[str, str]]) -> str:
    """A line for each hash that is equal, and one a run for each that is not."""
    lines = []
    for row in _rows(hashes):
        values = _values(hashes, row)
        if len(values) == 1:
            lines.append(f"equal      {values[0]}  {row}")
        else:
            lines += [
                f"DIFFERENT  {of.get(row, _MISSING):<64}  {row} ({run})"
                for run, of in hashes.items()
            ]
    return "\n".join(lines)


def newest_checkpoint(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step-*"), default=None)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The whole rows of ``metrics.jsonl``."""
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "elapsed_s" and not k.startswith("speed/")}


def _names(run: Path) -> list[str]:
    names = [path.relative_to(run) for path in run.rglob("*")]
    return sorted(
        str(name)
        for name in names
        if name.parts[0] not in _NOT_A_RESULT
        and not any(part.startswith(".") for part in name.parts)
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rows(hashes: dict[str, dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row for of in hashes.values() for row in of))


def _values(hashes: dict[str, dict[str, str]], row: str) -> list[str]:
    return list(dict.fromkeys(of.get(row, _MISSING) for of in hashes.values()))
