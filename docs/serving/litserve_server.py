r"""A server of an exported model on LitServe.

    python litserve_server.py model.onnx

    pip install litserve onnxruntime pillow numpy
    echo "{\"image\": \"$(base64 -w 0 photo.jpg)\"}" | curl --json @- 127.0.0.1:8000/predict

No torch, no rtl_dist: resize, crop, normalisation, softmax and temperature are in the graph.
"""

import base64
import io
import json
import sys

import litserve
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

PORT = 8000


class Classify(litserve.LitAPI):
    """A photograph's bytes to its label and the probability of each."""

    def __init__(self, model):
        super().__init__()
        self._path = model

    def setup(self, device):
        self._session = onnxruntime.InferenceSession(
            self._path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
            if device.startswith("cuda") else ["CPUExecutionProvider"]
        )  # fmt: skip
        about = self._session.get_modelmeta().custom_metadata_map
        self._labels = json.loads(about["labels"])
        several = about["task"] == "multi_label"
        self._thresholds = several and (
            json.loads(about["thresholds"]) or [0.5] * len(self._labels)
        )
        self._channels = int(about["channels"])

    def decode_request(self, request):
        with Image.open(io.BytesIO(base64.b64decode(request["image"]))) as picture:
            mode = "RGB" if self._channels == 3 else "L"
            upright = ImageOps.exif_transpose(picture).convert(mode)
        return np.asarray(upright).reshape(upright.height, upright.width, self._channels)

    def predict(self, pixels):
        return self._session.run(["probabilities"], {"image": pixels})[0][0]

    def encode_response(self, probabilities):
        found = dict(zip(self._labels, probabilities.tolist(), strict=True))
        if self._thresholds:
            pairs = zip(self._labels, self._thresholds, strict=True)
            return {"labels": [n for n, t in pairs if found[n] >= t], "probabilities": found}
        return {"label": max(found, key=found.get), "probabilities": found}


if __name__ == "__main__":
    litserve.LitServer(Classify(sys.argv[1]), accelerator="auto").run(
        port=PORT, generate_client_file=False
    )
