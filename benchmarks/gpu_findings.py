"""What an acceptance run on a GPU found, as it is printed, kept and shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAGE_HEAD = """# On a GPU

Written by `benchmarks/gpu_acceptance.py`; do not edit. One command, about ten minutes on one GPU:

```bash
python benchmarks/gpu_acceptance.py --json docs/gpu.json --page docs/gpu.md
```

Each row is something that only a GPU can settle. `ok` and `FAILED` are by the goal beside it; a row
without a goal is a figure to know.
"""
NOT_RUN = """
**Not yet run on a GPU.** No machine with one could be had so far: no CUDA, NCCL, fp16 or compiled
line of this project has been seen to run on one, and there are no figures here. What stands in for
it are tests that emulate a GPU on a CPU; those marked `gpu` wait for this run.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One row.

    check: which check it is from. what: was looked at. goal: "" where there is none. ok: whether it
    was reached; None: there is no goal, or it was not run.
    """

    check: str
    what: str
    found: str
    goal: str = ""
    ok: bool | None = None

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "FAILED", None: ""}[self.ok]

    @property
    def cells(self) -> tuple[str, ...]:
        """One line each, without what would end a cell of a table."""
        texts = (self.check, self.what, self.found, self.goal, self.verdict)
        return tuple(" ".join(text.split()).replace("|", "/") for text in texts)


HEADINGS = ("check", "what", "found", "goal", "")


def table(findings: Iterable[Finding]) -> str:
    """For a terminal: columns as wide as they need to be."""
    rows = [HEADINGS, *(finding.cells for finding in findings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def write_json(path: Path, environment: dict[str, Any], findings: list[Finding]) -> None:
    content = {"environment": environment, "findings": [dataclasses.asdict(f) for f in findings]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def page(content: dict[str, Any] | None) -> str:
    """The page in ``docs/``.

    Args:
        content: of the JSON; None: there is none. One of a run without a GPU says so itself.
    """
    if content is None:
        return PAGE_HEAD + NOT_RUN
    environment = content["environment"]
    lines = [PAGE_HEAD]
    if environment["device"] == "cpu":
        lines.append("**This run had no GPU**: its figures say that the checks run, and no more.\n")
    lines.append("; ".join(f"{key} {value}" for key, value in environment.items()) + ".\n")
    findings = [Finding(**row) for row in content["findings"]]
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(finding.cells for finding in findings)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
