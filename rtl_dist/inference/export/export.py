"""``rtl-dist export``, as a story: made, read again from the disk, checked on real images, and only
then given its name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import write_json, write_text
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.inference.export.card import card_of
from rtl_dist.inference.export.checked_images import CheckedOn
from rtl_dist.inference.export.checking import FOLDER, GRAPH, Checking, size_of
from rtl_dist.inference.export.destination import EXAMPLE, Destination
from rtl_dist.inference.export.exported import exported_file
from rtl_dist.inference.export.folder_runner import TimmRunner, TransformersRunner
from rtl_dist.inference.export.folders import require_timm_knows, write_folder
from rtl_dist.inference.export.graphs import BatchGraph, ImageGraph
from rtl_dist.inference.export.metadata import fingerprint_of, metadata_of
from rtl_dist.inference.export.onnx_file import OnnxGraphs, joined, make_onnx, save_onnx
from rtl_dist.inference.export.onnx_runner import OnnxRunner, read_onnx
from rtl_dist.inference.export.origin import origin_of
from rtl_dist.inference.export.parity import Original
from rtl_dist.inference.export.programs import batch_program, image_program
from rtl_dist.inference.export.pt2_file import read_pt2, save_pt2
from rtl_dist.inference.export.pt2_runner import Pt2Runner
from rtl_dist.inference.export.real_images import LEAST, images_of_split
from rtl_dist.inference.export.table import Row, as_json, table_of
from rtl_dist.model.folder import WEIGHTS, load_model

Format = Literal["onnx", "pt2", "timm", "hf"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be exported, and how it is checked."""

    model: str
    """A run folder (its best weights), a checkpoint folder or a model folder."""
    out: Path
    """A folder to be made, or a file of the format's ending."""
    format: Format
    """Of the export."""
    checked_on: CheckedOn
    """Which images it must agree with the model on."""
    int8: bool = False
    """Whether the network multiplies in 8 bits; of ONNX."""
    most_loss: float = 0.01
    """Of int8: how much of the task's headline metric may be lost."""
    as_json: bool = False
    """Whether the result is told as JSON."""


def export(request: Request) -> str:
    """Writes an export that says what the model says.

    Returns:
        the table of formats and a line; with ``as_json`` the same as an object.

    Raises:
        UserError: no such model, an option that does not fit, or a network that cannot be exported.
        DataError: the images cannot be read.
        NotTheSame: the export says something else; nothing is written.
    """
    _require_sense(request)
    if exported_file(request.model) is not None:
        raise UserError(f"{request.model} is exported already: give the run that it was made of")
    destination = Destination(request.out, request.format)
    loaded = load_model(request.model)
    if request.format in ("timm", "hf"):
        require_timm_knows(loaded, request.format)
    dataset = request.checked_on.open_dataset(request.model, loaded)
    checking = Checking(Original(loaded, BatchGraph(loaded)), request.checked_on.find(dataset))
    with destination.filling():
        rows = _filled(request, destination, checking, dataset)
        rows = [checking.of_model((loaded.source / WEIGHTS).stat().st_size), *rows]
        told = _told(request, checking, rows)
        if request.format == "hf":
            _write_card(request, destination, checking, told["fingerprint"])
        write_json(destination.folder / "export.json", told)
    if request.as_json:
        return json.dumps(told | {"out": str(request.out)}, ensure_ascii=False)
    return _said(request, checking, rows)


def _require_sense(request: Request) -> None:
    if request.int8 and request.format != "onnx":
        raise UserError(f"--int8 goes with --format onnx, not with {request.format}")
    if request.int8 and request.checked_on.images is not None:
        raise UserError(
            "--int8 is calibrated on training images, and its loss of accuracy is measured: give"
            " --data DATASET instead of --images"
        )
    if request.checked_on.most < LEAST:
        raise UserError(f"--limit: an export is checked on at least {LEAST} images, or all")


def _filled(
    request: Request, destination: Destination, checking: Checking, dataset: Dataset | None
) -> list[Row]:
    """Writes the export and checks what was written; a row for each form of it."""
    loaded, graph = checking.original.loaded, checking.original.graph
    if request.format == "onnx":
        return _filled_with_onnx(request, destination, checking, dataset)
    if request.format == "pt2":
        channels = loaded.model.preprocessing.channels
        image, batch = image_program(ImageGraph(graph), channels), batch_program(graph)
        save_pt2(destination.image_file, image, batch, metadata_of(loaded, "float32"))
        runner = Pt2Runner(*read_pt2(destination.image_file))
        size = size_of(destination.image_file)
        return [checking.right(runner, GRAPH, name="pt2", size=size)]
    folder = destination.folder
    transform = checking.original.transform
    write_folder(folder, loaded, for_transformers=request.format == "hf")
    of_folder = (
        TransformersRunner(folder, loaded.task, transform, loaded.classes)
        if request.format == "hf"
        else TimmRunner(folder, loaded.task, transform)
    )
    return [checking.right(of_folder, FOLDER, name=request.format, size=size_of(folder))]


def _filled_with_onnx(
    request: Request, destination: Destination, checking: Checking, dataset: Dataset | None
) -> list[Row]:
    loaded = checking.original.loaded
    graphs = make_onnx(ImageGraph(checking.original.graph))
    runner = _written_onnx(destination, graphs, metadata_of(loaded, "float32"))
    size = size_of(destination.image_file)
    rows = [checking.right(runner, GRAPH, name="onnx", size=size)]
    if request.int8:
        from rtl_dist.inference.export.int8 import quantized

        assert dataset is not None
        small = quantized(graphs.batch, _training_views(dataset, checking.original))
        graphs = OnnxGraphs(view=graphs.view, batch=small)
        runner = _written_onnx(destination, graphs, metadata_of(loaded, "int8"))
        size = size_of(destination.image_file)
        rows.append(checking.near(runner, request.most_loss, name="onnx int8", size=size))
    text = Path(__file__).with_name(EXAMPLE).read_text(encoding="utf-8")
    (destination.folder / EXAMPLE).write_text(text, encoding="utf-8")
    return rows


def _written_onnx(
    destination: Destination, graphs: OnnxGraphs, metadata: dict[str, str]
) -> OnnxRunner:
    """Both files, as they lie on the disk."""
    save_onnx(joined(graphs), destination.image_file, metadata)
    save_onnx(graphs.batch, destination.batch_file, metadata)
    return OnnxRunner(read_onnx(destination.image_file), read_onnx(destination.batch_file))


def _training_views(dataset: Dataset, original: Original) -> torch.Tensor:
    """uint8 (N, C, S, S)."""
    from rtl_dist.inference.export.int8 import CALIBRATED_ON

    if "train" not in dataset.split_names:
        raise UserError(f"--int8 is calibrated on training images, {dataset.where} has no train")
    images = images_of_split(dataset.split("train"), dataset.where, CALIBRATED_ON)
    return torch.stack([original.transform(content, 0) for content in images.files])


def _write_card(
    request: Request, destination: Destination, checking: Checking, fingerprint: str
) -> None:
    card = card_of(
        checking.original.loaded,
        origin_of(request.model),
        checking.scored(),
        source=checking.images.source,
        fingerprint=fingerprint,
    )
    write_text(destination.folder / "README.md", card)


def _told(request: Request, checking: Checking, rows: list[Row]) -> dict[str, Any]:
    parity, loaded = checking.parity, checking.original.loaded
    assert parity is not None
    return {
        "format": request.format,
        "fingerprint": fingerprint_of(loaded),
        "dataset_fingerprint": loaded.dataset_fingerprint,
        "checked_on": {
            "source": checking.images.source,
            "images": parity.num_images,
            "odd_sizes_grey_and_turned": parity.num_more,
            "other_top1_within_tolerance": parity.num_ties,
            "max_difference_in_batches": parity.max_difference_views,
            "tolerance": vars(parity.tolerance),
        },
        "metric": checking.metric_name,
        "formats": as_json(rows),
    }


def _said(request: Request, checking: Checking, rows: list[Row]) -> str:
    parity = checking.parity
    assert parity is not None
    lines = [table_of(rows, checking.metric_name)]
    before, after = rows[0].metric, rows[-1].metric
    images = f"{parity.num_images:,} images of {checking.images.source}"
    if request.int8 and before is not None and after is not None:
        lines.append(
            f"{request.out}: in 8 bits, which lose {before - after:.4f} of {checking.metric_name}"
            f" on {images}; in float32 it said what the model says (within"
            f" {parity.tolerance.images:g})"
        )
        return "\n".join(lines)
    ties = ""
    if parity.num_ties:
        ties = f"; of {parity.num_ties} another class comes first, as probable within that"
    lines.append(
        f"{request.out}: says what the model says of {images} and {parity.num_more} made of them"
        f" (within {parity.tolerance.images:g}{ties}), in batches too"
    )
    return "\n".join(lines)
