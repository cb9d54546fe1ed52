"""The packer: what is packed, in what order, with which bytes, and what is left out."""

import gc
import io
import json
import shutil
import zlib

import numpy as np
import pytest
import webdataset
from pack_images import REAL_DATA, class_folders, files_of, image_bytes
from PIL import Image

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.images import decode as decoder
from rtl_dist.data.images import foreign
from rtl_dist.prepare.packing.pack import pack


def contents_of(out, split):
    """key -> (image bytes, class name) by the index alone."""
    dataset = open_dataset(out)
    part = dataset.split(split)
    reader = SampleReader(part)
    labels = part.labels(np.arange(part.num_samples))
    return {
        part.key(i): (reader.read(i), dataset.classes[labels[i]]) for i in range(part.num_samples)
    }


@pytest.fixture
def source(tmp_path):
    counts = {"train/ants": 30, "train/bees": 21, "val/ants": 4, "val/bees": 5}
    return class_folders(tmp_path / "source", counts)


def test_round_trip_passes_bytes_through_with_their_labels(source, tmp_path):
    report = pack(str(source), tmp_path / "out", shard_size=20)
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.task, dataset.classes) == ("single_label", ("ants", "bees"))
    assert dataset.fingerprint == report.fingerprint
    assert report.num_samples == {"train": 51, "val": 9}
    assert report.class_counts == {"train": (30, 21), "val": (4, 5)}
    assert (report.left_out, report.resumed) == ((), False)
    train = dataset.split("train")
    assert [shard.num_samples for shard in train.shards] == [20, 20, 11]
    assert train.class_counts == (30, 21)
    for split in ("train", "val"):
        packed = sorted(contents_of(tmp_path / "out", split).values())
        files = [(p.read_bytes(), p.parent.name) for p in (source / split).rglob("*.jpeg")]
        assert packed == sorted(files)
    assert not (tmp_path / "out" / ".pack").exists()
    assert not (tmp_path / "out" / "left_out.csv").exists()


def test_index_holds_the_checksum_of_each_image(source, tmp_path):
    pack(str(source), tmp_path / "out")
    split = open_dataset(tmp_path / "out").split("val")
    reader = SampleReader(split)
    assert [zlib.crc32(reader.read(i)) for i in range(9)] == split.index["crc32"].tolist()


def test_class_sorted_source_comes_out_mixed(tmp_path):
    source = class_folders(tmp_path / "source", {"a": 60, "b": 60, "c": 60})
    pack(str(source), tmp_path / "out", shard_size=60)
    labels = open_dataset(tmp_path / "out").split("train").index["label"]
    for shard in labels.reshape(3, 60):
        assert np.bincount(shard, minlength=3).min() >= 10
    assert (np.diff(labels.astype(int)) != 0).sum() > 80  # about 119 when mixed, 2 when sorted


def test_same_source_gives_the_same_bytes_wherever_and_by_however_many(source, tmp_path):
    elsewhere = tmp_path / "a" / "copy"
    elsewhere.mkdir(parents=True)
    for path in sorted(source.rglob("*.jpeg"), reverse=True):  # other listing order, other times
        copy = elsewhere / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    pack(str(source), tmp_path / "one", shard_size=10, workers=1)
    pack(str(elsewhere), tmp_path / "far" / "two", shard_size=10, workers=2)
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "far" / "two")
    assert one == two
    assert not any(str(tmp_path).encode() in content for content in one.values())


def read_by_webdataset(urls):
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()  # webdataset leaves its files open; here, not in some later test
    return samples


leaves_files_open = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@leaves_files_open
def test_webdataset_reads_the_same_samples(source, tmp_path):
    pack(str(source), tmp_path / "out", shard_size=20)
    urls = str(tmp_path / "out" / "train" / "train-{000000..000002}.tar")
    samples = read_by_webdataset(urls)
    dataset = open_dataset(tmp_path / "out")
    ours = contents_of(tmp_path / "out", "train")
    theirs = {s["__key__"]: (s["jpg"], dataset.classes[int(s["cls"])]) for s in samples}
    assert theirs == ours
    assert [s["__key__"] for s in samples] == list(ours)


@leaves_files_open
def test_suffix_is_by_content_and_keys_are_plain(tmp_path):
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    (folder / "really.a.png.jpg").write_bytes(image_bytes(1, kind="PNG"))
    (folder / ("Ä ü/".replace("/", "") + "x" * 150 + ".png")).write_bytes(image_bytes(2))
    (folder / "no_suffix").write_bytes(image_bytes(3, kind="WEBP"))
    pack(str(tmp_path / "source"), tmp_path / "out", allow_missing_classes=True)
    samples = read_by_webdataset(str(tmp_path / "out/train/train-000000.tar"))
    assert sorted(next(k for k in s if k in ("jpg", "png", "webp")) for s in samples) == [
        "jpg",
        "png",
        "webp",
    ]
    keys = [s["__key__"] for s in samples]
    assert all(len(key) <= 80 and set(key).isdisjoint("./ ") and key.isascii() for key in keys)
    assert any(key.endswith("_really-a-png") for key in keys)


def test_what_is_no_whole_image_is_left_out_by_name(source, tmp_path):
    ants = source / "train" / "ants"
    (ants / "moving.jpg").write_bytes(image_bytes(1, kind="GIF"))
    (ants / "cut.jpg").write_bytes(image_bytes(2, (64, 64))[:-200])
    (ants / "notes.txt").write_text("about ants")
    (ants / "empty.png").touch()
    (ants / "dangling.png").symlink_to(tmp_path / "nowhere")
    (ants / ".DS_Store").write_text("silently skipped")
    (source / "stray.png").write_bytes(image_bytes(3))  # in no split: nothing says whose it is
    (source / "train" / "stray.jpg").write_bytes(image_bytes(3))
    report = pack(str(source), tmp_path / "out")
    reasons = {file.name: file.reason for file in report.left_out}
    assert reasons == {
        "train/ants/moving.jpg": "is a GIF file, not a JPEG, PNG or WebP",
        "train/ants/cut.jpg": "cannot be decoded: Image is incomplete or truncated",
        "train/ants/notes.txt": "is not a JPEG, PNG or WebP",
        "train/ants/empty.png": "is empty",
        "train/ants/dangling.png": "cannot be read: No such file or directory",
        "train/stray.jpg": "lies outside every class folder",
        "stray.png": "lies outside every class folder",
    }
    assert report.num_samples["train"] == 51
    table = (tmp_path / "out" / "left_out.csv").read_text().splitlines()
    assert table[0] == "file,reason"
    assert [line.split(",")[0] for line in table[1:]] == sorted(reasons)
    assert open_dataset(tmp_path / "out").description["splits"]["train"]["num_left_out"] == 5


@pytest.mark.parametrize("side", [20_000, 5_000])  # beyond Pillow's own bound, and ours alone
def test_decompression_bomb_is_left_out_before_it_is_decoded(side, source, tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "MAX_PIXELS", 1_000_000)
    header = image_bytes(1, kind="PNG")
    size = side.to_bytes(4, "big") * 2
    chunk = b"IHDR" + size + header[24:29]
    bomb = header[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + header[33:]
    (source / "val" / "bees" / "bomb.png").write_bytes(bomb)
    decoded = []
    real = decoder.decode_jpeg
    monkeypatch.setattr(decoder, "decode_jpeg", lambda *a, **k: decoded.append(1) or real(*a, **k))
    monkeypatch.setattr(decoder, "decode_png", lambda *a, **k: decoded.append(1))
    report = pack(str(source), tmp_path / "out", workers=1)
    assert [file.name for file in report.left_out] == ["val/bees/bomb.png"]
    assert "pixels" in report.left_out[0].reason
    assert len(decoded) == 60


def test_only_broken_images_are_one_error(tmp_path):
    (tmp_path / "source" / "a").mkdir(parents=True)
    (tmp_path / "source" / "a" / "x.jpg").write_bytes(image_bytes(1, kind="GIF"))
    with pytest.raises(DataError, match=r"no image of split 'train' can be packed: a/x\.jpg is a"):
        pack(str(tmp_path / "source"), tmp_path / "out")


def test_class_whose_last_image_is_broken_is_missing(source, tmp_path):
    for path in (source / "val" / "bees").iterdir():
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="class 'bees' has no image in split 'val' that can be"):
        pack(str(source), tmp_path / "out")
    report = pack(str(source), tmp_path / "out", allow_missing_classes=True)
    assert report.class_counts["val"] == (4, 0)
    assert report.resumed  # the option changes no byte, so the finished shards served


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_resize_shrinks_only_what_is_larger(kind, tmp_path):
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    small = image_bytes(1, (40, 32), kind)
    (folder / "small").write_bytes(small)
    (folder / "large").write_bytes(image_bytes(2, (100, 64), kind))
    pack(str(tmp_path / "source"), tmp_path / "out", resize=32, allow_missing_classes=True)
    ours = contents_of(tmp_path / "out", "train")
    packed = {key.split("_")[1]: content for key, (content, _) in ours.items()}
    assert packed["small"] == small
    with Image.open(io.BytesIO(packed["large"])) as image:
        assert (image.size, image.format) == ((50, 32), kind)


def test_resize_applies_the_exif_orientation_and_keeps_grey(tmp_path):
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    picture = Image.fromarray(np.repeat(np.arange(80, dtype=np.uint8)[:, None] * 3, 40, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(folder / "turned.jpg", exif=exif)
    pack(str(tmp_path / "source"), tmp_path / "out", resize=20, allow_missing_classes=True)
    ((content, _),) = contents_of(tmp_path / "out", "train").values()
    with Image.open(io.BytesIO(content)) as image:
        assert (image.size, image.mode, image.getexif().get(0x0112)) == ((40, 20), "L", None)
        row = np.asarray(image)[10].astype(int)
    assert row[0] > row[20] > row[39]  # the top, dark, is now at the right


def test_refuses_what_is_not_its_to_replace(source, tmp_path):
    with pytest.raises(UserError, match="lies in the source"):
        pack(str(source), source / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match=r"is not empty \(it holds thesis\.tex\)"):
        pack(str(source), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    (tmp_path / "mine" / "dataset.json").write_text(json.dumps({"splits": {}}))
    with pytest.raises(UserError, match="not written by `rtl-dist pack`"):
        pack(str(source), tmp_path / "mine", overwrite=True)


def test_finished_data_set_is_replaced_only_on_request(source, tmp_path):
    out = tmp_path / "out"
    pack(str(source), out, shard_size=5)
    before = files_of(out)
    with pytest.raises(UserError, match="--overwrite"):
        pack(str(source), out, shard_size=5)
    assert files_of(out) == before
    (out / "train" / "note.txt").write_text("not ours")
    pack(str(source), out, shard_size=50, overwrite=True)
    assert (out / "train" / "note.txt").exists()
    (out / "train" / "note.txt").unlink()
    pack(str(source), tmp_path / "fresh", shard_size=50)
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "--val-fraction is 1.0"),
        ({"val_fraction": 0.2}, "already has a val split"),
        ({"shard_size": 0}, "--shard-size is 0"),
        ({"resize": 0}, "--resize is 0"),
        ({"workers": 0}, "--workers is 0"),
        ({"labels": []}, "--labels names nothing"),
        ({"labels": ["ants", "bee"]}, "did you mean 'bees'"),
    ],
)
def test_wrong_arguments_are_the_users(options, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        pack(str(source), tmp_path / "out", **options)


def test_hymenoptera_packs_all_but_its_gif(tmp_path):
    if not (REAL_DATA / "hymenoptera").is_dir():
        pytest.skip("the hymenoptera images are not on this machine")
    report = pack(str(REAL_DATA / "hymenoptera"), tmp_path / "out")
    assert report.num_samples == {"train": 244, "val": 153}
    assert [file.name for file in report.left_out] == ["train/ants/imageNotFound.gif"]
    assert report.class_counts == {"train": (123, 121), "val": (70, 83)}


def test_every_sample_is_traced_to_the_file_it_was_made_of(tmp_path):
    folder = tmp_path / "source"
    awkward = 'gr\u00f6\u00dfe \U0001f41c, "1"\n.jpg'
    names = ["a/deep/=1+1.jpg", f"a/{awkward}", "a/no.jpg", "b/@x.jpg", "b/\udcff.jpg"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(i) if name != "a/no.jpg" else b"no image")
    pack(str(folder), tmp_path / "out", shard_size=2)
    split = open_dataset(tmp_path / "out").split("train")
    keys = dict(enumerate(split.keys()))
    files = split.files_of(keys)
    assert sorted(files.values()) == sorted(set(names) - {"a/no.jpg"})
    reader = SampleReader(split)
    for sample, name in files.items():
        assert reader.read(sample) == (folder / name).read_bytes()
    table = (tmp_path / "out" / "sources" / "train.csv").read_bytes()
    assert b",'" not in table  # only where the whole cell begins so
    assert split.files_of({0: "another key"}) == {}
    (tmp_path / "out" / "sources" / "train.csv").unlink()
    assert split.files_of(keys) == {}
    assert "made of" not in split.describe(0)


def test_errors_name_the_file_that_a_sample_was_made_of(source, tmp_path):
    pack(str(source), tmp_path / "out")
    split = open_dataset(tmp_path / "out").split("train")
    file = split.files_of({0: split.key(0)})[0]
    assert f", made of {file})" in split.describe(0)


@pytest.mark.parametrize(
    ("splits", "following"),
    [
        (("train", "val"), "rtl-dist train --config configs/transfer.yaml data.path="),
        (("train",), "the same command with --val-fraction 0.2 --overwrite"),
        (("test",), "pack it with train images"),
    ],
)
def test_what_to_type_next_is_what_can_be_done(splits, following, tmp_path):
    counts = {f"{split}/{name}": 2 for split in splits for name in ("ants", "bees")}
    report = pack(str(class_folders(tmp_path / "source", counts)), tmp_path / "out")
    assert f"next: {following}" in str(report).splitlines()[-1]
