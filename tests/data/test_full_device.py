"""A device without room for a batch: it comes on the host, whole and in its place."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from small_sets import order_of, packed

from rtl_dist.config import AugmentConfig
from rtl_dist.data.images.augment import TrainTransform
from rtl_dist.data.loading import loader as loading
from rtl_dist.data.loading.batch import Batch, to_device
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import TrainingMicrobatches

MICRO, COUNT = 6, 8


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    counts = {"train/ants": 13, "train/bees": 11, "val/ants": 1, "val/bees": 1}
    return packed(tmp_path_factory.mktemp("data"), counts).split("train")


class Full(loading.Ring):
    """On a GPU that, as it seems, has room for every second batch."""

    asked = 0

    def batch(self, reply, device):
        if device.type == "cpu":
            return super().batch(reply, device)
        Full.asked += 1
        if Full.asked % 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22.00 MiB.")
        return super().batch(reply, torch.device("cpu"))

    def pin(self):
        """There is nothing to pin for."""

    def unpin(self):
        """Nor to let go."""


@pytest.mark.parametrize("side", [12, 64], ids=["in the copy", "in enlarging"])
def test_the_stream_of_batches_goes_on(train, monkeypatch, side):
    event = SimpleNamespace(synchronize=lambda: None)
    stream = SimpleNamespace(
        record_event=lambda: event, wait_event=lambda event: None, synchronize=lambda: None
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(loading, "Ring", Full)
    monkeypatch.setattr(Full, "asked", 0)
    transform = TrainTransform(AugmentConfig(), image_size=side, channels=3)
    source = TrainingMicrobatches(train, transform, order=order_of(train), size=MICRO, views=None)
    positions = range(0, COUNT * MICRO, MICRO)
    loader = make_loader(source, positions, workers=1, device=torch.device("cuda"))
    for batch, position in zip(loader, positions, strict=True):
        assert torch.equal(batch.inputs, source[position].inputs)
        assert torch.equal(batch.labels, source[position].labels)
    assert Full.asked == COUNT


def test_features_and_kept_images_stay_too(monkeypatch):
    class Large(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to:
                raise torch.OutOfMemoryError("injected")
            return super().__torch_function__(func, types, args, kwargs or {})

    numbers = torch.arange(3)
    batch = Batch(torch.ones(3, 2).as_subclass(Large), numbers, numbers, [])
    assert to_device(batch, torch.device("cpu")) is batch
    assert to_device(batch._replace(inputs=numbers), torch.device("cpu")).inputs is numbers
