"""``rtl-dist pack``: labelled images to shuffled shards with an index."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import (
    add_allow_missing_classes,
    add_debug,
    add_file_column,
    add_overwrite,
    add_val_fraction,
    add_workers,
    path,
    place,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Packs labelled images into shuffled WebDataset shards with an index."
    parser.add_argument(
        "source",
        type=place,
        help="a folder of class folders (with or without train/ val/ test/), a CSV or a folder of"
        " train.csv, val.csv, ... ('file' and one label column, or 0/1 columns), 'digits', or"
        " torchvision:NAME",
    )
    parser.add_argument("out", type=path, help="folder of the data set to make")
    add_val_fraction(parser)
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="images a shard")
    parser.add_argument(
        "--resize",
        type=int,
        metavar="SHORT_SIDE",
        help="shrink larger images; else bytes are passed through unchanged",
    )
    add_workers(parser)
    parser.add_argument(
        "--labels",
        metavar="A,B,...",
        help="CSV: the label column(s); class folders: the classes, in this order",
    )
    add_file_column(parser, "CSV")
    parser.add_argument(
        "--convert",
        action="store_true",
        help="make PNGs of GIFs, BMPs and TIFFs, and JPEGs of HEIC and AVIF (these with"
        " pip install 'rtl_dist[heic]'), instead of leaving them out",
    )
    add_allow_missing_classes(parser)
    add_overwrite(parser, "replace a data set in OUT")
    add_debug(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.prepare.packing.pack import pack

    report = pack(
        arguments.source,
        arguments.out,
        val_fraction=arguments.val_fraction,
        shard_size=arguments.shard_size,
        resize=arguments.resize,
        workers=arguments.workers,
        labels=arguments.labels.split(",") if arguments.labels else None,
        file_column=arguments.file_column,
        convert=arguments.convert,
        allow_missing_classes=arguments.allow_missing_classes,
        overwrite=arguments.overwrite,
    )
    return str(report)
