"""The data section: which data set, how it is read, and how its images reach the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rtl_dist.config.checks import Checks
from rtl_dist.config.places import Place
from rtl_dist.core.urls import Redirects, is_url, secret_in

LARGEST_SIDE = 4096  # pixels; the first layer's output of one such image takes a gigabyte
_LEAST_CROP = 0.1


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data set, how it is read, and how its images reach the model."""

    path: Place
    """Folder of a data set (``rtl-dist pack`` or ``index``), or its URL: ``https://``, ``s3://``,
    ``gs://`` or any other that fsspec knows. Credentials come from where the storage's own tools
    keep them, never from the URL."""
    source: Place | None = None
    """Packed into ``path`` at the start of the job when nothing is there yet: whatever
    ``rtl-dist pack`` takes, such as ``digits`` or ``torchvision:CIFAR10``."""
    val_fraction: float = 0.0
    """With ``source``: the part of the training images that becomes ``val``."""
    backend: Literal["indexed", "stream"] = "indexed"
    """indexed: exact epochs, resume, exact evaluation. stream: the webdataset library on sources
    that cannot be indexed (``pipe:``, compressed tars); training then has none of those."""
    stream_urls: Place | None = None
    """With ``backend: stream``: brace pattern or URL of the training tars. Labels, classes and the
    evaluation splits still come from ``path``."""
    train: str = "train"
    """Split to train on."""
    val: str = "val"
    """Split to choose the best weights by."""
    test: str | None = "test"
    """Split evaluated once, at the end, with the best weights. Where the data has none called test,
    that is skipped; one of another name must be there."""
    image_size: int = 224
    """Side of the square the model sees, in pixels."""
    crop_pct: float = 0.875
    """Evaluation resizes the short side to image_size / crop_pct and takes the centre square."""
    channels: Literal[1, 3] = 3
    """1: images are decoded to grey. 3: to RGB."""
    workers: Literal["auto"] | int = "auto"
    """Loader processes of each rank. auto: the job's CPUs divided by its local ranks."""
    shuffle: Literal["full", "window"] = "full"
    """full: each epoch is a permutation of all samples. window: an epoch takes the shards in an
    order of its own and mixes the samples of some of them at a time; for remote data that is larger
    than the cache, or must start before much of it has come. The order is the same wherever the
    data lies and whatever is cached."""
    sampling: Literal["natural", "balanced"] = "natural"
    """natural: each sample once an epoch. balanced: each class equally often, each of its samples
    once in the class's own epochs, so that those of small classes come more often; an epoch is then
    a number of samples. Single-label data only."""
    window: int = 16
    """Half the shards that the cache must hold under ``shuffle: window``; the samples of 4/3
    ``window`` shards are mixed at a time."""
    cache_dir: Place | None = None
    """Folder on a local disk where shards of remote data are kept, shared by all jobs of a
    machine. null: ``rtl_dist`` in the user's cache folder."""
    cache_gb: float | None = None
    """How much the cache may hold, in 10^9 bytes; what was used least recently goes first. null:
    80 % of what the disk has free."""
    redirects: Redirects = "origin"
    """Of remote data behind ``https://``. origin: redirects are followed within the server that
    ``path`` names. any: to other servers too, as those of hubs lead to where files are stored."""
    bad_samples: int = 0
    """How many damaged samples a run may replace by another before it stops (exit code 3)."""

    def __post_init__(self) -> None:
        with Checks() as check:
            check(self.image_size >= 8, f"image_size: must be at least 8, not {self.image_size}")
            check(
                _LEAST_CROP <= self.crop_pct <= 1,
                f"crop_pct: must lie in 0 to 1, not {self.crop_pct}, and be {_LEAST_CROP} or more",
            )
            check.at_most(self, image_size=LARGEST_SIDE, workers=1024, bad_samples=2**31)
            check.at_most(self, window=2**31)
            check(0 <= self.val_fraction < 1, "val_fraction: must lie in 0 to 1")
            check(
                self.workers == "auto" or self.workers >= 0, "workers: must be auto or at least 0"
            )
            check(self.bad_samples >= 0, "bad_samples: must be at least 0")
            check(self.window >= 1, f"window: must be at least 1, not {self.window}")
            check(
                self.sampling == "natural"
                or (self.shuffle == "full" and self.backend == "indexed"),
                "sampling: balanced needs shuffle: full and backend: indexed",
                *("shuffle", "backend"),
            )
            check(self.cache_gb is None or self.cache_gb > 0, "cache_gb: must be positive or null")
            secret = secret_in(self.path) if is_url(self.path) else None
            check(secret is None, f"path: {secret}")
            check(
                not (self.path.startswith("http") and "?" in self.path),
                "path: must be the URL of a folder, without a query (?...): its files are read one"
                " by one below it",
            )
            check(
                self.source is None or not is_url(self.path),
                "path: source is packed into a local folder; pack first, then copy the folder"
                " there",
                "source",
            )
            check(
                (self.backend == "stream") == (self.stream_urls is not None),
                "stream_urls: names the tars (a brace pattern) for backend: stream; give both, or"
                " neither",
                "backend",
            )
