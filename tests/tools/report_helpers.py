"""A tiny real split, random predictions, and what every picture and page must satisfy."""

import io
import re
import tarfile
import zlib
from functools import partial

import numpy as np
from PIL import Image

from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.data.format.split import INDEX_DTYPE, DatasetPlace, Split
from rtl_dist.data.storage.shard_files import ShardFiles, Shards
from rtl_dist.evaluation.predictions import Predictions


def make_split(root, num_samples, num_shards=3, side=24):
    """A real, tiny split: PNG pictures in plain tars, and the index rows that point into them."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    rows, shards = [], []
    for shard, samples in enumerate(np.array_split(np.arange(num_samples), num_shards)):
        path = root / f"shard-{shard}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                picture = io.BytesIO()
                pixels = rng.integers(0, 256, size=(side, side + 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(picture, format="png")
                content = picture.getvalue()
                header = tarfile.TarInfo(f"k{sample:05d}.png")
                header.size = len(content)
                rows.append((tar.offset + 512, len(content), shard, zlib.crc32(content), 0))
                tar.addfile(header, io.BytesIO(content))
        shards.append(
            {
                "path": path.name,
                "num_samples": len(samples),
                "bytes": path.stat().st_size,
                "sha256": "",
            }
        )
    return Split(
        name="test",
        dataset=DatasetPlace(where=str(root)),
        shards=Shards(shards),
        files=ShardFiles(str(root), Shards(shards), None),
        are_ours=True,
        reopen=partial(make_split, root, num_samples, num_shards, side),
        class_counts=(),
        index=np.array(rows, dtype=INDEX_DTYPE),
        label_matrix=None,
    )


def make_predictions(num_samples, classes, task=SINGLE_LABEL, skill=2.0, seed=0):
    rng = np.random.default_rng(seed)
    shape = (num_samples, len(classes))
    if task == MULTI_LABEL:
        labels = (rng.random(shape) < 0.25).astype(np.uint8)
        scores = 1 / (1 + np.exp(1.5 - skill * labels * 1.6 - rng.normal(size=shape)))
    else:
        labels = rng.integers(0, len(classes), size=num_samples)
        logits = rng.normal(size=shape)
        logits[np.arange(num_samples), labels] += skill
        scores = np.exp(2 * logits) / np.exp(2 * logits).sum(axis=1, keepdims=True)
    return Predictions(
        task=task, classes=tuple(classes), labels=labels, scores=scores.astype(np.float32)
    )


def assert_drawn(path):
    """The PNG decodes, has a sensible size, and is not one colour."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 100
    assert (pixels.reshape(-1, 3) != pixels[0, 0]).any(axis=1).mean() > 0.005, path.name


def assert_self_contained(path):
    """Nothing on the page is fetched: every address is data, every script is absent."""
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"(?:src|href|url|action|srcset)\s*[=(]\s*[\"']?([^\"')\s>]*)", text)
    assert targets
    assert all(target.startswith("data:") for target in targets), targets
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert "@import" not in text
    return text


def assert_no_leftovers(folder):
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
