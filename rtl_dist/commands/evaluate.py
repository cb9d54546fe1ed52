"""``rtl-dist evaluate``: exact figures of a trained model on a split, with pictures."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import (
    add_cache,
    add_data,
    add_debug,
    add_out,
    add_precision,
    add_raw,
    add_split,
    add_workers,
    place,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Evaluates a trained model on a split of a data set: metrics.json, tables, pictures and"
        " report.html in OUT. Several processes (torchrun -m rtl_dist evaluate ...) give the same"
        " figures."
    )
    parser.add_argument(
        "model",
        type=place,
        help="a run folder (its best weights), checkpoint or model folder, or an exported file",
    )
    add_data(parser, "folder or URL of a data set", required=True)
    add_split(parser, "default: test where there is one, else val")
    add_out(parser, "default: MODEL/evaluation/SPLIT")
    add_workers(parser, "loader processes")
    add_precision(parser)
    add_raw(parser)
    add_cache(parser)
    add_debug(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.commands.running import first_imports

    with first_imports():
        from rtl_dist.report.model_evaluation import evaluate

    return evaluate(
        arguments.model,
        arguments.data,
        arguments.split,
        out=arguments.out,
        workers="auto" if arguments.workers is None else arguments.workers,
        precision=arguments.precision,
        cache_dir=arguments.cache_dir,
        cache_gb=arguments.cache_gb,
        redirects=arguments.redirects,
        raw=arguments.raw,
    )
