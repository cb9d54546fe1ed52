"""What the packer makes of each kind of source, and the one error each wrong source gets."""

import os
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pack_images import REAL_DATA, class_folders, image_bytes
from tiny_runs import tiny_config, write_config

from rtl_dist.cli import main
from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.images.decode import decode
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.prepare.sources import open_source


def by_name(source):
    """name -> (split, class names)."""
    return {i.name: (i.split, [source.classes[n] for n in i.labels]) for i in source.items}


@pytest.fixture
def table(tmp_path):
    """Writes a CSV of these lines beside four images a.jpg to d.jpg and returns its path."""
    for i, name in enumerate("abcd"):
        (tmp_path / f"{name}.jpg").write_bytes(image_bytes(i))

    def write(*lines, name="list.csv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
        return str(tmp_path / name)

    return write


# --- folders


def test_folder_without_splits_is_train_with_classes_sorted(tmp_path):
    source = open_source(str(class_folders(tmp_path / "s", {"b": 1, "a/deep": 2, "B": 1})))
    assert source.classes == ("B", "a", "b")
    assert by_name(source) == {
        "B/000.jpeg": ("train", ["B"]),
        "a/deep/000.jpeg": ("train", ["a"]),
        "a/deep/001.jpeg": ("train", ["a"]),
        "b/000.jpeg": ("train", ["b"]),
    }


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_folder_with_splits(name, tmp_path):
    source = open_source(
        str(class_folders(tmp_path / "s", {"train/a": 1, f"{name}/a": 1, "test/a": 1}))
    )
    assert source.splits == ("train", "val", "test")
    assert source.classes == ("a",)


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("training", "validation", "testing"), True),
        (("Training", "dev", "Test"), True),
        (("train_images", "val2017", "TestSet"), True),
        (("cars_train", "cars_valid", "cars_test"), True),
        (("Trainingsdaten", "Validierungsdaten", "Testdaten"), True),
        (("entrenamiento", "validaci\u00f3n", "prueba"), True),
        (("\u8bad\u7ec3\u96c6", "\u9a8c\u8bc1\u96c6", "\u6d4b\u8bd5"), True),
        (("train", "val", "test"), False),
    ],
)
def test_folders_called_like_splits_are_splits(names, note, tmp_path):
    folder = class_folders(tmp_path / "s", {f"{name}/{c}": 2 for name in names for c in "ab"})
    report = pack(str(folder), tmp_path / "out")
    assert report.class_counts == dict.fromkeys(("train", "val", "test"), (2, 2))
    said = "splits: {} is train, {} is val, {} is test".format(*names)
    assert (said in str(report)) == note


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        ({"test": 1, "control": 1}, ("control", "test")),
        ({"train": 1, "bus": 1, "car": 1}, ("bus", "car", "train")),
        ({"test/x": 1, "control": 1}, ("control", "test")),
        ({"test_strips": 1, "val d": 1}, ("test_strips", "val d")),
        ({"toy_train/x": 1, "steam_train/x": 1}, ("steam_train", "toy_train")),
    ],
)
def test_class_may_be_called_like_a_split(folders, classes, tmp_path):
    assert open_source(str(class_folders(tmp_path / "s", folders))).classes == classes


def test_numbers_are_in_order_of_their_values(tmp_path):
    folder = class_folders(tmp_path / "s", {"10": 1, "9": 1, "01": 1, "100": 1})
    assert open_source(str(folder)).classes == ("01", "9", "10", "100")
    (folder / "9a").mkdir()
    (folder / "9a" / "x.jpg").write_bytes(image_bytes(1))
    assert open_source(str(folder)).classes == ("01", "10", "100", "9", "9a")


def test_two_spellings_of_a_letter_are_one_class(tmp_path):
    apart = unicodedata.normalize("NFD", "\u00e9t\u00e9")
    folder = class_folders(tmp_path / "s", {"train/\u00e9t\u00e9": 1, "train/a": 1, f"val/{apart}": 1, "val/a": 1})  # fmt: skip
    assert open_source(str(folder)).classes == ("a", "\u00e9t\u00e9")
    alone = class_folders(tmp_path / "t", {apart: 1, "a": 1})
    assert open_source(str(alone)).classes == ("a", apart)  # one way only: as it is written
    assert open_source(str(alone), ["\u00e9t\u00e9", "a"]).classes == (apart, "a")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"top/Cat": 1, "top/Dog": 1}, "one class only, 'top', .* pack .*/s/top, which holds the"),
        ({"x/y/train/a": 1, "x/y/val/a": 1}, "pack .*/s/x/y, which holds the folders train, val"),
        ({"images": 1}, "put the images of a second class into a folder beside .*images"),
        ({"train/a": 1, "val/a": 1}, "one class only, 'a'"),
        (
            {"a/train": 1, "a/test": 1, "b/train": 1},
            "a holds test, train, called like splits, .* tra",
        ),
        ({"test/a": 1, "test/b": 1, "site/a": 1}, "holds test, called like a split, beside site"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(folders, message, tmp_path):
    with pytest.raises(DataError, match=message):
        pack(str(class_folders(tmp_path / "s", folders)), tmp_path / "out")


def test_tables_that_are_not_read_are_named(tmp_path):
    folder = class_folders(tmp_path / "s", {"images": 1})
    (folder / "labels.CSV").touch()
    with pytest.raises(DataError, match=r"pack the table: rtl-dist pack .*/s/labels\.CSV OUT"):
        pack(str(folder), tmp_path / "out")
    class_folders(folder, {"masks": 1}, seed=9)
    assert "not read: labels.CSV; to pack" in str(pack(str(folder), tmp_path / "out"))


def test_classes_are_said_by_name_with_their_counts(tmp_path):
    report = pack(str(class_folders(tmp_path / "s", {"a": 3, "b": 1})), tmp_path / "out")
    assert "\nclasses: a 3, b 1\n" in f"\n{report}"
    counts = {f"c{i:02d}": 1 + i % 7 for i in range(20)}
    many = pack(str(class_folders(tmp_path / "t", counts)), tmp_path / "two")
    assert "c11 5 and 8 more; the smallest is c00 1, the largest c06 7\n" in str(many)


def test_folders_without_images_are_no_classes(tmp_path):
    folder = class_folders(tmp_path / "s", {"a": 2, "b": 2, "none": 0, "docs": 0, "junk/deep": 0})
    (folder / "docs" / "read.txt").write_text("what this is")
    report = pack(str(folder), tmp_path / "out", val_fraction=0.5)
    assert report.classes == ("a", "b")
    without = "is a class folder without images"
    assert [(one.name, one.reason) for one in report.left_out] == [
        ("docs", without),
        ("docs/read.txt", "is not a JPEG, PNG or WebP"),
        ("junk", without),
        ("none", without),
    ]


def test_pack_verify_and_train_agree_on_what_can_be_trained(tmp_path, capsys):
    folder = class_folders(tmp_path / "s", {"train/a": 2, "val/a": 1, "val/b": 1})
    out = str(tmp_path / "out")
    assert main(["pack", str(folder), out, "--allow-missing-classes"]) == 0
    why = "cannot be trained on: split 'train' has no image of class 'b'"
    assert why in capsys.readouterr().out.splitlines()[-1]
    assert main(["verify", out]) == 0
    assert why in capsys.readouterr().out.splitlines()[-1]
    config = write_config(tmp_path / "c.yaml", tiny_config(Path(out), tmp_path / "run"))
    assert main(["train", "--config", config]) == 3
    assert why in capsys.readouterr().err.splitlines()[-1]


def test_labels_choose_classes_and_their_order(tmp_path):
    folder = class_folders(tmp_path / "s", {"a": 1, "b": 2, "c": 1})
    source = open_source(str(folder), ["c", "b"])
    assert source.classes == ("c", "b")
    assert sorted(item.labels for item in source.items) == [(0,), (1,), (1,)]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "holds nothing to pack"),
        ({"a": 0}, "holds class folders but no images"),
        ({"train/a": 1, "val": 1}, "val holds images but no class folders"),
        ({"train/a": 1, "val/a": 0}, "val holds class folders but no images"),
        ({"train/a": 1, "other/a": 1}, "other is neither train, val nor test"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1}, "two folders for split 'val', val and valid"),
        ({"train/a": 1, "train/b": 1, "val/a": 1}, "class 'b' has no image in split 'val'; add"),
        ({"train/a": 1, "val/a": 1, "val/b": 1}, "class 'b' has no image in split 'train'; add"),
    ],
)
def test_wrong_folder_is_one_data_error(folders, message, tmp_path):
    (tmp_path / "s").mkdir()
    with pytest.raises(DataError, match=message) as caught:
        pack(str(class_folders(tmp_path / "s", folders)), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_missing_classes_can_be_allowed(tmp_path):
    folder = class_folders(tmp_path / "s", {"train/a": 2, "val/b": 1})
    report = pack(str(folder), tmp_path / "out", allow_missing_classes=True)
    assert report.class_counts == {"train": (2, 0), "val": (0, 1)}


def test_links_in_circles_are_left_out_by_name(tmp_path):
    folder = class_folders(tmp_path / "s", {"a/b": 1, "c": 1})
    (folder / "a" / "b" / "up").symlink_to(folder / "a")
    (folder / "all").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "c" / "self.jpg").symlink_to("self.jpg")
    (folder / "c" / "shared").symlink_to(folder / "a" / "b")  # no circle: it is of both classes
    source = open_source(str(folder))
    assert set(by_name(source)) == {"a/b/000.jpeg", "c/000.jpeg", "c/shared/000.jpeg"}
    assert [(one.name, one.reason) for one in source.left_out] == [
        ("a/b/up", "is a link to a folder that is here already"),
        ("all", "is a class folder without images"),
        ("all", "is a link to a folder above itself"),
        ("c/self.jpg", "is a link to itself"),
        ("c/shared/up/b", "is a link to a folder that is here already"),
        ("self", "is a link to itself"),
    ]


def test_what_is_no_file_is_left_out_by_name(tmp_path):
    folder = class_folders(tmp_path / "s", {"a": 1, "b": 1})
    os.mkfifo(folder / "a" / "x.jpg")
    os.mkfifo(folder / "beside.jpg")
    (folder / "a" / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as open_one:
        open_one.bind(os.path.relpath(folder / "b" / "s.jpg"))
        report = pack(str(folder), tmp_path / "out")
    assert [(one.name, one.reason) for one in report.left_out] == [
        ("a/null.png", "is a device, not a plain file"),
        ("a/x.jpg", "is a named pipe, not a plain file"),
        ("b/s.jpg", "is a socket, not a plain file"),
        ("beside.jpg", "is a named pipe, not a plain file"),
    ]


@pytest.mark.parametrize("name", ["nowhere", "digit", "a.txt"])
def test_no_source(name, tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="give a folder of class folders"):
        open_source(str(tmp_path / name))


# --- val_fraction


def test_val_fraction_is_stratified_and_does_not_depend_on_the_listing(tmp_path, monkeypatch):
    folder = class_folders(tmp_path / "s", {"a": 40, "b": 20, "c": 2})
    report = pack(str(folder), tmp_path / "one", val_fraction=0.1)
    assert report.class_counts == {"train": (36, 18, 1), "val": (4, 2, 1)}
    listed = open_source(str(folder))
    listed.items.reverse()
    monkeypatch.setattr("rtl_dist.prepare.packing.pack.open_source", lambda *_: listed)
    again = pack(str(folder), tmp_path / "two", val_fraction=0.1)
    assert again.fingerprint == report.fingerprint


def test_class_of_one_image_cannot_give_to_val(tmp_path):
    folder = class_folders(tmp_path / "s", {"a": 10, "b": 1})
    with pytest.raises(DataError, match=r"needs two images of a class.*only of 'b': add"):
        pack(str(folder), tmp_path / "out", val_fraction=0.5)


def test_val_fraction_of_multi_label_takes_the_asked_part(table, tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.jpg").write_bytes(image_bytes(i))
    lines = [f"{i}.jpg,{int(i % 2 == 0)},{int(i % 5 == 0)}" for i in range(100)]
    report = pack(table("file,x,y", *lines), tmp_path / "out", val_fraction=0.2)
    assert report.num_samples == {"train": 80, "val": 20}
    assert report.class_counts["val"] == (10, 4)


# --- CSV


def test_csv_with_one_label_column(table, tmp_path):
    path = table("file,label,split", "b.jpg,sea,train", "a.jpg,hill,valid", "./c.jpg,sea,val",
                 "d.jpg , hill,train")  # fmt: skip
    source = open_source(path)
    assert (source.task, source.classes) == ("single_label", ("hill", "sea"))
    assert by_name(source) == {
        "a.jpg": ("val", ["hill"]),
        "b.jpg": ("train", ["sea"]),
        "c.jpg": ("val", ["sea"]),
        "d.jpg": ("train", ["hill"]),
    }
    assert pack(path, tmp_path / "out").class_counts == {"train": (1, 1), "val": (1, 1)}


def test_csv_with_0_1_columns_round_trip(table, tmp_path):
    path = table("file,sea,sunset", "a.jpg,1,1", "b.jpg,0,1", "c.jpg,0,0", "d.jpg,1,0")
    report = pack(path, tmp_path / "out")
    assert report.class_counts == {"train": (2, 2)}
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.task, dataset.classes) == ("multi_label", ("sea", "sunset"))
    split = dataset.split("train")
    labels = {split.key(i)[-1]: split.labels(np.array([i]))[0].tolist() for i in range(4)}
    assert labels == {"a": [1, 1], "b": [0, 1], "c": [0, 0], "d": [1, 0]}
    content = (tmp_path / "out" / "train" / "train-000000.tar").read_bytes()
    assert b'{"labels": ["sea", "sunset"]}' in content
    assert b'{"labels": []}' in content


def test_csv_labels_choose_the_columns(table):
    path = table("file,place,day,night", "a.jpg,sea,1,0", "b.jpg,hill,0,1")
    assert open_source(path, ["place"]).classes == ("hill", "sea")
    assert open_source(path, ["night", "day"]).classes == ("night", "day")
    with pytest.raises(UserError, match="did you mean 'place'"):
        open_source(path, ["plaec"])


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ("\ufefffile;label\r\np\\a.jpg;x\r\np\\b.jpg;y\r\n", r"2 paths with backslashes: p\a.jpg is"),
        ("file\tlabel\np/a.jpg\tx\np/b.jpg\ty\n", ""),
        ("sep=;\nfile;label\np/a.jpg;x\np/b.jpg;y\n", ""),
        ("FileName,class\np/A.JPG,x\nP/b.jpeg.jpg,y\n", "column 'FileName' of t.csv is taken for"),
        ("id,breed,sex\na,x,m\nb,y,f\n", "column 'breed' of t.csv is taken for the label, sex is"),
        ("Bild,Art\np/a.jpg,x\np/b.jpg,y\n", "column 'Bild' of t.csv is taken for the images'"),
        (",file,label\n0,p/a.jpg,x\n1,p/b.jpg,y\n", ""),
        ("file,label\nC:\\me\\p\\a.jpg,x\nC:\\me\\p\\b.jpg,y\n", "2 paths with folders of another"),
        ("file,label\n/data/me/p/a.jpg,x\n/data/me/p/b.jpg,y\n", "is taken for p/a.jpg"),
        ("file,label\np/a,x\np/b,y\n", "2 paths without extension: p/a is taken for p/a.jpg"),
        ("file,label\na.jpg,x\nb.jpg,y\n", "2 paths without their folder: a.jpg is taken for p/a"),
        ("Bild;Art\na.jpg;x\nb.jpg;y\n", "'Bild' of t.csv is taken for the images' files"),
    ],
)  # fmt: skip
def test_tables_as_people_save_them(content, note, tmp_path):
    encoding = "utf-8" if note else "utf-16"  # as Excel saves "Unicode text"
    (tmp_path / "p").mkdir()
    for i, name in enumerate("ab"):
        (tmp_path / "p" / f"{name}.jpg").write_bytes(image_bytes(i))
    content = content.replace("b.jpeg.jpg", "B.jpg")
    (tmp_path / "t.csv").write_bytes(content.encode(encoding))
    source = open_source(str(tmp_path / "t.csv"))
    assert by_name(source) == {"p/a.jpg": ("train", ["x"]), "p/b.jpg": ("train", ["y"])}
    assert note in "\n".join(source.notes)
    assert bool(note) == bool(source.notes)


def test_names_that_several_files_have_are_refused(tmp_path):
    class_folders(tmp_path, {"x": 1, "y": 1})
    (tmp_path / "x" / "000.png").write_bytes(image_bytes(1, kind="PNG"))
    for line, message in (("000.jpeg,a", "may be x/000.jpeg, y/000.jpeg: write which, with its"),
                          ("x/000,a", "may be 000.jpeg, 000.png: write which")):  # fmt: skip
        (tmp_path / "t.csv").write_text(f"file,label\n{line}\n")
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("column", "values", "splits"),
    [
        ("Split", ("Training", "validation", "TEST"), ("train", "val", "test")),
        ("subset", ("train", "dev", "test"), ("train", "val", "test")),
        ("is_valid", ("False", "True", "False"), ("train", "val", "train")),
    ],
)
def test_split_columns_as_people_call_them(column, values, splits, table):
    rows = [f"{name}.jpg,{name},{value}" for name, value in zip("abc", values, strict=True)]
    source = open_source(table(f"file,label,{column}", *rows))
    assert [item.split for item in source.items] == list(splits)


def test_columns_can_be_told(table):
    path = table("img,copy,a,b", "a.jpg,d.jpg,x,1", "b.jpg,c.jpg,y,0")
    source = open_source(path, ["a"], "copy")
    assert by_name(source) == {"d.jpg": ("train", ["x"]), "c.jpg": ("train", ["y"])}
    with pytest.raises(UserError, match=r"--file-column names 'kopy', .* did you mean 'copy'"):
        open_source(path, ["a"], "kopy")
    with pytest.raises(UserError, match="SOURCE is no table"):
        open_source("digits", file_column="img")


def test_labels_that_differ_in_case_are_told(table):
    source = open_source(table("file,label", "a.jpg,Sea ", "b.jpg,sea", "c.jpg,hill"))
    assert source.classes == ("Sea", "hill", "sea")
    assert "classes 'Sea' and 'sea' differ in upper and lower case only" in source.notes[0]


def test_folder_of_one_csv_a_split(table, tmp_path):
    table("file,sea,hill", "a.jpg,1,0", "b.jpg,0,1", name="train.csv")
    table("file,hill,sea", "c.jpg,1,0", name="valid.csv")
    source = open_source(str(tmp_path))
    assert source.classes == ("sea", "hill")
    assert by_name(source)["c.jpg"] == ("val", ["hill"])
    assert source.splits == ("train", "val")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no column `file`"),
        (["file,label"], "has a header but no rows"),
        (["where,label", "x,x"], "has no column `file` .its first line holds: where, label."),
        (["img,path,label", "a.jpg,b.jpg,x"], "; img, path may all be it: name the column of"),
        (["file:label", "a.jpg:x"], "separate columns by commas"),
        (
            ["file,label", "C:\\p\\z.jpg,x", "b.jpg,x", "y.jpg,x"],
            "which is an absolute path, .*so do 1 more",
        ),
        (
            ["file,label", "https://x/a.jpg,x"],
            "line 2 names https://x/a.jpg, which is a URL: downl",
        ),
        (["file,label", "a.jgp,x"], "is no file in .*; did you mean a.jpg.: correct the path"),
        (["file", "a.jpg"], "has no label column"),
        (["file,x,x", "a.jpg,0,1"], "has two columns 'x'"),
        (["file,label", "a.jpg,x", "z.jpg,x"], r"list.csv line 3 names z.jpg, which is no file in"),
        (["file,label", "a.jpg,x", "a.jpg,y"], r"line 3 lists a.jpg again, after .* line 2"),
        (["file,label", "/etc/passwd,x"], "line 2 names /etc/passwd, which is an absolute path"),
        (["file,label", "a.jpg,"], "line 2 has nothing in column `label`"),
        (["file,label", ",x"], "line 2 has nothing in column `file`"),
        (["file,label", "a.jpg"], "line 2 has 1 cells where the header has 2"),
        (["file,x,y", "a.jpg,1,2"], "line 2 has '2' in column 'y', .* write 0 or 1"),
        (["file,x,y", "a.jpg,1,"], "line 2 has '' in column 'y'"),
        (["file,label,split", "a.jpg,x,later"], "line 2 has 'later' in column `split`"),
        (["file,label,split", "a.jpg,x,train", "b.jpg,y,val"], "class 'y' has no image in split"),
        (["file,x,y,split", "a.jpg,1,1,train", "b.jpg,0,1,val"], "class 'x' has no image in spli"),
    ],
)
def test_wrong_csv_is_one_data_error(lines, message, table, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        pack(table(*lines), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_file_too_large_for_a_table_is_not_read(tmp_path):
    path = tmp_path / "t.csv"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(DataError, match=r"t.csv has 1,099,511,627,776 bytes.*name the table"):
        pack(str(path), tmp_path / "out")


def test_csv_folder_errors(table, tmp_path):
    table("file,label", "a.jpg,x", name="train.csv")
    table("file,label,split", "b.jpg,x,val", name="val.csv")
    with pytest.raises(DataError, match="its name already says its split"):
        open_source(str(tmp_path))
    table("file,name", "b.jpg,x", name="val.csv")
    with pytest.raises(DataError, match=r"differ from those of train\.csv"):
        open_source(str(tmp_path))


def test_csv_that_is_not_text(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"file,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="save it as a CSV in UTF-8"):
        open_source(str(tmp_path / "x.csv"))


def test_miml_scene(tmp_path):
    if not (REAL_DATA / "miml_scene").is_dir():
        pytest.skip("the miml_scene images are not on this machine")
    source = open_source(str(REAL_DATA / "miml_scene"))
    assert source.task == "multi_label"
    assert source.classes == ("desert", "mountains", "sea", "sunset", "trees")
    assert len(source.items) == 2000
    assert source.splits == ("train", "val")


# --- digits


def test_digits(tmp_path):
    report = pack("digits", tmp_path / "out", shard_size=2000)
    assert sum(report.num_samples.values()) == 1797
    assert report.classes == tuple("0123456789")
    for split, part in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        assert abs(report.num_samples[split] / 1797 - part) < 0.01
        assert max(report.class_counts[split]) - min(report.class_counts[split]) < 8
    reader = SampleReader(open_dataset(tmp_path / "out").split("train"))
    image = decode(reader.read(0), 1)
    assert image.shape == (1, 8, 8)
    assert image.max() > 200
