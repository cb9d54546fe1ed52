"""``rtl-dist verify``: each thing it finds, found by planting it."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pack_images import REAL_DATA, files_of, image_bytes
from sealed_sets import change_index, kinds, put, reseal, said
from small_sets import flip_byte, packed

from rtl_dist.cli import main
from rtl_dist.core.errors import DataError, RtlDistError, UserError
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.description import fingerprint_of
from rtl_dist.prepare.indexing.index import index
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.prepare.verifying import verify as verify_module
from rtl_dist.prepare.verifying.summary import summary_of
from rtl_dist.prepare.verifying.verify import verify

COUNTS = {"train/ants": 9, "train/bees": 8, "val/ants": 3, "val/bees": 3}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A sound data set without any duplicate: PNGs, because those can be damaged worst."""
    return Path(packed(tmp_path_factory.mktemp("clean"), COUNTS, kind="PNG").where)


@pytest.fixture
def data(clean, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(clean, tmp_path / "data")


def test_clean_data_set_is_clean_and_stays_as_it_was(clean, data, capsys):
    assert main(["verify", str(data)]) == 0
    printed = capsys.readouterr()
    report = json.loads((data / "verify.json").read_text())
    assert report["sound"]
    assert report["damage"] == {"count": 0, "by_kind": {}, "listed": []}
    assert report["splits"]["train"]["samples"] == report["splits"]["train"]["decoded"] == 17
    assert report["splits"]["val"]["width"] == {"min": 12, "median": 12, "max": 12}
    assert report["splits"]["val"]["height"] == {"min": 10, "median": 10, "max": 10}
    assert report["skew"]["train"]["counts"] == [9, 8]
    for kind in ("within_splits", "across_splits", "label_conflicts"):
        assert report["duplicates"][kind]["groups"] == 0
    assert "no damage" in printed.out
    assert "no warnings" in printed.out
    assert printed.out.splitlines()[-1].startswith(f"{data} is sound: 23 samples in 4 shards")
    assert printed.err == ""
    assert open_dataset(data).fingerprint == report["fingerprint"]
    (data / "verify.json").unlink()
    assert files_of(data) == files_of(clean)


def flipped(data):
    flip_byte(open_dataset(data).split("train"), 9)


def truncated(data):
    row = open_dataset(data).split("train").index[10]
    os.truncate(data / "train" / "train-000001.tar", int(row["offset"]) + 5)


def deleted(data):
    (data / "train" / "train-000001.tar").unlink()


def label_member_changed(data):
    path = data / "val" / "val-000000.tar"
    content = bytearray(path.read_bytes())
    row = open_dataset(data).split("val").index[2]
    at = int(row["offset"]) + -(-int(row["size"]) // 512) * 512 + 512
    content[at] ^= 1  # "0" becomes "1"
    path.write_bytes(content)


def index_altered(data):
    def change(index):
        index["crc32"][3] ^= 1

    change_index(data, change)


def index_gone(data):
    (data / "index" / "train.npy").unlink()


def index_garbled(data):
    (data / "index" / "train.npy").write_bytes(b"\x93NUMPY\x01\0\x05\0{'a':")


def index_short(data):
    change_index(data, lambda index: index[:-2])
    reseal(data)


def row_outside(data):
    def change(index):
        index["offset"][3] = 1 << 63

    change_index(data, change)
    reseal(data)


def row_of_no_shard(data):
    def change(index):
        index["shard"][-1] = 7

    change_index(data, change)
    reseal(data)


def rows_of_the_same_bytes(data):
    change_index(data, lambda index: index[[0, 0, *range(2, len(index))]])
    reseal(data, class_counts=counts_of(data))


def rows_out_of_order(data):
    change_index(data, lambda index: index[[*range(1, len(index)), 0]])
    reseal(data)


def label_out_of_range(data):
    def change(index):
        index["label"][4] = 2

    change_index(data, change)
    reseal(data)


def label_changed(data):
    def change(index):
        index["label"][4] ^= 1

    change_index(data, change)
    reseal(data, class_counts=counts_of(data))


def counts_wrong(data):
    reseal(data, class_counts=[8, 9])


def undecodable(data):
    put(data, 5, b"not an image")
    reseal(data)


def crashing_png(data):
    """Its header promises a picture that its data does not hold: torchvision would die of it."""
    row = open_dataset(data).split("train").index[5]
    header = b"IHDR" + (4000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    content = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header
    content += zlib.crc32(header).to_bytes(4, "big")
    assert int(row["size"]) > len(content)
    put(data, 5, content)
    reseal(data)


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (flipped, {"shard_sha256": 1, "crc32": 1}),
        (truncated, {"shard_size": 1, "cut_short": 4}),
        (deleted, {"missing_shard": 1}),
        (label_member_changed, {"shard_sha256": 1, "label_member": 1}),
        (index_altered, {"index_file": 1, "crc32": 1}),
        (index_gone, {"index_file": 1}),
        (index_garbled, {"index_file": 1}),
        (index_short, {"index_file": 1, "totals": 2}),
        (row_outside, {"index_row": 1}),
        (row_of_no_shard, {"index_row": 1, "totals": 1}),
        (rows_of_the_same_bytes, {"index_row": 1}),
        (rows_out_of_order, {"index_row": 1}),
        (label_out_of_range, {"label_range": 1, "label_member": 1, "totals": 1}),
        (label_changed, {"label_member": 1}),
        (counts_wrong, {"totals": 1}),
        (undecodable, {"undecodable": 1}),
        (crashing_png, {"undecodable": 1}),
    ],
)
def test_damage_is_found_and_nothing_else(plant, expected, data, capsys):
    plant(data)
    found = verify(str(data), workers=1)
    assert kinds(found) == expected
    assert main(["verify", str(data), "--workers", "1"]) == 3
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"rtl-dist: {data} is damaged (")
    assert printed.out.count("DAMAGED") == len(expected)
    report = json.loads((data / "verify.json").read_text())
    assert report["damage"]["by_kind"] == expected
    assert not report["sound"]


def counts_of(data):
    return np.bincount(np.load(data / "index" / "train.npy")["label"], minlength=2).tolist()


def test_description_that_would_say_what_we_say_is_refused(data):
    description = json.loads((data / "dataset.json").read_text())
    description["classes"][0] = "x\nrtl-dist: sound"
    description["fingerprint"] = fingerprint_of(description)
    (data / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"class or split .* which holds characters") as caught:
        open_dataset(data)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_not_waited_for(data):
    for name in ("index/train.npy", "train/train-000000.tar", "dataset.json"):
        (data / name).rename(data / "aside")
        os.mkfifo(data / name)
        if name == "dataset.json":
            with pytest.raises(DataError, match=r"dataset.json is not a plain file"):
                verify(str(data), workers=1)
        else:
            damage = verify(str(data), workers=1).damage.listed
            told = [str(one) for of_kind in damage.values() for one in of_kind]
            assert any("is not a plain file" in one for one in told)
        (data / name).unlink()
        (data / "aside").rename(data / name)


def test_damage_in_many_places_is_told_in_one_go(data):
    flip_byte(open_dataset(data).split("train"), 9)
    (data / "train" / "train-000000.tar").unlink()
    (data / "index" / "val.npy").write_bytes(b"")
    found = verify(str(data), workers=1)
    assert kinds(found) == {"missing_shard": 1, "shard_sha256": 1, "index_file": 1, "crc32": 1}
    key = found.splits["train"].key(9)
    assert key.startswith("0000009_")
    file = found.splits["train"].split.files_of({9: key})[9]
    assert file.startswith("train/")
    assert said(found, "crc32") == [
        f"train/train-000001.tar sample 9 (key {key}), made of {file}: its bytes fail their checksum"
    ]
    assert said(found, "missing_shard") == [
        "train/train-000000.tar: No such file or directory; 7 samples are lost"
    ]
    assert f"sample 9 (key {key})" in summary_of(found)


def test_shards_made_by_others(tmp_path):
    """Their names may be long or hold anything, and their labels are where they like."""
    (tmp_path / "shards").mkdir()
    name = "photographs of insects/" * 6 + "b\x1b[2J\udcffee"
    with tarfile.open(
        tmp_path / "shards" / "train-000.tar", "w", encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for n, key in enumerate(["one", name, "three"]):
            for suffix, content in (("jpg", image_bytes(min(n, 1))), ("txt", b"ant")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    index([str(tmp_path / "shards")], tmp_path / "out", workers=1, allow_missing_classes=True)
    found = verify(str(tmp_path / "out"), workers=1)
    assert kinds(found) == {}
    (group,) = found.to_json()["duplicates"]["within_splits"]["listed"]
    expected = ["photographs of insects/" * 6 + "b?[2J?ee", "three"]
    assert [one["key"] for one in group["samples"]] == expected
    assert expected[0] in summary_of(found)
    flip_byte(open_dataset(tmp_path / "out").split("train"), 2)
    assert kinds(verify(str(tmp_path / "out"), workers=1)) == {"shard_sha256": 1, "crc32": 1}


def test_remote_data(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kinds(verify(f"file://{data}", workers=1)) == {}
    (data / "train" / "train-000002.tar").unlink()
    shutil.rmtree(tmp_path / "cache")
    found = verify(f"file://{data}", workers=1)
    assert kinds(found) == {"missing_shard": 1}
    assert "is not there" in said(found, "missing_shard")[0]


def die(job, advance):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_one_clear_error(data, monkeypatch, capsys):
    monkeypatch.setattr(verify_module, "check_shard", die)
    with pytest.raises(RtlDistError, match="a verifying process was killed"):
        verify(str(data), workers=2)


def test_ctrl_c_ends_it_and_its_processes(data, tmp_path):
    # a module of its own, so that the workers need not import everything
    (tmp_path / "slow.py").write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "def check(job, advance):\n"
        "    Path(sys.argv[2]).touch()\n    time.sleep(300)\n"
    )
    script = tmp_path / "verifying.py"
    script.write_text(
        "import sys\nimport slow\n"
        "if __name__ == '__main__':\n"
        "    from rtl_dist.cli import main\n    from rtl_dist.prepare.verifying import verify\n"
        "    verify.check_shard = slow.check\n"
        "    sys.exit(main(['verify', sys.argv[1], '--workers', '2']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(data), str(tmp_path / "begun")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    # its workers hold the same pipes: this returns once they have ended, too
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (
        75,
        "",
        "rtl-dist: interrupted; start the same command again\n",
    )


def test_whole_command_on_damaged_data(data):
    (data / "val" / "val-000000.tar").unlink()
    command = [sys.executable, "-m", "rtl_dist.cli", "verify", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3
    assert "val/val-000000.tar: No such file or directory; 6 samples are lost" in done.stdout
    assert done.stderr.startswith("rtl-dist: ")
    assert done.stderr.count("\n") == 1


def test_wrong_arguments_are_the_users(data, tmp_path, capsys):
    with pytest.raises(UserError, match="--workers is 0"):
        verify(str(data), workers=0)
    assert main(["verify", str(data), "--out", str(data)]) == 2
    assert "cannot write" in capsys.readouterr().err
    before = (data / "dataset.json").read_bytes()
    assert main(["verify", str(data), "--out", str(data / "dataset.json")]) == 2
    assert "is no report of verify, so it is not replaced" in capsys.readouterr().err
    assert (data / "dataset.json").read_bytes() == before
    assert main(["verify", "https://nowhere.invalid/data"]) == 2
    assert "--out FILE" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nothing")]) == 3
    assert "nothing: there is no such folder" in capsys.readouterr().err
    assert main(["verify", str(data / "dataset.json")]) == 3
    assert "it is a file; give the folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 3
    assert f"`rtl-dist pack {tmp_path} OUT`" in capsys.readouterr().err


def test_hymenoptera_is_sound_and_holds_no_image_twice(tmp_path):
    if not (REAL_DATA / "hymenoptera").is_dir():
        pytest.skip("the hymenoptera images are not on this machine")
    pack(str(REAL_DATA / "hymenoptera"), tmp_path / "out")
    found = verify(str(tmp_path / "out"), workers=1)
    assert kinds(found) == {}
    assert sum(table.num_decoded for table in found.sizes.values()) == 397
    assert (found.duplicates.within.num_groups, found.duplicates.across.num_groups) == (0, 0)
    assert "no warnings" in summary_of(found)
