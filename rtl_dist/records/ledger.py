"""The ledger: proof of which samples, and which pixels, each microbatch of each step held.

``ledger/samples.jsonl`` has one line a microbatch in the order of the stream, so runs of any number
of processes write the same file.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import torch

from rtl_dist.core.files import flush_to_disk, naming
from rtl_dist.data.loading.batch import Batch
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.records.state import TrainState

LOG = logging.getLogger("rtl_dist")


class Ledger:
    """Notes this rank's microbatches; ``write`` gathers a step's and appends them on rank 0."""

    def __init__(self, run: Path, runtime: Runtime, state: TrainState) -> None:
        self._runtime = runtime
        self._path = run / "ledger" / "samples.jsonl"
        self._noted: list[dict[str, Any]] = []
        runtime.from_main(lambda: self._open(state.ledger_bytes))

    def _open(self, num_bytes: int) -> None:
        """Lines after the checkpoint that is resumed from will be written again."""
        self._path.parent.mkdir(exist_ok=True)
        self._path.touch()
        if self._path.stat().st_size < num_bytes:
            LOG.warning("%s is shorter than the checkpoint says; lines were lost", self._path)
        os.truncate(self._path, min(self._path.stat().st_size, num_bytes))

    def flush(self) -> None:
        """Makes every line durable; from any thread of rank 0."""
        flush_to_disk(self._path)

    def note(self, step: int, microbatch: int, batch: Batch) -> None:
        is_pixels = batch.inputs.dtype == torch.uint8
        crc = zlib.crc32(batch.inputs.cpu().numpy().tobytes()) if is_pixels else None
        self._noted.append(
            {
                "step": step,
                "microbatch": microbatch,
                "samples": batch.samples.tolist(),
                "pixels_crc32": crc,
            }
        )

    def write(self) -> int:
        """Returns the ledger's length in bytes."""
        gathered = self._runtime.gather_to_main(self._noted)
        self._noted = []

        def append() -> int:
            assert gathered is not None
            lines = [json.dumps(line) for of_rank in gathered for line in of_rank]
            with naming(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
                return file.tell()

        length: int = self._runtime.from_main(append)
        return length
