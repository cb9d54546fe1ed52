"""Indexing shards made by others: samples, labels, classes, and what is left out."""

import json
import tarfile

import numpy as np
import pytest
import webdataset as wds
from foreign_shards import by_index, by_webdataset, description_of, indexed, plain_tar, write_tar
from pack_images import class_folders, files_of, image_bytes
from small_sets import Canary

from rtl_dist.cli import main
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.format.dataset import check_index
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.format.tar_reader import member_names
from rtl_dist.data.images.decode import decode
from rtl_dist.prepare.indexing.index import index
from rtl_dist.prepare.packing.pack import pack

IMAGES = [image_bytes(seed) for seed in range(12)]


def shard(path, labels, extension="cls"):
    """A tar of one JPEG and one label member a sample; ``labels`` are members' contents."""
    members = []
    for i, label in enumerate(labels):
        members += [(f"{i:03d}.jpg", IMAGES[i % 12]), (f"{i:03d}.{extension}", label)]
    return write_tar(path, members)


def labels_of(dataset, split="train"):
    return [label for _, _, label in by_index(dataset, split)]


def refused(error, *shards, out, **options):
    with pytest.raises(error) as caught:
        indexed(*shards, out=out, **options)
    assert not (out / "dataset.json").exists()
    return str(caught.value)


def test_webdatasets_own_shards_where_they_lie(tmp_path):
    (tmp_path / "s").mkdir()
    with wds.ShardWriter(f"{tmp_path}/s/train-%03d.tar", maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"a/{i:03d}", "jpg": IMAGES[i], "cls": i % 3, "txt": "x"})
    before = files_of(tmp_path / "s")
    dataset, report = indexed(tmp_path / "s", out=tmp_path / "s")
    assert report.num_samples == {"train": 10}
    assert dataset.classes == ("0", "1", "2")
    assert dataset.task == "single_label"
    assert dataset.fingerprint == report.fingerprint
    train = dataset.split("train")
    assert [(s.path, s.num_samples) for s in train.shards] == [
        ("train-000.tar", 4),
        ("train-001.tar", 4),
        ("train-002.tar", 2),
    ]
    assert train.index["shard"].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    theirs = by_webdataset(*sorted((tmp_path / "s").glob("*.tar")))
    assert by_index(dataset) == [(s["__key__"], s["jpg"], s["cls"].decode()) for s in theirs]
    check_index(dataset, "train")
    after = files_of(tmp_path / "s")
    assert after.keys() - before.keys() == {"dataset.json", "index/train.npy"}
    assert before.items() <= after.items()
    assert "next: the same command with --val-fraction 0.2" in str(report).splitlines()[-1]


def test_the_whole_of_webdataset_yields_the_same_keys_in_the_same_order(tmp_path):
    for number in range(3):
        members = [
            (f"{folder}{i}.{ext}", content)
            for i in (3, 1, 2)
            for folder in ("b/", "a/", "./", "")
            for ext, content in (("jpg", IMAGES[i]), ("cls", str(number)), ("seg.npy", b"x"))
        ]
        members += [("__meta__/x.jpg", b"x"), ("no_extension", b"x"), (".hidden.jpg", b"x")]
        write_tar(tmp_path / f"{number}.tar", members)
    dataset, report = indexed(f"{tmp_path}/{{0..2}}.tar", out=tmp_path / "out")
    theirs = by_webdataset(*(tmp_path / f"{i}.tar" for i in range(3)))
    assert [key for key, _, _ in by_index(dataset)] == [s["__key__"] for s in theirs]
    assert len(theirs) == 36
    assert report.left_out == ()


def test_what_pack_made_is_indexed_as_pack_indexed_it(tmp_path):
    source = class_folders(
        tmp_path / "source", {"train/a": 9, "train/b": 8, "val/a": 2, "val/b": 2}
    )
    packed = pack(str(source), tmp_path / "packed", shard_size=5, workers=1, show_progress=False)
    dataset, report = indexed(tmp_path / "packed", out=tmp_path / "out", classes="a,b")
    for split in ("train", "val"):
        theirs = np.load(tmp_path / f"packed/index/{split}.npy")
        assert np.array_equal(dataset.split(split).index, theirs)
    assert report.class_counts == packed.class_counts
    ours, theirs = description_of(tmp_path / "out"), description_of(tmp_path / "packed")
    assert ours.keys() ^ theirs.keys() == {"indexer", "packer"}
    for split in ours["splits"].values():
        for entry in split["shards"]:
            assert entry["path"].startswith("../packed/")
            entry["path"] = entry["path"].removeprefix("../packed/")
    assert ours["splits"] == theirs["splits"]


@pytest.mark.parametrize(
    ("extension", "labels", "options", "classes", "expected"),
    [
        ("cls", ["0", "2", "1"], {}, ("0", "1", "2"), ["0", "2", "1"]),
        ("cls", [" 1\n", "0"], {"classes": "cat,dog"}, ("cat", "dog"), ["dog", "cat"]),
        ("cls", ["n02", "n01", "n02"], {}, ("n01", "n02"), ["n02", "n01", "n02"]),
        ("CLS", ["1", "0"], {}, ("0", "1"), ["1", "0"]),
        ("txt", ["dog", "cat\n"], {"classes": "dog,cat"}, ("dog", "cat"), ["dog", "cat"]),
        ("txt", ["\ufeff10", "9"], {}, ("9", "10"), ["10", "9"]),
        ("label", ["Äpfel", "bee"], {}, ("bee", "Äpfel"), ["Äpfel", "bee"]),
        ("class.name", ["b", "a"], {"label": ".class.name"}, ("a", "b"), ["b", "a"]),
        ("json", ['{"label": 1, "width": 3}', '{"label": 0.0}'], {}, ("0", "1"), ["1", "0"]),
        ("json", ['{"cls": "n2"}', '{"cls": "n1"}'], {}, ("n1", "n2"), ["n2", "n1"]),
        ("json", ["1", "0"], {}, ("0", "1"), ["1", "0"]),
        ("json", ['{"a": {"b": 1}}', '{"a.b": 0}'], {"field": "a.b"}, ("0", "1"), ["1", "0"]),
        ("json", ['{"labels": ["y", "x"]}', '{"labels": []}', '{"labels": ["y"]}'], {}, ("x", "y"),
         [["x", "y"], [], ["y"]]),
        ("json", ['{"target": [2, 0]}', '{"target": [1]}'], {"classes": "a,b,c"}, ("a", "b", "c"),
         [["a", "c"], ["b"]]),
        ("meta.json", ['{"x": "p"}', '{"x": "q"}'], {"label": "meta.json", "field": "x"},
         ("p", "q"), ["p", "q"]),
    ],
)  # fmt: skip
def test_labels_as_people_write_them(tmp_path, extension, labels, options, classes, expected):
    shard(tmp_path / "x.tar", labels, extension)
    dataset, report = indexed(tmp_path / "x.tar", out=tmp_path / "out", **options)
    assert report.left_out == ()
    assert dataset.classes == classes
    assert labels_of(dataset) == expected
    assert dataset.task == ("multi_label" if isinstance(expected[0], list) else "single_label")
    check_index(dataset, "train")
    said = description_of(tmp_path / "out")["indexer"]
    assert said["label"] == extension.lower()
    assert said["image"] == ["jpg"]


def test_the_first_label_member_that_is_in_use(tmp_path):
    members = [("2.jpg", IMAGES[2]), ("2.txt", "has no cls")]
    members += [("0.jpg", IMAGES[0]), ("0.txt", "a caption"), ("0.cls", "0"), ("0.json", "{}")]
    members += [("1.jpg", IMAGES[1]), ("1.txt", "another"), ("1.cls", "1")]
    write_tar(tmp_path / "x.tar", members)
    dataset, report = indexed(tmp_path / "x.tar", out=tmp_path / "out")
    assert by_index(dataset) == [("0", IMAGES[0], "0"), ("1", IMAGES[1], "1")]
    assert [(one.key, one.reason) for one in report.left_out] == [
        ("2", "has no .cls, the label of other samples (its .txt is not it)")
    ]
    dataset, report = indexed(tmp_path / "x.tar", out=tmp_path / "txt", label="txt")
    assert labels_of(dataset) == ["has no cls", "a caption", "another"]


def test_a_file_of_classes_gives_their_order(tmp_path):
    (tmp_path / "names.txt").write_text("zebra\n\nant\n", encoding="utf-8")
    shard(tmp_path / "x.tar", ["ant", "zebra"])
    names = str(tmp_path / "names.txt")
    dataset, _ = indexed(tmp_path / "x.tar", out=tmp_path / "out", classes=names)
    assert dataset.classes == ("zebra", "ant")
    assert dataset.split("train").index["label"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "options", "error", "says"),
    [
        (["0", "cat"], {}, DataError, "some are names ('cat' in"),
        (["0", "4"], {}, DataError, "class '1' has no image in split 'train' (and so have '2' in"),
        (["a", "b"], {"classes": "a,c"}, UserError, "--classes lacks 'b', a label in"),
        (["0", "2"], {"classes": "a,b"}, UserError, "name all of 0 to 2"),
        (["0", "1"], {"classes": "1,0"}, UserError, "can be class numbers or names"),
        (["a", "b"], {"classes": "a,b,c"}, DataError, "class 'c' has no image"),
        (["a", "b"], {"classes": "a,b,a"}, UserError, "names a twice"),
        (["a", "b"], {"classes": "nowhere.txt"}, UserError, "nowhere.txt: No such file"),
        (["0", "99999999"], {}, DataError, "class number 99999999"),
        (["a"], {"label": "pyd"}, UserError, "can hold code"),
        (["a"], {"image": "gif"}, UserError, "--image gif: images are jpg"),
        (["a"], {"field": "x", "label": "cls"}, UserError, "--field x is for .json members"),
        (["a"], {"val_fraction": 1.0}, UserError, "--val-fraction is 1.0"),
        (["a"], {"workers": 0}, UserError, "--workers is 0"),
        (["", "-1", "\x1b[0m", "a\nb", b"\xff"], {}, DataError, "no sample of split 'train'"),
    ],
)  # fmt: skip
def test_labels_that_make_no_classes(tmp_path, labels, options, error, says):
    shard(tmp_path / "x.tar", labels)
    assert says in refused(error, tmp_path / "x.tar", out=tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (['{"label": [1]}', '{"label": 0}'], DataError, "some labels are lists"),
        (['{"label": 0}', '{"cls": 1}'], UserError, "several JSON fields, label (in"),
        (['{"label": 0, "class": "a"}'], UserError, "label, class: choose with --field"),
        (['{"label": []}'], DataError, "no sample has any label"),
        (['{"label": [0, 1, 0]}'], DataError, "a list of 0 and 1 for each class"),
        (['{"caption": "x"}'], DataError, "has none of label, labels, class"),
        (['{"label": true}', '{"label": null}', "{", "[" * 9000, "9" * 9000], DataError, "no JSON"),
    ],
)  # fmt: skip
def test_json_that_tells_no_label(tmp_path, labels, error, says):
    shard(tmp_path / "x.tar", labels, "json")
    assert says in refused(error, tmp_path / "x.tar", out=tmp_path / "out")


@pytest.mark.parametrize("extension", ["cls", "txt", "json"])
def test_numbers_give_the_same_classes_however_they_are_written(tmp_path, extension, capsys):
    labels = [str(number) for number in range(12)]
    written = [f'{{"label": "{one}"}}' if extension == "json" else one for one in labels]
    shard(tmp_path / "x.tar", written, extension)
    dataset, report = indexed(tmp_path / "x.tar", out=tmp_path / "out")
    assert dataset.classes == tuple(labels)
    assert "\nclasses are numbers here: --classes A,B,... names them\n" in str(report)
    names = [f"name {letter}" for letter in "abcdefghijkl"]  # the hint, followed
    options = {"classes": ",".join(names), "overwrite": True}
    dataset, _ = indexed(tmp_path / "x.tar", out=tmp_path / "out", **options)
    assert dataset.classes == tuple(names)
    assert dataset.split("train").index["label"].tolist() == list(range(12))


@pytest.mark.parametrize("extension", ["cls", "txt"])
@pytest.mark.parametrize(("given", "classes"), [(None, ("1", "2", "3")), ("a,b,c", tuple("abc"))])
def test_labels_that_count_from_one_make_no_dead_class(tmp_path, extension, given, classes):
    shard(tmp_path / "x.tar", ["3", "1", "2"], extension)
    dataset, report = indexed(tmp_path / "x.tar", out=tmp_path / "out", classes=given)
    assert dataset.classes == classes
    assert dataset.split("train").index["label"].tolist() == [2, 0, 1]
    assert ("labels count from 1 here" in str(report)) == (extension == "cls" or given is not None)


def test_numbers_with_gaps_name_the_way_out(tmp_path):
    shard(tmp_path / "x.tar", ["1", "2", "4"])
    message = refused(DataError, tmp_path / "x.tar", out=tmp_path / "out")
    assert message.endswith("or leave the class out with --classes 1,2,4")
    dataset, _ = indexed(tmp_path / "x.tar", out=tmp_path / "out", classes="1,2,4")
    assert dataset.classes == ("1", "2", "4")
    assert dataset.split("train").index["label"].tolist() == [0, 1, 2]


def test_one_class_is_refused(tmp_path):
    shard(tmp_path / "x.tar", ["a", "a"])
    message = refused(DataError, tmp_path / "x.tar", out=tmp_path / "out")
    assert "the shards give one class only, 'a'" in message


def test_class_too_small_for_val_is_named(tmp_path):
    shard(tmp_path / "x.tar", ["a", "a", "b"])
    message = refused(DataError, tmp_path / "x.tar", out=tmp_path / "out", val_fraction=0.5)
    assert "--val-fraction needs two images of a class" in message
    assert "only of 'b'" in message


def test_missing_classes_are_accepted_when_asked(tmp_path):
    shard(tmp_path / "x.tar", ["0", "3"])
    dataset, report = indexed(tmp_path / "x.tar", out=tmp_path / "o", allow_missing_classes=True)
    assert dataset.classes == ("0", "1", "2", "3")
    assert report.class_counts == {"train": (1, 0, 0, 1)}


def test_several_images_need_a_choice(tmp_path):
    members = []
    for i in range(3):
        members += [(f"{i}.left.JPG", IMAGES[i]), (f"{i}.right.png", image_bytes(i, kind="PNG"))]
        members += [(f"{i}.cls", str(i))]
    path = write_tar(tmp_path / "x.tar", members)
    message = refused(UserError, path, out=tmp_path / "out")
    assert "sample 0 has several images, left.jpg, right.png: choose with --image" in message
    for image in ("left.jpg", ".LEFT.JPG", "jpg,left.jpg,right.png"):
        dataset, _ = indexed(path, out=tmp_path / "left", image=image, overwrite=True)
        assert [content for _, content, _ in by_index(dataset)] == IMAGES[:3]
    dataset, _ = indexed(path, out=tmp_path / "right", image="right.png")
    assert [content for _, content, _ in by_index(dataset)] == [
        image_bytes(i, kind="PNG") for i in range(3)
    ]
    assert "has no .jpg; it holds .left.jpg" in refused(
        DataError, path, out=tmp_path / "out", image="jpg"
    )


def test_every_kind_of_image(tmp_path):
    kinds = {"jpg": "JPEG", "JPEG": "JPEG", "img.png": "PNG", "webp": "WEBP", "x.y.jpg": "JPEG"}
    members = []
    for i, (extension, kind) in enumerate(kinds.items()):
        members += [(f"{i}.{extension}", image_bytes(i, kind=kind)), (f"{i}.cls", str(i))]
    dataset, _ = indexed(write_tar(tmp_path / "x.tar", members), out=tmp_path / "out")
    assert [content for _, content, _ in by_index(dataset)] == [
        image_bytes(i, kind=kind) for i, kind in enumerate(kinds.values())
    ]


def test_what_cannot_be_used_is_named_and_left_out(tmp_path):
    canary = tmp_path / "executed"
    png = image_bytes(7, kind="PNG")
    members = [
        ("good.jpg", IMAGES[0]), ("good.cls", "0"), ("good.pyd", __import__("pickle").dumps(Canary(canary))),
        ("unlabelled.jpg", IMAGES[1]), ("unlabelled.npy", b"x"),
        ("imageless.cls", "1"),
        ("broken.jpg", IMAGES[2][:-100]), ("broken.cls", "0"),
        ("bad_png.png", png[:-40]), ("bad_png.cls", "0"),
        ("text.jpg", b"hello"), ("text.cls", "0"),
        ("empty.jpg", b""), ("empty.cls", "0"),
        ("minus.jpg", IMAGES[3]), ("minus.cls", "-1"),
        ("twice.jpg", IMAGES[4]), ("twice.JPG", IMAGES[5]), ("twice.cls", "0"),
        ("apart.jpg", IMAGES[6]), ("between.jpg", IMAGES[7]), ("between.cls", "1"), ("apart.cls", "1"),
        ("large.jpg", IMAGES[8]), ("large.cls", b"0" * (1 << 20) + b"0"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    dataset, report = indexed(path, out=tmp_path / "out")
    assert [key for key, _, _ in by_index(dataset)] == ["good", "between"]
    reasons = {one.key: one.reason for one in report.left_out}
    assert all(one.shard == str(path) for one in report.left_out)
    assert reasons == {
        "unlabelled": "has no label (.cls, .json, .txt or .label); it holds .jpg, .npy",
        "imageless": "has no image; it holds .cls",
        "broken": reasons["broken"],
        "bad_png": "cannot be decoded: the PNG is cut short",
        "text": "is not a JPEG, PNG or WebP",
        "empty": "is empty",
        "minus": "is not labelled: its .cls says -1",
        "twice": "has two members .jpg",
        "apart": "its members do not stand side by side in the tar (tar --sort=name keeps them"
        " together)",
        "large": "its .cls has 1,048,577 bytes; 1,048,576 are allowed",
    }
    assert "cannot be decoded" in reasons["broken"]
    lines = (tmp_path / "out/left_out.csv").read_text().splitlines()
    assert lines[0] == "shard,key,reason"
    assert lines[1].startswith('../x.tar,unlabelled,"has no label (.cls')
    assert len(lines) == 1 + len(report.left_out) == 12
    assert description_of(tmp_path / "out")["splits"]["train"]["num_left_out"] == 11
    assert "left out: 1 more, all in" in str(report)
    assert "(11 left out)" in str(report)
    assert not canary.exists()
    skipped, report = indexed(path, out=tmp_path / "skipped", skip_decode=True)
    split = skipped.split("train")
    assert list(split.keys()) == ["good", "broken", "bad_png", "between"]
    content = SampleReader(split).read(2)
    with pytest.raises(DataError, match="the PNG is cut short"):
        decode(content, 3)


def test_links_and_sparse_files_are_named_and_not_followed(tmp_path):
    (tmp_path / "x.files").mkdir()
    (tmp_path / "x.files/b.jpg").symlink_to("/etc/passwd")
    holes = IMAGES[2] + bytes(1 << 20)
    files = {"a.jpg": IMAGES[0], "a.cls": b"0", "b.cls": b"1", "c.jpg": holes, "c.cls": b"0"}
    files |= {"d.jpg": IMAGES[3], "d.cls": b"1"}
    (tmp_path / "x.files/lonely.jpg").symlink_to("a.jpg")
    with open(tmp_path / "x.files/c.jpg", "wb") as file:
        file.write(IMAGES[2])
        file.truncate(1 << 20)
    del files["c.jpg"]
    names = ["a.jpg", "a.cls", "b.jpg", "b.cls", "c.jpg", "c.cls", "lonely.jpg", "d.jpg", "d.cls"]
    for options in (["--format=gnu", "-S"], ["--format=pax", "-S"]):
        path = plain_tar(tmp_path / "x.tar", files, *options, names=names)
        dataset, report = indexed(path, out=tmp_path / "out", overwrite=True)
        assert [key for key, _, _ in by_index(dataset)] == ["a", "d"]
        assert [(one.key, one.reason) for one in report.left_out] == [
            ("b", "its member b.jpg is a symbolic link, not a plain file"),
            ("c", "its member c.jpg is a sparse file, not a plain file"),
            ("lonely", "its member lonely.jpg is a symbolic link, not a plain file"),
        ]


def test_hard_links_are_named(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.jpg", IMAGES[0]), ("a.cls", b"0"), ("b.cls", b"0")):
            (tmp_path / name).write_bytes(content)
            tar.add(tmp_path / name, name)
        member = tarfile.TarInfo("b.jpg")
        member.type, member.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(member)
    _, report = indexed(path, out=tmp_path / "out", allow_missing_classes=True)
    assert [one.reason for one in report.left_out] == [
        "its member b.jpg is a hard link, not a plain file"
    ]


def test_an_empty_shard_is_listed(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    shard(tmp_path / "b.tar", ["0", "1"])
    dataset, _ = indexed(tmp_path / "a.tar", tmp_path / "b.tar", out=tmp_path / "out")
    train = dataset.split("train")
    assert [(s.path, s.num_samples) for s in train.shards] == [("../a.tar", 0), ("../b.tar", 2)]
    assert train.index["shard"].tolist() == [1, 1]
    message = refused(DataError, tmp_path / "a.tar", out=tmp_path / "none")
    assert "no sample of split 'train' can be indexed: there is no member" in message


def test_a_part_of_train_becomes_val_as_pack_would_choose(tmp_path):
    shard(tmp_path / "a.tar", ["0"] * 10 + ["1"] * 2)
    shard(tmp_path / "b.tar", ["1"] * 3 + ["2"] * 1)
    write_tar(tmp_path / "c.tar", [("z.jpg", IMAGES[0]), ("z.cls", "2")])
    write_tar(tmp_path / "test.tar", [("z.jpg", IMAGES[0]), ("z.cls", "2")])
    tars = [tmp_path / f"{name}.tar" for name in ("a", "b", "c", "test")]
    options = {"val_fraction": 0.3, "allow_missing_classes": True}
    dataset, report = indexed(*tars, out=tmp_path / "out", **options)
    assert report.class_counts == {"train": (7, 3, 1), "val": (3, 2, 1), "test": (0, 0, 1)}
    everything, _ = indexed(*tars[:3], out=tmp_path / "all")
    shards = {s.path for split in ("train", "val") for s in dataset.split(split).shards}
    assert shards == {"../a.tar", "../b.tar", "../c.tar"}
    parts = by_index(dataset) + by_index(dataset, "val")
    assert sorted(parts) == sorted(by_index(everything))
    assert all(s.num_samples for s in dataset.split("val").shards)
    again, _ = indexed(*tars, out=tmp_path / "deep/er/out", **options)
    assert np.array_equal(again.split("val").index, dataset.split("val").index)


def test_the_same_bytes_with_any_number_of_processes(tmp_path, capsys):
    for number in range(5):
        shard(tmp_path / f"s/train-{number}.tar", ["a", "b", "", "c"])
    indexed(tmp_path / "s", out=tmp_path / "one/x", val_fraction=0.3)
    index([str(tmp_path / "s")], tmp_path / "two/x", workers=2, val_fraction=0.3)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


def test_nothing_is_replaced_unasked_and_shards_never(tmp_path):
    source = str(class_folders(tmp_path / "source", {"a": 2, "b": 2}))
    path = shard(tmp_path / "s/train.tar", ["a", "b"])
    indexed(path, out=tmp_path / "s")
    tar = path.read_bytes()
    with pytest.raises(UserError, match=r"already holds a data set.*--overwrite"):
        indexed(path, out=tmp_path / "s")
    indexed(f"val={path}", out=tmp_path / "s", overwrite=True)
    assert path.read_bytes() == tar
    assert sorted(files_of(tmp_path / "s")) == ["dataset.json", "index/val.npy", "train.tar"]
    with pytest.raises(UserError, match="was not written by `rtl-dist pack`"):
        pack(source, tmp_path / "s", overwrite=True, show_progress=False)
    assert path.read_bytes() == tar
    (tmp_path / "s/dataset.json").write_text('{"mine": 1, "splits": {}}')
    with pytest.raises(UserError, match="was not written by rtl-dist"):
        indexed(path, out=tmp_path / "s", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        indexed(path, out=path)


def test_a_failed_index_leaves_the_old_one(tmp_path):
    path = shard(tmp_path / "s/train.tar", ["a", "b"])
    indexed(path, out=tmp_path / "s")
    before = files_of(tmp_path / "s")
    with pytest.raises(UserError, match="lacks 'a'"):
        indexed(path, out=tmp_path / "s", overwrite=True, classes="c,d")
    assert files_of(tmp_path / "s") == before


def test_member_names_are_whole(tmp_path):
    long = "x" * 200
    path = write_tar(tmp_path / "x.tar", [(f"{long}.jpg", IMAGES[0]), ("ü.cls", "0")])
    names = member_names(path)
    assert sorted(names.values()) == [f"{long}.jpg", "ü.cls"]
    content = path.read_bytes()
    assert {content[offset : offset + 1] for offset in names} == {IMAGES[0][:1], b"0"}


def test_the_command(tmp_path, capsys):
    path = shard(tmp_path / "s/train.tar", [json.dumps({"a": {"b": n}}) for n in "xyx"], "json")
    out = str(tmp_path / "out")
    assert main(["index", str(path), out, "--field", "a.b", "--workers", "1"]) == 0
    assert "indexed 2 classes, train 3 images of 1 shards into" in capsys.readouterr().out
    assert main(["index", str(path), out]) == 2
    assert main(["index", str(tmp_path / "nowhere.tar"), f"{out}2"]) == 2
    assert "no such shard" in capsys.readouterr().err


def test_the_label_most_samples_have_is_taken(tmp_path):
    members = []
    for i in range(10):
        members.append((f"{i}.jpg", IMAGES[i % 9]))
        label = ("cls", str(i % 2)) if i < 2 else ("json", json.dumps({"label": f"k{i % 2}"}))
        members.append((f"{i}.{label[0]}", label[1]))
    dataset, report = indexed(write_tar(tmp_path / "x.tar", members), out=tmp_path / "out")
    assert dataset.classes == ("k0", "k1")
    assert dataset.split("train").num_samples == 8
    assert [one.key for one in report.left_out] == ["0", "1"]


def test_a_table_of_the_users_is_not_replaced(tmp_path):
    path = shard(tmp_path / "x.tar", ["0", "1", "0"])
    table = tmp_path / "out" / "left_out.csv"
    table.parent.mkdir()
    table.write_text("mine")
    refused(UserError, path, out=table.parent)
    assert table.read_text() == "mine"
    table.write_text("shard,key,reason\n")  # of an index that was killed
    indexed(path, out=table.parent)
