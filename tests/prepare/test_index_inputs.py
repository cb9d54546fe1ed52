"""Which shards are meant, which split each is of, and how ``dataset.json`` names them."""

import shutil

import pytest
from foreign_shards import by_index, description_of, indexed, write_tar
from pack_images import image_bytes

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.format.tar_reader import walk
from rtl_dist.prepare.indexing.inputs import find_shards

MEMBERS = [("a.jpg", image_bytes(1)), ("a.cls", "0"), ("b.jpg", image_bytes(2)), ("b.cls", "1")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*names):
    for name in names:
        write_tar(name if hasattr(name, "parent") else __import__("pathlib").Path(name), MEMBERS)


def found(*inputs):
    return [(shard.location, shard.split) for shard in find_shards(inputs)]


def test_a_folder_with_folders_for_the_splits(here):
    made("s/train/b.tar", "s/train/a.tar", "s/validation/x/0.tar", "s/TEST/0.tar", "s/other.tar")
    made("s/.hidden/0.tar", "s/.0.tar")
    (here / "s/train/readme.txt").write_text("no tar")
    (here / "s/train/loop").symlink_to(here / "s")
    assert found("s") == [
        ("s/TEST/0.tar", "test"),
        ("s/other.tar", "train"),
        ("s/train/a.tar", "train"),
        ("s/train/b.tar", "train"),
        ("s/validation/x/0.tar", "val"),
    ]


def test_names_give_the_split(here):
    names = {
        "imagenet-train-000.tar": "train",
        "imagenet_val_000.tar": "val",
        "valid000.tar": "val",
        "VALIDATION.tar": "val",
        "x.test.tar": "test",
        "latest-000.tar": "train",
        "trainval.tar": "train",
        "val/train-0.tar": "train",
        "test/1.tar": "test",
        "test/deep/1.tar": "train",
        "val/of-train-and-test.tar": "val",
    }
    made(*names)
    assert found(*names) == list(names.items())
    made("val-of-train.tar")
    with pytest.raises(UserError, match="named after two splits, train and val: say which"):
        found("val-of-train.tar")
    assert found("valid=val-of-train.tar") == [("val-of-train.tar", "val")]


def test_patterns(here):
    made(*(f"s/x-{i:03d}.tar" for i in range(12)), "s/{a,b}.tar", "train=x.tar")
    assert [name for name, _ in found("s/x-{009..011}.tar")] == [
        "s/x-009.tar",
        "s/x-010.tar",
        "s/x-011.tar",
    ]
    assert found("test=s/x-00{3,1}.tar") == [("s/x-003.tar", "test"), ("s/x-001.tar", "test")]
    assert [name for name, _ in found("val=s/x-01*.tar")] == ["s/x-010.tar", "s/x-011.tar"]
    assert found("s/{a,b}.tar", "train=x.tar") == [
        ("s/{a,b}.tar", "train"),
        ("train=x.tar", "train"),
    ]
    assert found(f"file://{here}/s/x-001.tar") == [(f"{here}/s/x-001.tar", "train")]
    urls = "https://example.org/data/train-{00..01}.tar"
    assert found(urls) == [
        ("https://example.org/data/train-00.tar", "train"),
        ("https://example.org/data/train-01.tar", "train"),
    ]
    assert found("s3://bucket/val/0.tar", "test=s3://bucket/val/1.tar") == [
        ("s3://bucket/val/0.tar", "val"),
        ("s3://bucket/val/1.tar", "test"),
    ]


@pytest.mark.parametrize(
    ("inputs", "error", "says"),
    [
        (["s/0.tar", "nowhere-{0..9}.tar"], UserError, "no such shard: nowhere-0.tar, nowhere-1.t"),
        (["s/0.tar", "./s/0.tar"], UserError, "./s/0.tar is given twice: name each"),
        (["s", "val=s/0.tar"], UserError, "s/0.tar is given twice, as train and as val"),
        (["empty"], UserError, "empty holds no .tar file"),
        (["pipe:cat s/0.tar"], UserError, "pipe:cat s/0.tar: commands are never run"),
        (["train=pipe:cat s/0.tar"], UserError, "commands are never run"),
        (["later=s/0.tar"], UserError, "'later' is no split; there are: train, val"),
        (["s/{0.tar"], UserError, "a brace has no partner"),
        (["s/{0..99999999}.tar"], UserError, "names more than 1,000,000 shards"),
        (["s/*.tgz"], UserError, "fits no file"),
        (["https://x.org/data/"], UserError, "is a folder: name its shards"),
        (["https://me:pw@x.org/0.tar"], UserError, "the URL of x.org/0.tar holds a password"),
        (["https://x.org/0.tar?X-Amz-Signature=1"], UserError, "holds a password or token"),
    ],
)
def test_what_is_refused(here, inputs, error, says):
    made("s/0.tar")
    (here / "empty").mkdir()
    with pytest.raises(error) as caught:
        find_shards(inputs)
    assert says in str(caught.value)
    assert "pw@" not in str(caught.value)


def test_shards_are_named_so_that_all_can_move_together(here, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "0.tar"
    made("data/s/0.tar", "data/out/1.tar", "data/2.tar", elsewhere)
    (here / "data/s/link.tar").symlink_to(here / "data/2.tar")
    (here / "data/2.tar").rename(here / "data/real")
    made("data/2.tar")
    (here / "link").symlink_to("data/out")
    tars = ["data/s/0.tar", "data/out/1.tar", "data/2.tar", str(elsewhere), "data/s/link.tar"]
    for out in (here / "data/out", here / "link"):
        dataset, _ = indexed(*tars[:4], out=out, overwrite=True)
        paths = [s["path"] for s in description_of(out)["splits"]["train"]["shards"]]
        assert paths == ["../s/0.tar", "1.tar", "../2.tar", str(elsewhere)]
        assert len(by_index(dataset)) == 8
    shutil.move(here / "data", here / "moved")
    (here / "link").unlink()
    dataset, _ = indexed("moved/s/0.tar", out=here / "moved/new")
    assert len(by_index(dataset)) == 2
    from rtl_dist.data.format.dataset import open_dataset

    assert len(by_index(open_dataset(here / "moved/out"))) == 8


def test_a_val_fraction_needs_train_and_no_val(here):
    made("train.tar", "val.tar", "test.tar")
    with pytest.raises(UserError, match="there are val shards already"):
        indexed("train.tar", "val.tar", out=here / "out", val_fraction=0.5)
    with pytest.raises(UserError, match="no train shards to take from"):
        indexed("test.tar", out=here / "out", val_fraction=0.5)


def test_remote_shards_are_read_where_they_are(here):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    made("0.tar")
    content = (here / "0.tar").read_bytes()
    memory.pipe("/bucket/train-0.tar", content)
    memory.pipe("/bucket/train-1.tar", content[:1000])
    try:
        _, report = indexed("memory://bucket/train-0.tar", out=here / "out")
        assert report.num_samples == {"train": 2}
        entry = description_of(here / "out")["splits"]["train"]["shards"][0]
        assert (entry["path"], entry["bytes"]) == ("memory://bucket/train-0.tar", len(content))
        indexed("0.tar", out=here / "local")
        split = description_of(here / "local")["splits"]["train"]
        assert entry["sha256"] == split["shards"][0]["sha256"]
        assert (here / "out/index/train.npy").read_bytes() == (
            here / "local/index/train.npy"
        ).read_bytes()
        with pytest.raises(DataError) as caught:
            indexed("memory://bucket/train-{0..2}.tar", out=here / "three")
        lines = str(caught.value).splitlines()
        assert lines[0].startswith("2 of 3 shards cannot be used")
        assert "train-1.tar is cut short: member 'a.jpg'" in lines[1]
        assert lines[2] == "  memory://bucket/train-2.tar is not there"
    finally:
        memory.rm("/bucket", recursive=True)
    assert len(list(walk(here / "0.tar"))) == 4
