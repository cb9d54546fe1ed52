"""Settles on a GPU what only a GPU can settle: one command, about ten minutes.

    python benchmarks/gpu_acceptance.py [--json docs/gpu.json] [--page docs/gpu.md]

Prints a table, a row for each thing that was looked at, with its goal and whether it was reached;
the same as JSON and as a page. Leaves with 1 if a goal was missed. Checks that the time (--minutes)
does not hold are said not to be run. Without a GPU, or with --small, each check is made as small as
shows that it runs: its figures mean nothing then.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_checks import chaos, environment_of, first_command, gpu_tests, kernels, quickstart
from gpu_findings import Finding, page, table, write_json
from gpu_place import Place
from gpu_ranks import equal_on_any_number, killed
from gpu_speed import from_shards, steps

# What settles the most comes first.
CHECKS: dict[str, Callable[[Place], Iterator[Finding]]] = {
    "kernels": kernels,
    "first-command": first_command,
    "quickstart": quickstart,
    "speed": steps,
    "tests": gpu_tests,
    "ranks": equal_on_any_number,
    "killed": killed,
    "shards": from_shards,
    "chaos": chaos,
}


def findings_of(names: list[str], place: Place) -> list[Finding]:
    """Of each check; one that fails in itself is a finding, too."""
    found: list[Finding] = []
    for name in names:
        if place.left_s() <= 0:
            found.append(Finding(check=name, what=name, found="not run: the time was over"))
            continue
        started_at = time.monotonic()
        try:
            found += CHECKS[name](place)
        except Exception as error:  # noqa: BLE001 - the other checks still count
            found.append(Finding(check=name, what=name, found=repr(error)[:300], ok=False))
        print(f"{name}: {time.monotonic() - started_at:.0f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checks", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--small", action="store_true", help="as little as shows that a check runs")
    parser.add_argument("--json", type=Path, help="written: everything that was found")
    parser.add_argument("--page", type=Path, help="written: the same as a page")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = environment_of(device)
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-") as folder:
        place = Place(
            device=device,
            folder=Path(folder),
            small=arguments.small or device == "cpu",
            ends_at=time.monotonic() + 60 * arguments.minutes,
        )
        found = findings_of(arguments.checks, place)
    print("; ".join(f"{key} {value}" for key, value in environment.items()))
    print(table(found))
    if arguments.json:
        write_json(arguments.json, environment, found)
    if arguments.page:
        rows = [vars(finding) for finding in found]
        arguments.page.write_text(
            page(json.loads(json.dumps({"environment": environment, "findings": rows}))),
            encoding="utf-8",
        )
    if any(finding.ok is False for finding in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
