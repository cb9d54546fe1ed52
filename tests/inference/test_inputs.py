"""INPUT, whatever it is: which images it means, in which order, and what is said of the rest."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from remote_helpers import serving

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.inference.finding import Finder
from rtl_dist.inference.inputs import InputMicrobatches
from rtl_dist.inference.listing import Listing, ListingWriter
from rtl_dist.inference.written import Written
from rtl_dist.prepare.conversion import converted

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)


def encoded(kind="PNG", shade=0):
    file = io.BytesIO()
    Image.fromarray(PIXELS // 2 + np.uint8(shade)).save(file, kind)
    return file.getvalue()


class Found:
    """What the words mean."""

    def __init__(self, tmp_path, *words, **options):
        self.work = tmp_path / "o.csv.part"
        self.work.mkdir(exist_ok=True)
        with ListingWriter(self.work) as listing:
            self.notes = Finder(listing, self.work, **options).find([str(word) for word in words])
        listed = Listing(self.work, "origin")
        self.names = [listed.name(number) for number in range(len(listed))]
        self.contents = list(listed.read(range(len(listed))))
        self.fingerprint = listed.fingerprint
        listed.close()

    @property
    def reasons(self):
        return {
            name: str(content)
            for name, content in zip(self.names, self.contents, strict=True)
            if isinstance(content, DataError)
        }


@pytest.fixture
def photos(tmp_path):
    """Images on three levels, and what lies beside images."""
    folder = tmp_path / "photos"
    for number, name in enumerate(("z.png", "a.PNG", "b/2.png", "b/10.png", "a/c/1.png", "noname")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(shade=number))
    (folder / "notes.txt").write_text("hello")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "Thumbs.db").write_bytes(b"")
    return folder


ORDER = ["a.PNG", "noname", "z.png", "a/c/1.png", "b/10.png", "b/2.png"]


def test_a_folder_is_all_below_it_in_a_stable_order(tmp_path, photos):
    os.symlink(photos, photos / "b" / "again")
    found = Found(tmp_path, photos)
    assert found.names == [f"{photos}/{name}" for name in ORDER]
    assert found.contents == [(photos / name).read_bytes() for name in ORDER]
    assert found.notes == [
        f"passed over: {photos}/b/again is a link to a folder above itself",
        f"passed over, as no images by their names: {photos}/notes.txt",
    ]


def test_patterns_files_and_folders_come_as_they_are_given(tmp_path, photos):
    found = Found(tmp_path, photos / "z.png", photos / "b", photos / "*.PNG", photos / "z.png")
    names = ("z.png", "b/10.png", "b/2.png", "a.PNG", "z.png")
    assert found.names == [f"{photos}/{name}" for name in names]
    deep = Found(tmp_path, photos / "**" / "*")  # folders fit too, and what is in them does
    assert sorted(deep.names) == sorted(f"{photos}/{name}" for name in ORDER)
    assert deep.notes[0].endswith(f": {photos}/Thumbs.db, {photos}/notes.txt")
    assert Found(tmp_path, photos / "b" / "{2,10}.png").names == [
        f"{photos}/b/2.png", f"{photos}/b/10.png",
    ]  # fmt: skip
    (photos / "[x].png").write_bytes(encoded())  # no pattern, but a name
    assert Found(tmp_path, photos / "[x].png").names == [f"{photos}/[x].png"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_a_list_on_stdin(tmp_path, photos, end):
    names = [f"{photos}/z.png", f"{photos}/gone.png", f"{photos}/b", f"{photos}/z.png"]
    content = end.join(map(os.fsencode, names)) + end
    found = Found(tmp_path, "-", stdin=io.BytesIO(content))
    listed = [names[0], names[1], f"{photos}/b/10.png", f"{photos}/b/2.png", names[0]]
    assert found.names == listed
    assert found.reasons == {names[1]: "cannot be read: No such file or directory"}
    with pytest.raises(DataError, match="the list on stdin names nothing: there is nothing to"):
        Found(tmp_path, "-", stdin=io.BytesIO(b"\n"))


def test_a_list_that_windows_wrote(tmp_path, photos):
    name = f"{photos}/z.png"
    assert Found(tmp_path, "-", stdin=io.BytesIO(name.encode("utf-8-sig"))).names == [name]
    with pytest.raises(UserError, match="the list on stdin is UTF-16: write it in UTF-8"):
        Found(tmp_path, "-", stdin=io.BytesIO(name.encode("utf-16")))


def test_what_is_written_is_no_input(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(photos)
    before = Found(tmp_path, ".").names
    (photos / "b" / "grid.png").write_bytes(encoded())
    (photos / "maps").mkdir()
    (photos / "maps" / "00000000-a.png").write_bytes(encoded())
    written = Written(
        photos / "o.csv.part", out=photos / "o.csv", grid=Path("b/grid.png"), explain=Path("maps")
    )
    assert Found(tmp_path, ".", written=written).names == before
    assert Found(tmp_path, "b/*.png", written=written).names == ["b/10.png", "b/2.png"]
    listed = io.BytesIO(b"./b/grid.png\n./z.png\n")
    assert Found(tmp_path, "-", stdin=listed, written=written).names == ["./z.png"]
    with pytest.raises(
        UserError, match=r"--grid: b/grid\.png is one of the inputs, which it would"
    ):
        Found(tmp_path, "b/grid.png", written=written)


def test_a_name_that_is_no_utf_8_is_found(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as file:
        file.write(encoded())
    found = Found(tmp_path, "-", stdin=io.BytesIO(name))
    assert found.names == [os.fsdecode(name)]
    assert found.contents == [encoded()]


def test_a_table_names_files_from_where_it_lies(tmp_path, photos):
    table = photos / "list.csv"
    table.write_text("sep=;\nn;image;x\n1;b/2.png;0\n2;B\\10.PNG;0\n3;;0\n4;gone.png;0\n")
    found = Found(tmp_path, table)
    assert found.names == ["b/2.png", "B\\10.PNG", f"{table} line 5", "gone.png"]
    assert found.contents[:2] == [(photos / f"b/{n}.png").read_bytes() for n in (2, 10)]
    assert list(found.reasons) == found.names[2:]
    assert found.reasons[f"{table} line 5"] == "has nothing in column `image`"
    assert found.reasons["gone.png"].startswith(f"is no file in {photos}")
    assert found.notes[-1] == "column 'image' of list.csv is taken for the images' files"
    assert Found(tmp_path, table, file_column="image").names == found.names
    with pytest.raises(UserError, match=r"--file-column names 'imag', no column of list\.csv"):
        Found(tmp_path, table, file_column="imag")


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "x/1.png"
        tar.addfile(link)
    return path


def test_a_tar_is_its_images_in_its_order(tmp_path):
    members = {"x/2.png": encoded(), "x/2.cls": b"0", "x/1.png": encoded(shade=9), "x/._1.png": b""}
    tar = tar_of(tmp_path / "s.tar", members)
    found = Found(tmp_path, tar)
    assert found.names == [f"{tar}/{name}" for name in ("x/2.png", "x/1.png", "link.png")]
    assert found.contents[:2] == [members["x/2.png"], members["x/1.png"]]
    assert found.reasons == {f"{tar}/link.png": "is a symbolic link, not a plain file"}
    assert found.notes == [
        f"passed over, as no images by their names: {tar}/x/2.cls, {tar}/x/._1.png"
    ]
    content = tar.read_bytes()
    tar.write_bytes(content[:700])
    with pytest.raises(DataError, match=r"s\.tar is cut short"):
        Found(tmp_path, tar)
    (tmp_path / "s.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError, match=r"s\.tar\.gz is compressed \(gzip\): decompress it$"):
        Found(tmp_path, tmp_path / "s.tar.gz")


def test_urls_are_fetched_and_those_that_fail_have_a_reason(tmp_path, photos):
    tar_of(photos / "s.tar", {"1.png": encoded()})
    with serving(photos) as server:
        urls = [f"{server.url}/{name}" for name in ("z.png", "gone.png", "b/2.png")]
        found = Found(tmp_path, *urls, f"{server.url}/s.tar", f"{server.url}/b/{{2,10}}.png")
        assert found.names[:3] == urls
        assert found.names[3:5] == [f"{server.url}/s.tar/1.png", f"{server.url}/s.tar/link.png"]
        assert found.contents[0] == (photos / "z.png").read_bytes()
        assert found.contents[2] == found.contents[5] == (photos / "b/2.png").read_bytes()
        assert found.contents[3] == encoded()
        assert found.reasons[urls[1]] == "cannot be had: is not there"
        server.forget()
        assert Found(tmp_path, f"{server.url}/s.tar").contents[0] == encoded()  # is there still
        assert not server.gets("/s.tar")
        with pytest.raises(UserError, match="what a web server holds cannot be listed"):
            Found(tmp_path, f"{server.url}/b/")


def test_stores_are_listed(tmp_path, photos):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b/2.png", "b/10.png", "notes.txt"):
        memory.pipe(f"/predict/{name}", (photos / name).read_bytes())
    found = Found(tmp_path, "memory://predict/")
    assert found.names == ["memory:///predict/b/10.png", "memory:///predict/b/2.png"]
    assert found.contents[1] == (photos / "b/2.png").read_bytes()
    assert Found(tmp_path, "memory://predict/b/1*.png").names == ["memory:///predict/b/10.png"]


@pytest.mark.parametrize("change", ["content", "order", "more"])
def test_the_fingerprint_knows_the_inputs(tmp_path, photos, change):
    words = [photos / "z.png", photos / "a.PNG"]
    before = Found(tmp_path, *words).fingerprint
    assert Found(tmp_path, *words).fingerprint == before
    if change == "content":
        os.utime(words[0], ns=(1, 1))
    elif change == "order":
        words.reverse()
    else:
        words.append(words[0])
    assert Found(tmp_path, *words).fingerprint != before


def test_other_formats_are_what_pack_would_make_of_them(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    kinds = {"x.bmp": "BMP", "x.gif": "GIF", "x.tif": "TIFF", "x.heic": "HEIC"}
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(encoded("HEIF" if kind == "HEIC" else kind))
    found = Found(tmp_path, *(tmp_path / name for name in kinds))
    assert found.contents == [
        converted((tmp_path / name).read_bytes(), kind) for name, kind in kinds.items()
    ]
    tar = tar_of(tmp_path / "s.tar", {"x.bmp": encoded("BMP"), "x.png": encoded()})
    with ListingWriter(found.work) as writer:
        Finder(writer, found.work).find([str(tar)])
    transform = EvalTransform(image_size=8, crop_pct=1.0, channels=3)
    listed = Listing(found.work, "origin")
    batch = InputMicrobatches(listed, transform, size=4)[0]
    listed.close()
    assert batch.samples.tolist() == [0, 1, -1]
    assert (batch.inputs[0] == batch.inputs[1]).all()
    assert batch.inputs[0].any()
    assert not batch.inputs[2].any()
    assert batch.bad == ["is a symbolic link, not a plain file"]


def test_many_inputs_are_listed_in_little_memory(tmp_path):
    """Neither the names nor the rows are ever in memory together."""
    import tracemalloc

    lines = (b"%s/%07d.png\n" % (os.fsencode(tmp_path), number) for number in range(10_000))
    work = tmp_path / "work"
    work.mkdir()
    tracemalloc.start()
    with ListingWriter(work) as writer:
        Finder(writer, work, stdin=lines).find(["-"])
    listed = Listing(work, "origin")
    assert listed.name(9_999).endswith("/0009999.png")
    assert len(listed) == 10_000
    listed.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_500_000
