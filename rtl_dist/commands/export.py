"""``rtl-dist export``: a trained model as files that others run, checked before they are there."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import (
    add_data,
    add_debug,
    add_json,
    add_out,
    add_redirects,
    add_split,
    path,
    place,
)

_TORCHSCRIPT = (
    "torchscript is not offered: PyTorch deprecated it for torch.export, which --format pt2 is"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a trained model for other programs: what happens between a decoded image and its"
        " probabilities is inside. Before anything is written the export is compared with the model"
        " on at least 200 real images, or all there are."
    )
    parser.add_argument(
        "model", type=place, help="a run folder (its best weights), checkpoint or model folder"
    )
    parser.add_argument(
        "--format",
        required=True,
        type=_format,
        metavar="onnx|pt2|timm|hf",
        help="onnx: for onnxruntime and others; pt2: torch.export; timm, hf: folders that timm, and"
        " transformers, load",
    )
    add_out(
        parser,
        "a folder to be made; or X.onnx, X.pt2, beside which the other files come",
        required=True,
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="onnx: multiply in 8 bits, calibrated on training images of the data set",
    )
    parser.add_argument(
        "--int8-loss",
        type=float,
        default=0.01,
        metavar="X",
        help="write nothing if 8 bits lose more than this of the accuracy (default: 0.01)",
    )
    add_data(parser, "a data set to check on (default: that of the run)")
    add_split(parser, "of --data (default: test where there is one, else val)")
    parser.add_argument(
        "--images", type=path, metavar="FOLDER", help="images to check on, without labels"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=500,
        metavar="N",
        help="check on at most N images (default: 500)",
    )
    add_json(parser)
    add_redirects(parser)
    add_debug(parser)


def _format(name: str) -> str:
    if name.lower() == "torchscript":
        raise argparse.ArgumentTypeError(_TORCHSCRIPT)
    if name not in ("onnx", "pt2", "timm", "hf"):
        raise argparse.ArgumentTypeError(f"no format {name!r}; there are onnx, pt2, timm, hf")
    return name


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.commands.running import first_imports

    with first_imports():
        from rtl_dist.inference.export.checked_images import CheckedOn
        from rtl_dist.inference.export.export import Request, export

    return export(
        Request(
            model=arguments.model,
            out=arguments.out,
            format=arguments.format,
            checked_on=CheckedOn(
                data=arguments.data,
                split=arguments.split,
                images=arguments.images,
                most=arguments.limit,
                redirects=arguments.redirects,
            ),
            int8=arguments.int8,
            most_loss=arguments.int8_loss,
            as_json=arguments.json,
        )
    )
