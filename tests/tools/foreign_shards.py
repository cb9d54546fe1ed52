"""WebDataset tars as other people make them, and webdataset's own reading of them, for tests."""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from rtl_dist.data.format.dataset import Dataset, open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.format.tar_reader import member_names
from rtl_dist.prepare.indexing.index import IndexReport, index


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes | str]], format: int = tarfile.PAX_FORMAT
) -> Path:
    """A tar of (name, content) in this order, by Python's tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def plain_tar(path: Path, files: dict[str, bytes], *options: str, names: list[str]) -> Path:
    """A tar of files by the ``tar`` command; ``names`` is what it is told to pack."""
    folder = path.parent / f"{path.stem}.files"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    command = ["tar", "-cf", str(path.resolve()), *options, "-C", str(folder), *names]
    subprocess.run(command, check=True)
    return path


def indexed(*shards: Any, out: Path, **options: Any) -> tuple[Dataset, IndexReport]:
    """The data set, opened, and the report of indexing it."""
    options = {"workers": 1, "show_progress": False, **options}
    report = index([str(shard) for shard in shards], out, **options)
    return open_dataset(out), report


def by_index(dataset: Dataset, split: str = "train") -> list[tuple[str, bytes, Any]]:
    """(key, image, class name or names) of every sample, by the index and by offset alone."""
    part = dataset.split(split)
    reader = SampleReader(part)
    places: dict[int, dict[int, str]] = {}
    found = []
    for i in range(part.num_samples):
        row = part.index[i]
        shard = int(row["shard"])
        if shard not in places:
            places[shard] = member_names(Path(dataset.where) / part.shards[shard].path)
        name = places[shard][int(row["offset"])]
        folder, _, base = name.rpartition("/")
        key = (f"{folder}/" if folder else "") + base.split(".")[0]
        if part.label_matrix is None:
            label: Any = dataset.classes[row["label"]]
        else:
            label = [dataset.classes[c] for c in np.flatnonzero(part.label_matrix[i])]
        found.append((key, reader.read(i), label))
    reader.close()
    return found


def by_webdataset(*paths: Path) -> list[dict[str, Any]]:
    """What webdataset makes of these tars."""
    samples = []
    for path in paths:
        with open(path, "rb") as stream:
            source = [{"url": str(path), "stream": stream}]
            samples += list(group_by_keys(tar_file_expander(source)))
    return samples


def description_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "dataset.json").read_text(encoding="utf-8"))
