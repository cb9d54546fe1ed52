r"""A Triton model repository of an exported folder.

    python triton_repository.py EXPORT REPOSITORY
    docker run --rm -p 8000:8000 -v REPOSITORY:/models nvcr.io/nvidia/tritonserver:25.06-py3 \
        tritonserver --model-repository=/models

``classify_image`` takes one image of any size, ``classify_batch`` views, which Triton puts together
to batches itself. Needs onnxruntime and numpy, which comes with it.
"""

import json
import shutil
import sys
from pathlib import Path

import onnxruntime

TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}
MOST_IN_A_BATCH = 64


def add_model(file: Path, repository: Path, name: str, *, batched: bool) -> None:
    """Copies an ONNX file into a repository, with the config.pbtxt that fits its graph."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(file, folder / "1" / "model.onnx")
    (folder / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {MOST_IN_A_BATCH if batched else 0}",
        *(described("input", each, batched) for each in session.get_inputs()),
        *(described("output", each, batched) for each in session.get_outputs()),
    ]
    if batched:
        lines.append("dynamic_batching { max_queue_delay_microseconds: 2000 }")
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def described(kind, tensor, batched):
    """One input or output; the size of a batch is not among Triton's dims."""
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in shape)
    labels = ', label_filename: "labels.txt"' if kind == "output" else ""
    said = f'name: "{tensor.name}", data_type: {TYPES[tensor.type]}, dims: [ {dims} ]{labels}'
    return f"{kind} [ {{ {said} }} ]"


if __name__ == "__main__":
    export, repository = map(Path, sys.argv[1:])
    add_model(export / "model.onnx", repository, "classify_image", batched=False)
    add_model(export / "batch.onnx", repository, "classify_batch", batched=True)
