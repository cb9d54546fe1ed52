"""Cached features come from a thread, as the network takes them; they go to the disk in one, too."""

import threading
import types

import numpy as np
import pytest
import torch
from small_sets import order_of, packed

from rtl_dist.features.ahead import batches_ahead
from rtl_dist.features.microbatches import ViewMicrobatches
from rtl_dist.features.seal import Seal
from rtl_dist.features.view import View, ViewShape
from rtl_dist.features.view_files import complete_view, open_view, reserve_room
from rtl_dist.features.writing import BlockWriter

CPU = torch.device("cpu")
NUM, SIZE, BLOCK = 23, 4, 8
SEAL = Seal(b"secret")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    counts = {"train/ants": 12, "train/bees": 11, "val/ants": 1, "val/bees": 1}
    return packed(tmp_path_factory.mktemp("data"), counts).split("train")


def view_of(folder, features):
    """A view of these features, written block by block."""
    shape = ViewShape(
        num_samples=len(features), row=tuple(features.shape[1:]), dtype=features.dtype,
        block_size=BLOCK,
    )  # fmt: skip
    folder.mkdir()
    reserve_room(folder, shape)
    with BlockWriter(folder, SEAL) as writer:
        for first in range(0, len(features), BLOCK):
            rows = features[first : first + BLOCK]
            writer.write(first, rows, list(range(first, first + len(rows))))
        blocks = writer.written()
    complete_view(
        folder, shape, checksums=[block.sums for block in blocks],
        used=np.array([sample for block in blocks for sample in block.used]), bad=[],
        content={}, seal=SEAL,
    )  # fmt: skip
    return open_view(folder)


@pytest.fixture(params=[(5,), (6, 3, 2)], ids=["pooled", "activations"])
def cached(request, tmp_path, split):
    """Two views, in half precision."""
    torch.manual_seed(0)
    features = [torch.randn(NUM, *request.param).to(torch.bfloat16) for _ in range(2)]
    if len(request.param) > 1:  # as a network makes them
        features = [one.to(memory_format=torch.channels_last) for one in features]
    views = {n: view_of(tmp_path / str(n), one) for n, one in enumerate(features)}
    order = order_of(split, seed=3)
    microbatches = ViewMicrobatches(views=views, num_views=2, order=order, split=split, size=SIZE)
    return types.SimpleNamespace(microbatches=microbatches, features=features, order=order)


def test_each_microbatch_has_the_rows_of_its_samples(cached, split):
    positions = range(0, 4 * NUM, SIZE)  # some lie in two epochs, so in two views
    for position, batch in zip(
        positions, batches_ahead(cached.microbatches, positions, device=CPU), strict=True
    ):
        samples, epochs = cached.order.samples_at(position, SIZE)
        rows = [
            cached.features[epoch % 2][sample]
            for sample, epoch in zip(samples, epochs, strict=True)
        ]
        assert torch.equal(batch.inputs, torch.stack(rows))
        if batch.inputs.ndim == 4:
            assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
        assert batch.samples.tolist() == samples.tolist()
        assert batch.labels.tolist() == split.labels(samples).tolist()
        assert batch.bad == []


def test_activations_are_channels_last_in_the_file_and_not_copied_on_opening(tmp_path):
    features = torch.randn(10, 6, 3, 2).to(memory_format=torch.channels_last)
    view = view_of(tmp_path / "view", features)
    assert (tmp_path / "view/features.bin").read_bytes() == (
        features.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    )
    assert view.rows.ctypes.data == view.features.data_ptr()
    assert view.features.is_contiguous(memory_format=torch.channels_last)


def test_a_microbatch_s_rows_are_asked_for_at_once_before_they_are_copied(cached, monkeypatch):
    asked = []
    monkeypatch.setattr(View, "ask_for", lambda view, samples: asked.append((view, list(samples))))
    position = NUM - 1  # in two epochs
    samples, _ = cached.order.samples_at(position, SIZE)
    next(batches_ahead(cached.microbatches, iter([position]), device=CPU))
    views = cached.microbatches.views
    assert asked == [(views[0], samples[:1].tolist()), (views[1], samples[1:].tolist())]


def test_the_first_and_the_last_row_can_be_asked_for(cached):
    for view in cached.microbatches.views.values():
        assert view.mapping is not None
        view.ask_for(np.array([0, NUM - 1]))


def test_the_asking_thread_gathers_nothing_and_the_next_one_waits(cached, monkeypatch):
    gather, gathered = ViewMicrobatches.gather, []
    second = threading.Event()

    def note(self, position, out):
        gathered.append((position, threading.current_thread()))
        if position == SIZE:
            second.set()
        return gather(self, position, out)

    monkeypatch.setattr(ViewMicrobatches, "gather", note)
    positions = iter(range(0, 100 * SIZE, SIZE))
    batches = batches_ahead(cached.microbatches, positions, device=CPU)
    assert gathered == [], "what is only opened reads nothing"
    first = next(batches)
    held = first.inputs.clone()
    assert second.wait(10), "the next one is gathered while the first is in use"
    assert torch.equal(first.inputs, held)
    assert threading.current_thread() not in {thread for _, thread in gathered}
    for _ in range(3):
        next(batches)
    assert len(gathered) <= 6, "no more than one is ready"
    (thread,) = {thread for _, thread in gathered}
    batches.close()
    assert not thread.is_alive()


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_asked_for(cached):
    def positions():
        yield 0
        raise MemoryError("no more")

    batches = batches_ahead(cached.microbatches, positions(), device=CPU)
    next(batches)
    with pytest.raises(MemoryError, match="no more"):
        next(batches)


def test_a_disk_that_fails_is_told_once_blocks_were_to_be_there(tmp_path):
    rows = torch.zeros(BLOCK, 2)
    with BlockWriter(tmp_path / "nowhere", SEAL) as writer:
        for first in range(0, 10 * BLOCK, BLOCK):
            writer.write(first, rows, [])
        assert writer.has_failed
        assert writer.written() == []
