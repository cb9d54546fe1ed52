"""The inputs of a request: a listing on disk, or the samples of data sets."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rtl_dist.core.errors import UserError
from rtl_dist.data.format.dataset import check_split, open_dataset
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.inference.finding import STDIN, Finder
from rtl_dist.inference.inputs import Inputs, SplitInputs
from rtl_dist.inference.listing import Listing, ListingWriter
from rtl_dist.inference.request import Request
from rtl_dist.inference.written import Written

LOG = logging.getLogger("rtl_dist")


def open_inputs(request: Request, folder: Path, runtime: Runtime) -> Inputs:
    """The inputs, found by rank 0 and known to all; called by all ranks.

    Args:
        folder: where their listing is kept, on a disk that all ranks see.

    Raises:
        UserError, DataError: see ``Finder.find``; or a rank does not see the folder.
    """
    if request.split is not None:
        return _samples(request, request.split, runtime)

    def find() -> list[str]:
        stdin: Iterable[bytes] = sys.stdin.buffer if STDIN in request.inputs else ()
        with ListingWriter(folder) as listing:
            finder = Finder(
                listing,
                folder,
                written=Written(
                    folder, out=request.out, grid=request.grid, explain=request.explain
                ),
                stdin=stdin,
                file_column=request.file_column,
                redirects=request.redirects,
            )
            return finder.find(request.inputs)

    with runtime.heartbeat.phase("looking for the inputs", open_ended=runtime.is_main):
        for note in runtime.from_main(find):
            if runtime.is_main:
                LOG.info("%s", note)

    def open_listing() -> Listing:
        try:
            return Listing(folder, request.redirects)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} is not there on every machine: processes on several need an --out on a"
                " disk that all of them see"
            ) from error

    return runtime.on_every_rank(open_listing)


def _samples(request: Request, split_name: str, runtime: Runtime) -> SplitInputs:
    if STDIN in request.inputs:
        raise UserError("with --split, INPUTs are data sets: - is none")
    splits = []
    for where in request.inputs:
        opening = partial(
            open_dataset,
            where,
            cache_dir=request.cache_dir,
            cache_gb=request.cache_gb,
            redirects=request.redirects,
        )
        dataset = runtime.on_every_rank(opening)
        split = runtime.on_every_rank(partial(dataset.split, split_name))
        runtime.from_main(partial(check_split, dataset, split))
        splits.append(split)
    return SplitInputs(splits)
