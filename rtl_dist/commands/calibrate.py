"""``rtl-dist calibrate``: makes a model's probabilities mean something on data like yours."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import (
    add_cache,
    add_data,
    add_debug,
    add_precision,
    add_split,
    add_workers,
    place,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fits temperature, thresholds, when to abstain and conformal sets on a split that the model"
        " was not trained on, and writes them into the model's folder, where evaluate, predict and"
        " export find them. A run does so by itself at its end, on its validation split."
    )
    parser.add_argument(
        "model", type=place, help="a run folder (its best weights) or a model folder"
    )
    add_data(parser, "folder or URL of a data set", required=True)
    add_split(parser, "default: val")
    parser.add_argument(
        "--coverage",
        type=float,
        metavar="F",
        help="share of images whose conformal set is to hold the truth (default: 0.9)",
    )
    parser.add_argument(
        "--precision-target",
        type=float,
        metavar="F",
        help="share of right ones among what the model says (default: 0.95; multi-label: the best"
        " F1 of each label)",
    )
    add_workers(parser, "loader processes")
    add_precision(parser)
    add_cache(parser)
    add_debug(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.commands.running import first_imports

    with first_imports():
        from rtl_dist.config import CalibrateConfig, parse_section
        from rtl_dist.inference.recalibration import calibrate

    asked = {"coverage": arguments.coverage, "precision_target": arguments.precision_target}
    given = {key: value for key, value in asked.items() if value is not None}
    return calibrate(
        arguments.model,
        arguments.data,
        arguments.split or "val",
        wanted=parse_section(CalibrateConfig, given, origin="calibrate"),
        workers="auto" if arguments.workers is None else arguments.workers,
        precision=arguments.precision,
        cache_dir=arguments.cache_dir,
        cache_gb=arguments.cache_gb,
        redirects=arguments.redirects,
    )
