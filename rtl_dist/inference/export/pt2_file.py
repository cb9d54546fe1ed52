"""A model as ``.pt2``: two programs of ``torch.export`` in one file, for images and for batches."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2, package_pt2

from rtl_dist.core.errors import UserError
from rtl_dist.core.text import brief
from rtl_dist.inference.export.metadata import IN_PT2
from rtl_dist.inference.export.programs import quiet

IMAGE, BATCH = "model", "batch"
"""The programs' names; ``torch.export.load`` gives the former."""


def save_pt2(
    path: Path, image: ExportedProgram, batch: ExportedProgram, metadata: dict[str, str]
) -> None:
    """Writes one file, without the places in source files of this machine that torch remembers."""
    for program in (image, batch):
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
    with quiet():
        package_pt2(
            path,
            exported_programs={IMAGE: image, BATCH: batch},
            extra_files={IN_PT2: json.dumps(metadata)},
        )


def read_pt2(path: Path) -> tuple[ExportedProgram, ExportedProgram]:
    """The programs of an image and of a batch, of a file that was vetted.

    Raises:
        UserError: it cannot be read, or has other programs.
    """
    heard = logging.getLogger("torch.export")
    level = heard.level
    try:
        heard.setLevel(logging.ERROR)
        with quiet():
            programs = load_pt2(str(path)).exported_programs
    except Exception as error:  # of all kinds
        raise UserError(f"{path} cannot be read as .pt2 ({brief(str(error))})") from error
    finally:
        heard.setLevel(level)
    if set(programs) != {IMAGE, BATCH}:
        raise UserError(f"{path} was not written by rtl-dist (it has the programs {set(programs)})")
    return programs[IMAGE], programs[BATCH]
