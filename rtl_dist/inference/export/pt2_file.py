"""A model as ``.pt2``: two programs of ``torch.export`` in one file, for images and for batches."""

from __future__ import annotations

from pathlib import Path

from torch.export import ExportedProgram
from torch.export.pt2_archive._package import package_pt2

from rtl_dist.inference.export.programs import quiet

IMAGE, BATCH = "model", "batch"
"""The programs' names; ``torch.export.load`` gives the former, ``load_pt2`` both."""
EXTRA = "rtl_dist.json"


def save_pt2(
    path: Path, image: ExportedProgram, batch: ExportedProgram, metadata: dict[str, str]
) -> None:
    import json

    with quiet():
        package_pt2(
            path,
            exported_programs={IMAGE: image, BATCH: batch},
            extra_files={EXTRA: json.dumps(metadata)},
        )
