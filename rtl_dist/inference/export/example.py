"""What is on photographs, by an exported model alone: python example.py [X.onnx] PHOTO..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def classify(session: onnxruntime.InferenceSession, photo: str) -> dict[str, float]:
    """The probability of each label; resize, crop and normalisation are in the graph."""
    about = session.get_modelmeta().custom_metadata_map
    with Image.open(photo) as picture:
        upright = ImageOps.exif_transpose(picture).convert(
            "RGB" if about["channels"] == "3" else "L"
        )
    pixels = np.asarray(upright).reshape(upright.height, upright.width, int(about["channels"]))
    probabilities = session.run(["probabilities"], {"image": pixels})[0][0]
    return dict(zip(json.loads(about["labels"]), probabilities.tolist(), strict=True))


def main(words: list[str]) -> None:
    model = Path(__file__).with_name("model.onnx")
    if words and words[0].endswith(".onnx"):
        model, words = Path(words[0]), words[1:]
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    for photo in words:
        found = classify(session, photo)
        if about["task"] == "multi_label":
            thresholds = json.loads(about["thresholds"]) or [0.5] * len(found)
            said = [label for label, t in zip(found, thresholds, strict=True) if found[label] >= t]
        else:
            said = [max(found, key=lambda label: found[label])]
        print(photo, *(f"{label} {found[label]:.6f}" for label in said), sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
