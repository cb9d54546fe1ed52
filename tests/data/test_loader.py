"""Samples to microbatches: the same pixels whatever the workers, damage found, every image kind."""

import dataclasses
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from pack_images import encoded, image_bytes, picture, png_16bit
from PIL import Image
from small_sets import Canary, flip_byte, order_of, packed
from torch.utils._python_dispatch import TorchDispatchMode

from rtl_dist.config import AugmentConfig
from rtl_dist.core.cpus import available_cpus
from rtl_dist.core.errors import DataError, WorkerError
from rtl_dist.data.format.dataset import check_split, open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.images.augment import EvalTransform, TrainTransform
from rtl_dist.data.images.decode import decode
from rtl_dist.data.loading import loader as loading
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import (
    SplitMicrobatches,
    TrainingMicrobatches,
    microbatch_positions,
)
from rtl_dist.data.loading.ring import Request, Ring, slot_bytes
from rtl_dist.data.loading.workers import resolve_workers
from rtl_dist.data.order.epochs import EpochOrder
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.evaluation.scoring import score_split
from rtl_dist.model.classifier import Preprocessing
from rtl_dist.model.divided import Divided
from rtl_dist.prepare.indexing.index import index
from rtl_dist.prepare.packing.pack import pack

SIDE, MICRO, BATCH, NUM = 8, 4, 16, 23


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    counts = {"train/ants": 12, "train/bees": 11, "val/ants": 4, "val/bees": 5}
    return packed(tmp_path_factory.mktemp("data"), counts)


@pytest.fixture(scope="module")
def train(dataset):
    return dataset.split("train")


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the data set that a test may damage."""
    shutil.copytree(Path(dataset.where), tmp_path / "copy")
    return open_dataset(tmp_path / "copy")


def microbatches(
    split, *, seed=0, views=None, size=MICRO, channels=3, augment=None, window=None, side=SIDE
):
    transform = TrainTransform(augment or AugmentConfig(), image_size=side, channels=channels)
    order = order_of(split, seed=seed, window=window)
    return TrainingMicrobatches(split, transform, order=order, size=size, views=views)


def samples_at(split, first, count, seed=0):
    return order_of(split, seed=seed).samples_at(first, count)[0]


def positions(end_step, *, rank=0, world_size=1):
    return microbatch_positions(
        0,
        end_step,
        global_batch_size=BATCH,
        micro_batch_size=MICRO,
        rank=rank,
        world_size=world_size,
    )


def read(dataset, requests, workers):
    loader = make_loader(dataset, requests, workers=workers, device=torch.device("cpu"))
    return [batch._replace(inputs=batch.inputs.clone()) for batch in loader]


def same(one, other):
    return (
        torch.equal(one.inputs, other.inputs)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.samples, other.samples)
        and one.bad == other.bad
    )


# --- the same pixels ----------------------------------------------------------------------------


def test_a_microbatch_holds_what_its_positions_say(train):
    reader = SampleReader(train)
    for position in (0, 20, 2 * NUM - 1):
        batch = microbatches(train)[position]
        samples = samples_at(train, position, MICRO)
        assert batch.samples.tolist() == samples.tolist()
        assert batch.labels.tolist() == train.index["label"][samples].tolist()
        assert (batch.inputs.dtype, batch.inputs.shape) == (torch.uint8, (MICRO, 3, SIDE, SIDE))
        assert batch.bad == []
    # without augmentation the pixels are the decoded image's
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.2, 1.2), hflip=0)
    transform = TrainTransform(whole, image_size=10, channels=3)
    first = TrainingMicrobatches(train, transform, order=order_of(train), size=1, views=None)[0]
    image = decode(reader.read(int(first.samples[0])), 3)  # 12 x 10 pixels
    shrunk = torch.nn.functional.interpolate(image[None].float(), (10, 10), mode="bilinear")
    assert (first.inputs.float() - shrunk).abs().mean() < 16


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(train, workers):
    alone = read(microbatches(train), positions(3), 0)
    assert len(alone) == 12
    shared = read(microbatches(train), positions(3), workers)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_microbatches_of_an_odd_number_of_bytes_come_whole(train):
    odd = microbatches(train, size=3, side=9)
    alone, shared = (read(odd, range(0, 18, 3), workers) for workers in (0, 1))
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_same_pixels(train, world_size):
    alone = read(microbatches(train), positions(3), 0)
    of_rank = [
        iter(read(microbatches(train), positions(3, rank=rank, world_size=world_size), 0))
        for rank in range(world_size)
    ]
    share = BATCH // MICRO // world_size
    together = [next(one) for _ in range(3) for one in of_rank for _ in range(share)]
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_what_was_read_before_changes_nothing(train):
    one, other = microbatches(train), microbatches(train)
    expected = one[40]
    for position in (8, 0, 40, 4):
        torch.rand(3)
        other[position]
    assert same(expected, other[40])


def test_augmentation_is_keyed_by_seed_view_and_sample(train):
    def views_of(sample, *, seed=0, views=None, epochs=4):
        """The pixels of one sample in each epoch."""
        seen = []
        dataset = microbatches(train, seed=seed, views=views, size=1)
        for epoch in range(epochs):
            numbers = samples_at(train, epoch * NUM, NUM, seed)
            within = numbers.tolist().index(sample)
            seen.append(dataset[epoch * NUM + within].inputs)
        return seen

    def all_differ(tensors):
        return len({tensor.numpy().tobytes() for tensor in tensors}) == len(tensors)

    assert all_differ(views_of(5))  # a new view every epoch
    cycle = views_of(5, views=2)
    assert torch.equal(cycle[0], cycle[2])
    assert torch.equal(cycle[1], cycle[3])
    assert all_differ(cycle[:2])
    assert torch.equal(cycle[0], views_of(5)[0])  # a view's number is its first epoch's
    assert all_differ([views_of(5, epochs=1)[0], views_of(5, seed=1, epochs=1)[0]])


def test_two_samples_of_the_same_image_get_different_views(train):
    transform = TrainTransform(AugmentConfig(), image_size=SIDE, channels=3)
    pixels = np.arange(20 * 20 * 3, dtype=np.uint8).reshape(20, 20, 3)
    image = encoded(Image.fromarray(pixels), "PNG")
    assert torch.equal(transform(image, 1), transform(image, 1))
    assert not torch.equal(transform(image, 1), transform(image, 2))


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(vflip=0.5, rotation=20),
        AugmentConfig(randaugment=9),
        AugmentConfig(color_jitter=0.3),
        AugmentConfig(erasing=1.0),
    ],
    ids=["flips", "randaugment", "jitter", "erasing"],
)
def test_every_augmentation_draws_from_its_key_alone(train, augment):
    views = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 2**31)
        np.random.seed(None)
        views.append([microbatches(train, augment=augment)[p] for p in (0, 4)])
    assert all(same(a, b) for a, b in zip(*views, strict=True))
    plain = microbatches(train)[0]
    assert not torch.equal(plain.inputs, views[0][0].inputs)


def test_cached_views_are_the_views_of_training(train):
    """A block of a split in view v has the pixels that training has in the epochs of that view."""
    transform = TrainTransform(AugmentConfig(), image_size=SIDE, channels=3)
    pixels = {}
    for view in (0, 1):
        blocks = SplitMicrobatches(train, transform, size=5, seed=3, view=view, substitute=True)
        for first in range(0, NUM, 5):
            batch = blocks[first]
            assert len(batch.inputs) == 5  # always full
            for sample, image in zip(batch.samples.tolist(), batch.inputs, strict=True):
                pixels.setdefault((view, sample), image)
    dataset = microbatches(train, seed=3, views=2, size=1)
    for position in range(3 * NUM):
        batch = dataset[position]
        expected = pixels[position // NUM % 2, int(batch.samples[0])]
        assert torch.equal(batch.inputs[0], expected)


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 9, 23, 64])
def test_evaluation_covers_each_sample_once(train, size):
    transform = EvalTransform(image_size=SIDE, crop_pct=1.0, channels=3)
    blocks = SplitMicrobatches(train, transform, size=size)
    batches = read(blocks, range(0, NUM, size), 0)
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(NUM))
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == train.index["label"].tolist()


def test_evaluation_shows_the_centre():
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[5:15, 10:20] = 200
    image = encoded(Image.fromarray(pixels), "PNG")
    # short side 20, centre 10
    view = EvalTransform(image_size=10, crop_pct=0.5, channels=3)(image, 0)
    assert view.shape == (3, 10, 10)
    assert (view == 200).all()
    assert EvalTransform(image_size=8, crop_pct=1.0, channels=3)(image, 0).shape == (3, 8, 8)


# --- damage -------------------------------------------------------------------------------------


def position_of(sample):
    order = EpochOrder(shard_sizes=np.array([NUM]), seed=0)
    return order.samples_at(0, NUM)[0].tolist().index(sample)


def test_a_flipped_byte_is_found_and_names_the_sample(damaged):
    split = damaged.split("train")
    key = split.key(9)
    flip_byte(split, 9)
    with pytest.raises(DataError, match=r"sample 9 of split 'train' .* fails its checksum"):
        SampleReader(split).read(9)
    batch = microbatches(split, size=1)[position_of(9)]
    (message,) = batch.bad
    assert message.startswith("sample 9 of split 'train'")
    assert repr(key) in message
    assert "checksum" in message
    assert split.shards[split.index[9]["shard"]].path in message


def test_a_substitute_is_always_the_same_and_brings_its_label(damaged):
    split = damaged.split("train")
    other_class = [i for i in range(NUM) if split.index[i]["label"] != split.index[9]["label"]]
    flip_byte(split, 9)
    alone = microbatches(split, size=1)[position_of(9)]
    substitute = int(alone.samples[0])
    assert substitute != 9
    assert alone.labels.tolist() == [split.index[substitute]["label"]]
    at = position_of(9)
    for first in (at - 2, at - 1, at):
        if first >= 0:
            batch = microbatches(split, size=3)[first]
            assert batch.samples[at - first] == substitute
            assert torch.equal(batch.inputs[at - first], alone.inputs[0])
    # a substitute of the other class, at some damaged sample, shows whose label is taken
    labels = set()
    for sample in range(NUM):
        flip_byte(split, sample)
        batch = microbatches(split, size=1)[position_of(sample)]
        flip_byte(split, sample)
        labels.add((int(split.index[sample]["label"]), int(batch.labels[0])))
        assert batch.labels[0] == split.index[int(batch.samples[0])]["label"]
    assert {(0, 1), (1, 0)} & labels
    assert other_class


def test_a_damaged_substitute_is_replaced_too(damaged):
    split = damaged.split("train")
    flip_byte(split, 9)
    first = int(microbatches(split, size=1)[position_of(9)].samples[0])
    flip_byte(split, first)
    batch = microbatches(split, size=1)[position_of(9)]
    assert batch.samples[0] not in (9, first)
    assert [name.split(" of split")[0] for name in batch.bad] == ["sample 9", f"sample {first}"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_split_in_which_nothing_can_be_read_is_refused(damaged, workers):
    split = damaged.split("train")
    for sample in range(NUM):
        flip_byte(split, sample)
    with pytest.raises(DataError, match="16 samples in a row cannot be read"):
        read(microbatches(split), [0], workers)


def test_evaluation_replaces_nothing(damaged):
    split = damaged.split("train")
    flip_byte(split, 9)
    blocks = SplitMicrobatches(
        split, EvalTransform(image_size=SIDE, crop_pct=1.0, channels=3), size=4
    )
    batch = blocks[8]
    assert batch.samples.tolist() == [8, 9, 10, 11]
    assert len(batch.bad) == 1
    assert not batch.inputs[1].any()
    assert batch.inputs[0].any()


class Scores(torch.nn.Module):
    """Stands for a classifier and its frozen part, which break on anything but images."""

    preprocessing = Preprocessing(image_size=SIDE, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))

    def forward(self, images):
        return torch.zeros(len(images), 2) + images.float().mean((1, 2, 3))[:, None]


def score(dataset, split, runtime):
    divided = Divided(Scores(), torch.nn.Identity())
    return score_split(Scores(), dataset, split, runtime=runtime, workers=0, divided=divided)


@pytest.mark.parametrize("damage", [1, 9], ids=["one", "a whole batch"])
def test_damaged_samples_cannot_be_evaluated(damaged, damage):
    split = damaged.split("val")
    with Runtime("no") as runtime:
        predictions = score(damaged, split, runtime)
        assert predictions.scores.shape == (9, 2)
        for sample in range(damage):
            flip_byte(split, sample)
        more = ", and 8 more" if damage == 9 else ""
        with pytest.raises(
            DataError, match=f"cannot evaluate exactly: sample 0 of .*{more}; each counts"
        ):
            score(damaged, split, runtime)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "truncated"),
        (lambda path: os.truncate(path, 0), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "altered"),
        (lambda path: path.unlink(), "cannot be opened"),
    ],
    ids=["cut", "emptied", "longer", "gone"],
)
def test_a_shard_of_another_size_is_found_before_it_is_read(damaged, change, message):
    split = damaged.split("train")
    shard = split.shards[1].path
    change(Path(damaged.where) / shard)
    with pytest.raises(DataError, match=f"{shard}.*{message}"):
        check_split(damaged, split)
    check_split(damaged, damaged.split("val"))  # its shards are whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_lost_after_opening_is_named(damaged, workers):
    split = damaged.split("train")
    for shard in split.shards:
        (Path(damaged.where) / shard.path).unlink()
    with pytest.raises(DataError, match=r"(?s)cannot read .*\.tar"):
        read(microbatches(split), [0], workers)


def test_a_shard_cut_after_opening_is_named(damaged):
    split = damaged.split("train")
    last = int(np.argmax(split.index["offset"]))
    path = Path(damaged.where) / split.shards[split.index[last]["shard"]].path
    os.truncate(path, int(split.index[last]["offset"]) + 3)
    with pytest.raises(DataError, match=f"sample {last} .* is cut short"):
        SampleReader(split).read(last)


@pytest.mark.parametrize("change", ["shorter", "other dtype", "text", "gone"])
def test_an_index_that_does_not_fit_is_refused(damaged, change):
    path = Path(damaged.where) / "index" / "train.npy"
    index = np.load(path)
    if change == "shorter":
        np.save(path, index[:-1])
    elif change == "other dtype":
        np.save(path, np.arange(NUM))
    elif change == "text":
        path.write_text("no index")
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"index.* pack again"):
        damaged.split("train")


def test_a_pickled_index_is_not_unpickled(damaged, tmp_path):
    canary = tmp_path / "canary"
    path = Path(damaged.where) / "index" / "train.npy"
    np.save(path, np.array([Canary(canary)] * NUM, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot read the index"):
        damaged.split("train")
    assert not canary.exists()


# --- processes ----------------------------------------------------------------------------------


def test_a_split_pickles_as_its_name(train):
    content = pickle.dumps(train)
    assert len(content) < 500
    other = pickle.loads(content)
    assert isinstance(other.index, np.memmap)
    assert (other.name, other.dataset, other.shards) == (train.name, train.dataset, train.shards)
    assert other.index.tolist() == train.index.tolist()


def test_a_reader_travels_without_its_descriptors(train):
    """With spawn a data set that was read from here is pickled; its files are open only here."""
    dataset, reader = microbatches(train), SampleReader(train)
    expected, content = dataset[8], reader.read(0)
    pickled = pickle.dumps(reader)
    reader.close()
    assert pickle.loads(pickled).read(0) == content
    assert same(pickle.loads(pickle.dumps(dataset))[8], expected)


def test_workers_ignore_stop_signals(train):
    """The training process saves first and then ends its workers itself."""
    before = set(multiprocessing.active_children())
    cpu = torch.device("cpu")
    loader = iter(make_loader(microbatches(train), positions(8), workers=1, device=cpu))
    first = next(loader)
    batches = [first._replace(inputs=first.inputs.clone())]
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    batches += [batch._replace(inputs=batch.inputs.clone()) for batch in loader]
    assert len(batches) == 32
    assert all(
        same(a, b) for a, b in zip(batches, read(microbatches(train), positions(8), 0), strict=True)
    )


def test_an_error_in_a_worker_ends_the_workers(damaged):
    """They ignore SIGTERM, so one that is not told to end stays for as long as this process."""
    split = damaged.split("train")
    for sample in range(NUM):
        flip_byte(split, sample)
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as caught:
        read(microbatches(split), positions(8), 2)
    assert set(multiprocessing.active_children()) <= before  # while the error is still held
    message = str(caught.value)
    assert message.startswith("16 samples in a row cannot be read, the last: sample ")
    assert "\n" not in message


@pytest.mark.timeout(120)
def test_a_process_can_exit_while_its_workers_wait(train, tmp_path):
    (tmp_path / "dataset.pkl").write_bytes(pickle.dumps(microbatches(train)))
    code = (
        "import pickle, torch\n"
        "from rtl_dist.data.loading.loader import make_loader\n"
        f"dataset = pickle.load(open({str(tmp_path / 'dataset.pkl')!r}, 'rb'))\n"
        "batches = iter(make_loader(dataset, range(100), workers=1, device=torch.device('cpu')))\n"
        "print(len(next(batches).samples))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stdout.split(), done.stderr) == ([str(MICRO)], "")


def test_workers_that_are_not_needed_any_more_end_without_a_word(train):
    """Whatever listens for dead children: torch does, once it has made workers of somebody's."""

    def complain(*_):
        raise RuntimeError("a worker is dead")

    before = set(multiprocessing.active_children())
    batches = iter(
        make_loader(microbatches(train), positions(100), workers=2, device=torch.device("cpu"))
    )
    next(batches)
    handler = signal.signal(signal.SIGCHLD, complain)
    try:
        batches.close()
        del batches
        assert signal.getsignal(signal.SIGCHLD) is complain
        assert set(multiprocessing.active_children()) <= before
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_a_killed_worker_is_a_named_failure(train):
    before = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    cpu = torch.device("cpu")
    loader = iter(make_loader(microbatches(train), positions(100), workers=2, device=cpu))
    next(loader)
    victim, _ = set(multiprocessing.active_children()) - before
    os.kill(victim.pid, signal.SIGKILL)
    started_at = time.monotonic()
    with pytest.raises(WorkerError, match=f"loader process {victim.pid} was killed"):
        for _ in loader:
            pass
    assert time.monotonic() - started_at < 30
    assert set(multiprocessing.active_children()) <= before
    # torch's own handler would raise anywhere, in the middle of a collective too
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_a_slot_is_lent_until_the_next_batch_is_asked_for(train):
    """Each batch is whole while it is in use, though workers are ahead by as much as they may."""
    cpu = torch.device("cpu")
    expected = read(microbatches(train), positions(20), 0)
    loader = make_loader(microbatches(train), positions(20), workers=2, device=cpu)
    addresses = set()
    for batch, whole in zip(loader, expected, strict=True):
        time.sleep(0.01)  # let them fill every slot that they have
        assert torch.equal(batch.inputs, whole.inputs)
        addresses.add(batch.inputs.data_ptr())
    assert len(addresses) == 2 * 4 + 1  # slots are used again, not made anew


@pytest.mark.gpu
@pytest.mark.parametrize("side", [SIDE, 64], ids=["as they are", "enlarged on the GPU"])
def test_a_gpu_gets_the_same_batches(train, side):
    transform = TrainTransform(AugmentConfig(), image_size=side, channels=3)
    order = order_of(train)
    source = TrainingMicrobatches(train, transform, order=order, size=MICRO, views=None)
    loader = make_loader(source, positions(20), workers=2, device=torch.device("cuda"))
    on_gpu = [(batch.inputs * 1, batch.labels * 1) for batch in loader]  # computed, not waited for
    for (inputs, labels), position in zip(on_gpu, positions(20), strict=True):
        assert torch.equal(inputs.cpu(), source[position].inputs)
        assert torch.equal(labels.cpu(), source[position].labels)


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (2, 1), (3, 2), (100, 2)])
def test_few_workers_start_for_few_microbatches(train, count, workers):
    cpu = torch.device("cpu")
    loader = iter(make_loader(microbatches(train), range(count), workers=2, device=cpu))
    next(loader)
    assert len(multiprocessing.active_children()) == workers
    loader.close()


def test_all_workers_start_where_nobody_knows_how_many_microbatches_come(train):
    cpu = torch.device("cpu")
    loader = iter(make_loader(microbatches(train), positions(100), workers=2, device=cpu))
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()


@pytest.mark.parametrize(
    ("room", "workers", "slots"),
    [(1000, 2, 9), (8, 2, 7), (7, 2, 5), (5, 2, 5), (4, 2, 3), (3, 2, 3), (2, 1, 2), (0, 1, 2)],
)
def test_what_is_ready_stays_within_its_memory(train, monkeypatch, room, workers, slots):
    """room: in microbatches."""
    made = []

    class Noted(loading.Ring):
        def __init__(self, source, num_slots, **options):
            made.append(num_slots)
            super().__init__(source, num_slots, **options)

    monkeypatch.setattr(loading, "Ring", Noted)
    source = microbatches(train)
    ring_bytes = room * slot_bytes(source)
    options = {"workers": 2, "device": torch.device("cpu"), "ring_bytes": ring_bytes}
    loader = iter(make_loader(source, positions(20), **options))
    expected = [microbatches(train)[position] for position in positions(20)]
    read = [batch._replace(inputs=batch.inputs.clone()) for batch in [next(loader)]]
    assert (made, len(multiprocessing.active_children())) == ([slots], workers)
    read += [batch._replace(inputs=batch.inputs.clone()) for batch in loader]
    assert all(same(*pair) for pair in zip(read, expected, strict=True))


def test_labels_and_pixels_go_to_a_device_in_one_copy_of_the_ring(train):
    ring = Ring(microbatches(train), 2)
    reply = ring[Request(1, 0)]
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copied.append(args[0])
            return func(*args, **(kwargs or {}))

    with Copies():
        batch = ring.batch(reply, torch.device("meta"))
    (content,) = copied
    assert content.untyped_storage().data_ptr() == ring.slots.untyped_storage().data_ptr()
    expected = microbatches(train)[0]
    for found, wanted in ((batch.inputs, expected.inputs), (batch.labels, expected.labels)):
        assert (found.shape, found.dtype, found.device.type) == (wanted.shape, wanted.dtype, "meta")
    here = ring.batch(reply, torch.device("cpu"))
    assert same(here, expected)
    ring.slots.zero_()  # as the worker that has the slot next may
    assert torch.equal(here.labels, expected.labels), "labels are not lent"


def test_workers_share_the_cpus_this_process_may_use():
    cpus = available_cpus()
    assert cpus == len(os.sched_getaffinity(0))
    assert resolve_workers(3, cpus=1) == 3
    assert resolve_workers(0, cpus=8) == 0
    assert resolve_workers("auto", cpus=12) == 12
    assert resolve_workers("auto", cpus=64) == 16
    with Runtime("no") as runtime:
        assert runtime.cpus == cpus


# --- kinds of images ----------------------------------------------------------------------------


def test_all_kinds_pass_through_pack_and_loader(tmp_path):
    source = Image.fromarray(picture(40, 30))
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "grey.jpg").write_bytes(encoded(source.convert("L"), "JPEG"))
    (folder / "cmyk.jpg").write_bytes(encoded(source.convert("CMYK"), "JPEG"))
    (folder / "turned.jpg").write_bytes(encoded(source, "JPEG", exif=exif))
    (folder / "deep.png").write_bytes(png_16bit(np.asarray(source).astype(np.uint16) * 257))
    (folder / "small.webp").write_bytes(encoded(source, "WEBP"))
    (tmp_path / "images" / "b").mkdir()
    (tmp_path / "images" / "b" / "0.png").write_bytes(encoded(source, "PNG"))
    pack(str(tmp_path / "images"), tmp_path / "packed", workers=1, show_progress=False)
    split = open_dataset(tmp_path / "packed").split("train")
    for channels in (1, 3):
        batch = microbatches(split, size=6, channels=channels)[0]
        assert batch.inputs.shape == (6, channels, SIDE, SIDE)
        assert batch.bad == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"),
        MemoryError(),
    ],
)
def test_want_of_memory_is_not_the_samples_fault(damaged, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("rtl_dist.data.images.decode.decode_jpeg", fail)
    monkeypatch.setattr("rtl_dist.data.images.region.available", lambda: False)
    with pytest.raises(WorkerError, match="no memory was left"):
        microbatches(damaged.split("train"))[0]


def test_a_file_of_somebody_elses_is_no_danger(tmp_path):
    """libpng can end the process on a damaged PNG."""
    with wds.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(4):
            png = image_bytes(i, kind="PNG")
            tar.write({"__key__": str(i), "png": png, "cls": i % 2})
    index([str(tmp_path / "a.tar")], tmp_path / "out", skip_decode=True, show_progress=False)
    dataset = open_dataset(tmp_path / "out")
    split = dataset.split("train")
    shard, offset, size, _ = split.row(1)
    with open(split.shard_path(shard), "r+b") as file:
        file.seek(offset + size - 30)  # within the compressed pixels
        file.write(b"xxxx")
        file.seek(offset)
        crc32 = zlib.crc32(file.read(size))
    rows = np.array(split.index)
    rows["crc32"][1] = crc32  # whoever made the index saw these bytes
    content = SampleReader(dataclasses.replace(split, index=rows)).read(1)
    with pytest.raises(DataError):
        decode(content, 3)
