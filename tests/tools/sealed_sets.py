"""Data sets changed together with their description, and what ``rtl-dist verify`` finds in them."""

import hashlib
import json
import zlib

import numpy as np

from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.description import fingerprint_of


def reseal(data, **entries):
    """Makes all checksums of a changed data set fit again; ``entries`` change the train split."""
    path = data / "dataset.json"
    description = json.loads(path.read_text())
    for name, entry in description["splits"].items():
        for shard in entry["shards"]:
            content = (data / shard["path"]).read_bytes()
            shard.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for suffix, key in (("", "index_sha256"), (".labels", "labels_sha256")):
            file = data / "index" / f"{name}{suffix}.npy"
            if file.exists():
                entry[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    description["splits"]["train"].update(entries)
    description["fingerprint"] = fingerprint_of(description)
    path.write_text(json.dumps(description))


def change_index(data, change, split="train", suffix=""):
    path = data / "index" / f"{split}{suffix}.npy"
    index = np.load(path)
    changed = change(index)
    np.save(path, index if changed is None else changed)


def put(data, sample, content, split="train"):
    """Writes other bytes over the beginning of a sample; its checksum in the index then fits."""
    part = open_dataset(data).split(split)
    row = part.index[sample]
    path = data / part.shards[row["shard"]].path
    shard = bytearray(path.read_bytes())
    offset, size = int(row["offset"]), int(row["size"])
    shard[offset : offset + len(content)] = content
    path.write_bytes(shard)

    def change(index):
        index["crc32"][sample] = zlib.crc32(shard[offset : offset + size])

    change_index(data, change, split)


def broken_png(content):
    """The PNG with image data that cannot be inflated, behind a checksum that fits."""
    at = content.index(b"IDAT")
    size = int.from_bytes(content[at - 4 : at], "big")
    body = content[at : at + 4 + size // 2] + bytes(size - size // 2)
    return content[:at] + body + zlib.crc32(body).to_bytes(4, "big") + content[at + 8 + size :]


def kinds(found):
    return found.damage.counts


def said(found, kind):
    return [str(found.with_key(one)) for one in found.damage.listed[kind]]
