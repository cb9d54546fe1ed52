"""The stream backend: webdataset's order, our decoding; every rank and worker its own stream."""

import io
import multiprocessing
import os
import pickle
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from pack_images import image_bytes
from small_sets import Canary, order_of, packed

from rtl_dist.commands.running import run_command
from rtl_dist.config import AugmentConfig
from rtl_dist.core.errors import DataError
from rtl_dist.data.images.augment import TrainTransform
from rtl_dist.data.loading.microbatches import TrainingMicrobatches
from rtl_dist.data.loading.stream import stream_microbatches

SIDE, SIZE = 8, 4
PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    counts = {"train/ants": 20, "train/bees": 15, "val/ants": 1, "val/bees": 1}
    return packed(tmp_path_factory.mktemp("data"), counts).split("train")


def open_stream(urls, *, augment=PLAIN, rank=0, seed=0, first_step=0, workers=0, num_classes=2):
    return stream_microbatches(
        str(urls),
        TrainTransform(augment, image_size=SIDE, channels=3),
        size=SIZE,
        seed=seed,
        first_step=first_step,
        rank=rank,
        num_classes=num_classes,
        workers=workers,
        device=torch.device("cpu"),
    )


def draw(urls, count=8, **options):
    batches = iter(open_stream(urls, **options))
    return [next(batches) for _ in range(count)]


def shards_of(train):
    last = len(train.shards) - 1
    return Path(train.dataset.where) / f"train/train-{{000000..{last:06d}}}.tar"


def images_in(batches):
    return [image.numpy().tobytes() for batch in batches for image in batch.inputs]


def test_our_shards_are_read_with_their_labels(train):
    microbatches = TrainingMicrobatches(
        train,
        TrainTransform(PLAIN, image_size=SIDE, channels=3),
        order=order_of(train),
        size=1,
        views=None,
    )
    label_of = {}
    for position in range(35):
        batch = microbatches[position]
        label_of[batch.inputs[0].numpy().tobytes()] = int(batch.labels[0])
    batches = draw(shards_of(train), 40)
    for batch in batches:
        assert (batch.inputs.dtype, batch.inputs.shape) == (torch.uint8, (SIZE, 3, SIDE, SIDE))
        assert batch.samples.tolist() == [-1] * SIZE
        assert batch.bad == []
    labels = [int(label) for batch in batches for label in batch.labels]
    images = images_in(batches)
    assert labels == [label_of[image] for image in images]
    assert len(set(images)) > 25  # of 35, with replacement


def test_ranks_workers_and_seeds_draw_other_streams(train):
    """What each would see first, over more draws than any one shard holds."""
    streams = {
        ("rank", rank): images_in(draw(shards_of(train), 10, rank=rank)) for rank in range(3)
    }
    streams["seed"] = images_in(draw(shards_of(train), 10, seed=1))
    streams["step"] = images_in(draw(shards_of(train), 10, first_step=7))
    two = draw(shards_of(train), 20, workers=2)  # the workers take turns
    streams["worker", 0], streams["worker", 1] = images_in(two[0::2]), images_in(two[1::2])
    alone = streams.pop(("rank", 0))
    assert alone == streams.pop(("worker", 0))
    drawn = [tuple(alone), *map(tuple, streams.values())]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_start_draws_the_same_stream(train, workers):
    options = {
        "workers": workers,
        "augment": AugmentConfig(),
        "seed": 3,
        "first_step": 5,
        "rank": 1,
    }
    one = draw(shards_of(train), 12, **options)
    torch.rand(5)
    other = draw(shards_of(train), 12, **options)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(one, other, strict=True))


def test_a_rank_of_a_launcher_draws_its_own_stream(train, monkeypatch):
    """webdataset looks at RANK too; that must not undo what we say."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    as_one = images_in(draw(shards_of(train), 10, rank=1))
    monkeypatch.setenv("RANK", "0")
    as_zero = images_in(draw(shards_of(train), 10, rank=0))
    assert as_one != as_zero


def test_draws_of_one_sample_are_augmented_differently(tmp_path):
    # large enough that no two crops of it are the same by chance
    write_tar(tmp_path / "a.tar", {"0.jpg": image_bytes(0, (300, 300)), "0.cls": b"1"})
    for workers in (0, 2):
        images = images_in(draw(tmp_path / "a.tar", 10, augment=AugmentConfig(), workers=workers))
        assert len(set(images)) == len(images)
    one = images_in(draw(tmp_path / "a.tar", augment=AugmentConfig(), rank=0))
    other = images_in(draw(tmp_path / "a.tar", augment=AugmentConfig(), rank=1))
    assert not set(one) & set(other)


# --- sources that can only be streamed -----------------------------------------------------------


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(count=6):
    members = {}
    for i in range(count):
        members[f"{i}.png"] = image_bytes(i, kind="PNG")
        members[f"{i}.cls"] = str(i % 2).encode()
    return members


def test_compressed_tars_are_read(tmp_path):
    write_tar(tmp_path / "a.tar.gz", samples(), "w:gz")
    (batch,) = draw(tmp_path / "a.tar.gz", 1)
    assert set(batch.labels.tolist()) <= {0, 1}


def test_pickled_members_are_never_executed(tmp_path):
    canary = tmp_path / "canary"
    members = samples()
    for suffix in ("pkl", "pyd", "pickle", "pth", "npy"):
        members[f"5.{suffix}"] = pickle.dumps(Canary(canary))
    write_tar(tmp_path / "a.tar", members)
    draw(tmp_path / "a.tar", 5)
    assert not canary.exists()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.cls": b"1"}, "sample '0' of .*a.tar needs an image"),
        (
            {"0.png": image_bytes(0, kind="PNG")},
            "sample '0' of .*a.tar needs an image .* and a .cls",
        ),
        ({"0.png": b"no image", "0.cls": b"1"}, "sample '0' of .*a.tar is not a JPEG"),
        (samples() | {"5.cls": b"2"}, "sample '5' of .*a.tar: label 2 out of range, 0 to 1"),
        (samples() | {"5.cls": b"-1"}, "sample '5' of .*a.tar: label -1 out of range, 0 to 1"),
        (
            samples() | {"5.cls": b"bee"},
            "sample '5' of .*a.tar: its .cls is no class number: b'bee'",
        ),
    ],
    ids=["no image", "no label", "no picture", "label too high", "label below 0", "label in words"],
)
def test_a_bad_sample_is_a_data_error_that_names_it(tmp_path, capfd, members, message, workers):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=f"(?s){message}"):
        draw(tmp_path / "a.tar", 50, workers=workers)
    # also when it comes from a worker, the user reads one line
    assert run_command(lambda: draw(tmp_path / "a.tar", 50, workers=workers), debug=False) == 3
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rtl-dist: sample '")


@pytest.mark.parametrize("fault", ["missing", "no tar"])
def test_a_source_that_cannot_be_read_is_a_data_error_that_names_it(tmp_path, fault):
    if fault == "no tar":
        (tmp_path / "a.tar").write_bytes(b"this is no tar" * 100)
    with pytest.raises(DataError, match=r"\Acannot read .*a.tar: [^\n]+\Z"):
        draw(tmp_path / "a.tar", 1)


def test_workers_ignore_stop_signals(train):
    before = set(multiprocessing.active_children())
    batches = iter(open_stream(shards_of(train), workers=1))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGTERM)
    assert len([next(batches) for _ in range(10)]) == 10
