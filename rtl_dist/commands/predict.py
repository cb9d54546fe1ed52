"""``rtl-dist predict``: what a trained model says of images, each once and in order."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import (
    add_cache,
    add_debug,
    add_file_column,
    add_json,
    add_out,
    add_overwrite,
    add_precision,
    add_raw,
    add_split,
    add_workers,
    path,
    place,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Predicts images by a trained model, with the preprocessing that it was trained with. Each"
        " input is a row of OUT, in order; what cannot be read, with its reason. Without --out the"
        " rows are printed. Several processes (torchrun -m rtl_dist predict ...) write the same"
        " bytes; a predict that was stopped or killed goes on by the same command."
    )
    parser.add_argument(
        "model",
        type=place,
        help="a run folder (its best weights), checkpoint or model folder, or an exported file",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=place,
        metavar="INPUT",
        help="image files, folders (all below them), 'patterns*', .csv tables with a file column,"
        " .tar files, URLs, - for a list on stdin; with --split, data sets",
    )
    add_out(parser, "a .csv, .jsonl or .parquet file (this with pip install 'rtl_dist[parquet]')")
    add_split(parser, "INPUTs are data sets: predict this split of them")
    parser.add_argument(
        "--top", type=int, metavar="K", help="tell the K most probable classes (default: 1)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="several labels an image: give those of at least this probability (default: the"
        " model's own)",
    )
    parser.add_argument(
        "--tta", choices=("hflip",), help="average over each image and its mirror image"
    )
    add_raw(parser)
    parser.add_argument(
        "--explain",
        type=path,
        metavar="DIR",
        help="draw each input there, with a heatmap of where its most probable class comes from",
    )
    parser.add_argument(
        "--grid",
        type=path,
        metavar="PICTURE.png",
        help="draw the first 64 inputs with their labels and probabilities",
    )
    parser.add_argument(
        "--allow-errors",
        type=int,
        default=0,
        metavar="N",
        help="leave with 0 although up to N inputs cannot be read",
    )
    add_file_column(parser, "tables")
    add_json(parser, "print JSON: without --out the rows, else what was done")
    add_overwrite(parser, "replace OUT whatever it is, and what was begun by another command")
    add_workers(parser, "processes that read and decode")
    add_precision(parser)
    add_cache(parser)
    add_debug(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.commands.running import first_imports

    with first_imports():
        from rtl_dist.inference.predict import Request, predict

    return predict(
        Request(
            model=arguments.model,
            inputs=arguments.inputs,
            out=arguments.out,
            split=arguments.split,
            top=arguments.top,
            threshold=arguments.threshold,
            tta=arguments.tta,
            raw=arguments.raw,
            explain=arguments.explain,
            grid=arguments.grid,
            allow_errors=arguments.allow_errors,
            workers="auto" if arguments.workers is None else arguments.workers,
            precision=arguments.precision,
            file_column=arguments.file_column,
            overwrite=arguments.overwrite,
            as_json=arguments.json,
            cache_dir=arguments.cache_dir,
            cache_gb=arguments.cache_gb,
            redirects=arguments.redirects,
        )
    )
