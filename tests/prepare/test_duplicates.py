"""What ``rtl-dist verify`` tells of sound data: images that occur twice, two labels, unequal classes."""

import io
import json

import numpy as np
import pytest
from pack_images import image_bytes
from PIL import Image, PngImagePlugin
from sealed_sets import change_index, kinds, reseal, said
from small_sets import flip_byte, packed

from rtl_dist.cli import main
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.prepare.packing.pack import pack
from rtl_dist.prepare.verifying.duplicates import Digests, find_duplicates
from rtl_dist.prepare.verifying.skew import measure_skew
from rtl_dist.prepare.verifying.summary import summary_of
from rtl_dist.prepare.verifying.verify import verify


def png(pixels, **text):
    """A PNG with metadata, and another compression than the packer's sources have."""
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info, compress_level=len(text))
    return file.getvalue()


def sources(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def doubled(tmp_path):
    """Copies within train (with other metadata), from train in val, and under two labels."""
    pixels = [np.random.default_rng(n).integers(0, 256, (11, 9, 3), np.uint8) for n in range(9)]
    files = {f"train/ants/{n}.png": png(pixels[n]) for n in range(4)}
    files |= {f"train/bees/{n}.png": png(pixels[n]) for n in range(4, 8)}
    files |= {"val/ants/8.png": png(pixels[8]), "val/bees/x.jpg": image_bytes(1)}
    files["train/ants/again.png"] = png(pixels[0], Comment="taken in spring")
    files["val/ants/leak.png"] = png(pixels[0])
    files["val/bees/leak.png"] = png(pixels[4], Comment="a", Author="b")
    files["val/bees/other.png"] = png(pixels[1])
    almost = pixels[3].copy()
    almost[-1, -1, -1] ^= 1
    files["train/ants/almost.png"] = png(almost)
    turned = np.ascontiguousarray(pixels[2].reshape(9, 11, 3))  # same bytes, another shape
    files["train/ants/turned.png"] = png(turned)
    pack(str(sources(tmp_path / "images", files)), tmp_path / "doubled", shard_size=4, workers=1)
    return tmp_path / "doubled"


def stems(group):
    """``train/ants/again`` as its key tells it."""
    return sorted(
        f"{one['split']}/{one['labels'][0]}/{one['key'].split('_')[1]}" for one in group["samples"]
    )


def test_duplicates_are_by_pixels_within_and_across_splits(doubled, capsys):
    assert main(["verify", str(doubled), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    told = json.loads((doubled / "verify.json").read_text())["duplicates"]
    within, across, conflicts = (
        [stems(group) for group in told[kind]["listed"]]
        for kind in ("within_splits", "across_splits", "label_conflicts")
    )
    triple = ["train/ants/0", "train/ants/again", "val/ants/leak"]
    conflict = ["train/ants/1", "val/bees/other"]
    assert within == [triple]
    assert sorted(across) == [triple, conflict, ["train/bees/4", "val/bees/leak"]]
    assert conflicts == [conflict]
    assert told["surplus"] == {"train": 1, "val": 0}
    assert told["overlap"] == {"train": {"val": 4}, "val": {"train": 3}}
    assert "warning: 3 of 5 samples of val (60.0%) are also in train" in printed
    assert "warning: 1 images (2 samples) stand under different labels" in printed
    assert "repeat an earlier one of their split: 1 in train" in printed
    assert "_again in train/train-00000" in printed


def test_strict_does_not_accept_leaks_and_conflicts(doubled, tmp_path, capsys):
    out = ["--out", str(tmp_path / "report.json"), "--workers", "1", "--strict"]
    assert main(["verify", str(doubled), *out]) == 3
    assert "--strict does not accept" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["sound"]
    assert not (doubled / "verify.json").exists()
    clean = packed(tmp_path / "clean", {"train/ants": 2, "train/bees": 2}).where
    assert main(["verify", clean, *out]) == 0


def multi_label_set(tmp_path):
    rows = ["file,sea,sun,tree"]
    (tmp_path / "images").mkdir()
    for n in range(12):
        (tmp_path / "images" / f"{n}.png").write_bytes(image_bytes(n % 10, kind="PNG"))
        labels = "1,1,0" if n % 2 else "0,1,0"  # 0 and 10, 1 and 11 are the same images
        rows.append(f"{n}.png,{'1,1,1' if n == 11 else labels}")
    (tmp_path / "images" / "train.csv").write_text("\n".join(rows) + "\n")
    pack(str(tmp_path / "images"), tmp_path / "multi", shard_size=5, workers=1)
    return tmp_path / "multi"


def test_multi_label_data(tmp_path, capsys):
    data = multi_label_set(tmp_path)
    found = verify(str(data), workers=1)
    assert kinds(found) == {}
    assert found.duplicates.within.num_groups == 2
    (conflict,) = found.to_json()["duplicates"]["label_conflicts"]["listed"]
    assert sorted(one["labels"] for one in conflict["samples"]) == [
        ["sea", "sun"],
        ["sea", "sun", "tree"],
    ]
    split = found.to_json()["splits"]["train"]
    assert (split["mean_labels"], split["without_label"]) == (round(19 / 12, 6), 0)
    assert found.skew["train"].counts == (6, 12, 1)

    def change(matrix):
        matrix[4] = [0, 0, 1]

    change_index(data, change, suffix=".labels")
    reseal(data, class_counts=np.load(data / "index" / "train.labels.npy").sum(axis=0).tolist())
    found = verify(str(data), workers=1)
    assert kinds(found) == {"label_member": 1}
    assert "tree in the index, " in said(found, "label_member")[0]
    change_index(data, lambda matrix: matrix * 2, suffix=".labels")
    assert verify(str(data), workers=1).damage.counts["label_range"] == 12
    (data / "index" / "train.labels.npy").unlink()
    assert main(["verify", str(data), "--workers", "1"]) == 3
    assert "train.labels.npy: cannot be read: No such file" in capsys.readouterr().out


def test_any_number_of_processes_finds_the_same(doubled, tmp_path):
    flip_byte(open_dataset(doubled).split("train"), 3)
    (doubled / "train" / "train-000001.tar").unlink()
    reports = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}.json"
        assert main(["verify", str(doubled), "--out", str(out), "--workers", str(workers)]) == 3
        reports.append(out.read_text())
    assert reports[0] == reports[1]


def test_odd_sizes_are_told(tmp_path):
    files = {"a/strip.png": image_bytes(1, (100, 9), "PNG"), "a/dot.png": image_bytes(2, (7, 7))}
    files |= {f"a/{n}.png": image_bytes(3 + n, (64 + n, 8), "PNG") for n in (0, 1)}
    pack(
        str(sources(tmp_path / "images", files)),
        tmp_path / "out",
        workers=1,
        allow_missing_classes=True,
    )
    found = verify(str(tmp_path / "out"), workers=1)
    sizes = found.sizes["train"]
    assert sorted(size for _, *size in sizes.extreme) == [[7, 7], [65, 8], [100, 9]]
    assert sizes.to_json()["width"] == {"min": 7, "median": 64, "max": 100}
    assert "_strip: 100 x 9" in summary_of(found)


def test_unequal_classes_are_told_with_the_cure(tmp_path):
    counts = {"train/a": 12, "train/b": 2, "train/c": 2, "val/a": 1, "val/b": 9, "val/c": 0}
    found = verify(packed(tmp_path, counts).where, workers=1)
    told = summary_of(found)
    assert "1 classes have no sample in val (c): they are not measured" in told
    assert "6.0 times the samples of the smallest; optim.class_weights=balanced" in told
    assert "the class shares of val differ from train's by 77.5%" in told


def test_distance_of_shares_by_hand():
    counts = {"train": [30, 10], "val": [5, 5]}
    val = measure_skew(counts, {"train": 40, "val": 10}, multi_label=False)["val"]
    assert val.distance == pytest.approx(0.25)
    # E|difference| of one share, both classes' being the same
    assert val.by_chance == pytest.approx((2 / np.pi * (1 / 40 + 1 / 10) * 0.625 * 0.375) ** 0.5)
    both = measure_skew(counts, {"train": 40, "val": 10}, multi_label=True)["val"]
    assert both.distance == pytest.approx(0.25)


def test_duplicates_against_a_dictionary():
    """Many groups, some of them of digests that agree in half of their bits."""
    generator = np.random.default_rng(0)
    num = {"train": 3000, "val": 500, "test": 1}
    digests = Digests(num)
    label = {split: generator.integers(0, 3, count) for split, count in num.items()}
    groups = {}
    for split, count in num.items():
        values = generator.integers(0, 60, (count, 2), np.uint64)
        values[:3] = 0  # could not be decoded, which makes them no duplicates
        digests.put(split, np.arange(count), values)
        for n, value in enumerate(map(tuple, values.tolist())):
            if any(value):
                groups.setdefault(value, []).append((split, n))
    found = find_duplicates(digests, lambda split, samples: label[split][samples])

    def splits_of(group):
        return [split for split, _ in group]

    groups = [group for group in groups.values() if len(group) > 1]
    within = [g for g in groups if len(set(splits_of(g))) < len(g)]
    across = [g for g in groups if len(set(splits_of(g))) > 1]
    conflicts = [g for g in groups if len({label[s][n] for s, n in g}) > 1]
    for kind, expected in (
        (found.within, within),
        (found.across, across),
        (found.conflicts, conflicts),
    ):
        assert kind.num_groups == len(expected) > 100
        assert kind.num_samples == sum(map(len, expected))
        assert {group.members for group in kind.listed} <= set(map(tuple, expected))
        assert len(kind.listed) == min(1000, len(expected))
    assert found.overlap["val"]["train"] == sum(
        splits_of(g).count("val") for g in groups if "train" in splits_of(g)
    )
    assert found.surplus["train"] == sum(max(0, splits_of(g).count("train") - 1) for g in groups)
