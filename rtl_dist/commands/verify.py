"""``rtl-dist verify``: a data set checked against its description, and its oddities told."""

from __future__ import annotations

import argparse
import sys

from rtl_dist.commands.common import add_cache, add_debug, add_out, add_workers, place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Checks a data set, packed or indexed, against its description and tells of exact"
        " duplicates within and across splits, images under two labels, unequal classes and odd"
        " sizes: a summary, and verify.json. Changes nothing in the data set. Exit code 0: sound,"
        " 3: damaged."
    )
    parser.add_argument("dataset", type=place, help="folder or URL of a packed or indexed data set")
    add_out(parser, "the report (default: DATASET/verify.json)", metavar="FILE")
    add_workers(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="duplicates across splits and label conflicts are errors, too",
    )
    add_cache(parser)
    add_debug(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.prepare.verifying.verify import verify_and_report

    return verify_and_report(
        arguments.dataset,
        out=arguments.out,
        workers=arguments.workers,
        strict=arguments.strict,
        show=sys.stdout.write,
        cache_dir=arguments.cache_dir,
        cache_gb=arguments.cache_gb,
        redirects=arguments.redirects,
    )
