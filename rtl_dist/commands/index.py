"""``rtl-dist index``: a data set of WebDataset shards made by anyone, where they are."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import (
    add_allow_missing_classes,
    add_debug,
    add_overwrite,
    add_redirects,
    add_val_fraction,
    add_workers,
    path,
    place,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Makes a data set of WebDataset shards made by anyone; nothing is copied."
    parser.add_argument(
        "shards",
        nargs="+",
        type=place,
        metavar="SHARDS",
        help="tars, folders of them, patterns such as 'shards/train-{000..099}.tar', URLs; split by"
        " their names, or said: train=PATTERN val=PATTERN",
    )
    parser.add_argument("out", type=path, help="folder of the data set to make, or the shards' own")
    parser.add_argument(
        "--image", metavar="EXT", help="the image member, where samples have several: jpg, left.png"
    )
    parser.add_argument(
        "--label", metavar="EXT", help="the label member (default: cls, json, txt or label)"
    )
    parser.add_argument(
        "--field", metavar="NAME", help="the label in a .json member, as in label or meta.species"
    )
    parser.add_argument(
        "--classes",
        type=place,
        metavar="FILE|A,B,...",
        help="the order of the class names, or the names of the class numbers; a file has one a"
        " line",
    )
    add_val_fraction(parser)
    add_workers(parser)
    add_allow_missing_classes(parser)
    parser.add_argument(
        "--skip-decode", action="store_true", help="do not decode every image to see that it can be"
    )
    add_overwrite(parser, "replace the description and index in OUT")
    add_redirects(parser)
    add_debug(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.prepare.indexing.index import index

    report = index(
        arguments.shards,
        arguments.out,
        image=arguments.image,
        label=arguments.label,
        field=arguments.field,
        classes=arguments.classes,
        val_fraction=arguments.val_fraction,
        workers=arguments.workers,
        allow_missing_classes=arguments.allow_missing_classes,
        skip_decode=arguments.skip_decode,
        overwrite=arguments.overwrite,
        redirects=arguments.redirects,
    )
    return str(report)
