"""``torchvision:NAME``, with stand-ins for the downloads."""

import types

import numpy as np
import pytest
import torchvision
from pack_images import class_folders
from PIL import Image

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.images.decode import decode
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.prepare.sources import open_source


class FakeCifar:
    """Shaped as torchvision.datasets.CIFAR10, without the download and its md5 sums."""

    classes = ("cat", "dog")

    def __init__(self, root, train, download):
        assert download
        count = 6 if train else 2
        self.data = np.random.default_rng(train).integers(0, 256, (count, 32, 32, 3), np.uint8)
        self.targets = [i % 2 for i in range(count)]


def test_torchvision_arrays_become_png(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
    report = pack("torchvision:CIFAR10", tmp_path / "out")
    assert report.class_counts == {"train": (3, 3), "test": (1, 1)}
    split = open_dataset(tmp_path / "out").split("test")
    data = FakeCifar("", False, True).data
    for i in range(2):
        pixels = decode(SampleReader(split).read(i), 3).permute(1, 2, 0).numpy()
        assert (pixels == data[int(split.key(i).split("_")[1])]).all()


def test_torchvision_files_are_passed_through(tmp_path, monkeypatch):
    """A tiny Imagenette as it lies on disk after its download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    root = tmp_path / "datasets" / "Imagenette" / "imagenette2"
    wnids = ("n01440764", "n02102040")
    folders = {f"{split}/{wnid}": 2 for split in ("train", "val") for wnid in wnids}
    class_folders(root, folders)
    report = pack("torchvision:Imagenette", tmp_path / "out")
    assert report.classes == ("tench", "English springer")
    assert report.num_samples == {"train": 4, "val": 4}
    split = open_dataset(tmp_path / "out").split("val")
    packed = sorted(SampleReader(split).read(i) for i in range(4))
    assert packed == sorted(p.read_bytes() for p in (root / "val").rglob("*.jpeg"))


@pytest.mark.parametrize(
    "layout", ["_image_files", "_images", "samples", "channels_first", "mnist"]
)
def test_torchvision_layouts(layout, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def dataset(root, **options):
        fake = types.SimpleNamespace(_labels=[0, 1])
        files = [f"{root}/{options['split']}-{i}.png" for i in range(2)]
        if layout == "samples":
            fake.samples = list(zip(files, fake._labels, strict=True))
        elif layout.startswith("_"):
            setattr(fake, layout, files)
        else:
            shape = (2, 3, 32, 32) if layout == "channels_first" else (2, 28, 28)
            fake.data = np.zeros(shape, np.uint8)
        return fake

    monkeypatch.setattr(torchvision.datasets, "SVHN", dataset)
    source = open_source("torchvision:SVHN")
    assert source.classes == ("0", "1")
    if layout in ("channels_first", "mnist"):
        assert {item.content.shape[:2] for item in source.items} <= {(32, 32), (28, 28)}
        Image.fromarray(source.items[0].content)
    else:
        assert sorted(item.name for item in source.items) == [
            "test-0.png",
            "test-1.png",
            "train-0.png",
            "train-1.png",
        ]


def test_failed_download_is_one_data_error(tmp_path, monkeypatch):
    def unreachable(**_):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    with pytest.raises(DataError, match=r"cannot get torchvision:CIFAR100 .*no route to host"):
        pack("torchvision:CIFAR100", tmp_path / "out")


def test_unknown_torchvision_name(tmp_path):
    with pytest.raises(UserError, match="did you mean 'CIFAR10'"):
        pack("torchvision:Cifar10", tmp_path / "out")
