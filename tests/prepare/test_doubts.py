"""Images that are decoded, but perhaps not to what they show: told by name, and packed."""

import json

import numpy as np
import pytest
from foreign_shards import indexed, write_tar
from pack_images import class_folders, encoded, files_of, picture, png_16bit
from PIL import Image

from rtl_dist.cli import main
from rtl_dist.prepare.packing import pack as pack_module
from rtl_dist.prepare.packing.pack import pack


def half_lost():
    """A JPEG without the second half of its data, but with its end."""
    whole = encoded(Image.fromarray(picture(128, 128)), "JPEG", quality=90)
    start = whole.index(b"\xff\xda") + 14
    return whole[: start + (len(whole) - start) // 2] + b"\xff\xd9"


def ramp(highest, brightest=None):
    pixels = np.linspace(0, highest, 256).astype(np.uint16)
    pixels[:2] = brightest or 0  # text, or what a sensor's dead pixels say
    return pixels.reshape(16, 16)


DOUBTS = {
    "half.jpg": (half_lost(), "its decoder says 'Corrupt JPEG data: premature end of data segment'"),
    "xray.png": (png_16bit(ramp(4095)), "its 16-bit values use 12 bits at most, and the upper 8 of"
                 " 16 are taken; multiply them by 16"),
    "text.png": (png_16bit(ramp(4095, 65535)), "(almost) all its 16-bit values use 12 bits"),
    "ct.png": (png_16bit(ramp(16383)), "14 bits at most, and the upper 8 of 16 are taken; multiply"
               " them by 4"),
    "blank.png": (encoded(Image.new("RGB", (16, 16), (90, 90, 99)), "PNG"), "(nearly) in one colour:"
                  " all its values are 90 to 99 of 255"),
    "dark.png": (png_16bit(ramp(0)), "(nearly) in one colour: all its values are 0 to 0 of 255"),
}  # fmt: skip
SOUND = {
    "full.png": png_16bit(ramp(65535)),
    "half.png": png_16bit(ramp(32767)),
    "low.png": encoded(Image.fromarray(picture() // 8), "PNG"),
}


@pytest.fixture
def source(tmp_path):
    folder = class_folders(tmp_path / "source", {"ants": 2, "bees": 2})
    for name, (content, _) in DOUBTS.items():
        (folder / "ants" / name).write_bytes(content)
    for name, content in SOUND.items():
        (folder / "bees" / name).write_bytes(content)
    return folder


def test_pack_and_verify_name_them(source, tmp_path, capfd):
    assert main(["pack", str(source), str(tmp_path / "out")]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("doubtful: ")]
    assert len(said) == len(DOUBTS)
    assert main(["verify", str(tmp_path / "out")]) == 0
    output = capfd.readouterr()
    assert "warning: 6 images of train are decoded, but perhaps not to what they show" in output.out
    assert "Corrupt JPEG data" not in output.err
    facts = json.loads((tmp_path / "out" / "verify.json").read_text())["splits"]["train"]
    assert facts["doubtful"] == len(facts["doubtful_listed"]) == len(DOUBTS)
    for name, (_, why) in DOUBTS.items():
        assert any(line.startswith(f"doubtful: ants/{name} ") and why in line for line in said)
        stem = name.partition(".")[0]
        assert any(stem in one["key"] and why in one["why"] for one in facts["doubtful_listed"])


def test_a_pack_that_goes_on_tells_of_those_before(source, tmp_path, monkeypatch):
    """By the sidecars of the finished shards."""

    def end(*_):
        raise KeyboardInterrupt

    whole = pack(str(source), tmp_path / "whole", shard_size=3)
    assert len(whole.doubtful) == len(DOUBTS)
    with monkeypatch.context() as patched:
        patched.setattr(pack_module, "publish", end)
        with pytest.raises(KeyboardInterrupt):
            pack(str(source), tmp_path / "again", shard_size=3)
    again = pack(str(source), tmp_path / "again", shard_size=3)
    assert again.resumed
    assert again.doubtful == whole.doubtful
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_index_names_them(tmp_path):
    files = {}
    for n, (name, (content, _)) in enumerate(DOUBTS.items()):
        stem, _, suffix = name.partition(".")
        files |= {f"{stem}.{suffix}": content, f"{stem}.cls": str(n % 2).encode()}
    write_tar(tmp_path / "x.tar", files.items())
    _, report = indexed(tmp_path / "x.tar", out=tmp_path / "out")
    assert len(report.doubtful) == len(DOUBTS)
    assert f"doubtful: half in {tmp_path / 'x.tar'} may have lost a part" in str(report)
