"""``rtl-dist pack --convert``: what other formats become, and how files left out can be had."""

import io
import sys

import numpy as np
import pytest
from pack_images import class_folders, picture
from PIL import Image

from rtl_dist.core.errors import DataError
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.images.decode import decode
from rtl_dist.prepare.packing.pack import pack

HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def pixels_by_file(folder):
    split = open_dataset(folder).split("train")
    reader, files = SampleReader(split), split.files_of(dict(enumerate(split.keys())))
    return {name: decode(reader.read(n), 3).permute(1, 2, 0).numpy() for n, name in files.items()}


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_other_formats_are_converted_when_asked(tmp_path):
    folder, image = tmp_path / "s", Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    saved(folder / "a" / "x.bmp", image)
    saved(folder / "a" / "turned.tif", image, exif=exif)
    saved(folder / "a" / "ink.tiff", image.convert("CMYK"))
    saved(folder / "b" / "grey.gif", image.convert("L"))
    plain = pack(str(class_folders(folder, {"c": 1, "d": 1})), tmp_path / "plain")
    assert plain.classes == ("c", "d")
    assert "BMP, GIF, TIFF files can be converted: give --convert\n" in str(plain)
    report = pack(str(folder), tmp_path / "out", convert=True)
    assert report.classes == ("a", "b", "c", "d")
    assert report.left_out == ()
    pixels = pixels_by_file(tmp_path / "out")
    assert np.array_equal(pixels["a/x.bmp"], picture())
    assert np.array_equal(pixels["a/turned.tif"], np.rot90(picture(), -1))
    assert np.array_equal(pixels["b/grey.gif"][:, :, 0], np.asarray(image.convert("L")))
    assert report.fingerprint != plain.fingerprint


def test_what_is_not_one_plain_picture_is_left_out(tmp_path):
    folder = class_folders(tmp_path / "s", {"a": 1, "b": 1})
    frames = [Image.fromarray(picture()), Image.fromarray(picture()[::-1])]
    saved(folder / "a" / "film.gif", frames[0], save_all=True, append_images=frames[1:])
    saved(folder / "a" / "deep.tif", Image.fromarray(picture()[:, :, 0].astype(np.uint16) * 16))
    (folder / "a" / "cut.bmp").write_bytes(b"BM" + bytes(30))
    report = pack(str(folder), tmp_path / "out", convert=True)
    reasons = {one.name: one.reason for one in report.left_out}
    assert reasons["a/film.gif"] == "is a GIF of several pictures: keep the one that is meant"
    assert reasons["a/deep.tif"].startswith("is a TIFF of other than 8 bits a channel: choose")
    assert reasons["a/cut.bmp"].startswith("is a BMP that cannot be decoded: ")


def test_photographs_of_telephones_name_their_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("a/1.HEIC", "b/2.jpg"):
        (tmp_path / "s" / name).parent.mkdir(parents=True)
        (tmp_path / "s" / name).write_bytes(HEIC)
    with pytest.raises(
        DataError, match=r"a/1.HEIC is a HEIC file, .*; HEIC files can be converted"
    ):
        pack(str(tmp_path / "s"), tmp_path / "out")
    with pytest.raises(DataError, match=r"pillow-heif, .* there: pip install 'rtl_dist\[heic\]'"):
        pack(str(tmp_path / "s"), tmp_path / "out", convert=True)


def test_photographs_of_telephones_are_converted(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    for i, name in enumerate("ab"):
        file = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(picture(64, 48)[:, :: 1 - 2 * i])).save(file)
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "IMG_0.HEIC").write_bytes(file.getvalue())
    pack(str(tmp_path / "s"), tmp_path / "out", convert=True)
    pixels = pixels_by_file(tmp_path / "out")["a/IMG_0.HEIC"]
    assert np.abs(pixels.astype(int) - picture(64, 48)).mean() < 6
