"""Tars of every kind are walked as tarfile and webdataset walk them; damage is never walked past."""

import contextlib
import io
import shutil
import tarfile
import tracemalloc

import pytest
import webdataset as wds
from foreign_shards import by_index, by_webdataset, indexed, plain_tar, write_tar
from pack_images import image_bytes

from rtl_dist.core.errors import DataError
from rtl_dist.data.format.tar_reader import member_names, walk

BLOCK = 512
IMAGES = [image_bytes(seed) for seed in range(6)]
KEYS = [
    "plain",
    "folder/in/folder",
    "d" * 60 + "/" + "n" * 60,  # ustar needs its prefix
    "/".join(["long" * 20] * 4),  # more than 256 bytes: GNU long names, PAX
    "ünïcödé/名前",
    "with space and 'quotes'",
]


def members(keys=KEYS):
    found = []
    for i, key in enumerate(keys):
        found += [(f"{key}.jpg", IMAGES[i]), (f"{key}.cls", str(i % 2))]
    return found


def check_against_the_others(path, out, keys):
    """Our index, webdataset and tarfile agree on keys, their order, and bytes."""
    dataset, report = indexed(path, out=out)
    assert report.left_out == ()
    ours = by_index(dataset)
    theirs = by_webdataset(path)
    assert ours == [(s["__key__"], s["jpg"], s["cls"].decode()) for s in theirs]
    assert [key.removeprefix("./") for key, _, _ in ours] == keys
    with tarfile.open(path) as tar:
        files = [m for m in tar if m.isreg()]
        assert member_names(path) == {m.offset_data: m.name for m in files}
        content = {m.name: tar.extractfile(m).read() for m in files}
    assert [content[f"{key}.jpg"] for key, _, _ in ours] == [image for _, image, _ in ours]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_by_python(tmp_path, form):
    path = write_tar(tmp_path / "x.tar", members(), form)
    check_against_the_others(path, tmp_path / "out", KEYS)


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax"],
        ["--format=ustar"],
        ["--format=v7"],
        ["--format=oldgnu"],
        ["--format=gnu", "-b", "1"],
        ["--format=posix", "-b", "64", "--pax-option=comment=x"],
    ],
    ids=" ".join,
)
def test_tars_by_the_tar_command(tmp_path, options):
    if shutil.which("tar") is None:
        pytest.skip("there is no tar command")
    most = {"--format=v7": 98, "--format=ustar": 130}.get(options[0], 9999)
    keys = [key for key in KEYS if len(f"{key}.jpg".encode()) <= most]
    assert len(keys) >= 4
    files = {
        name: content if isinstance(content, bytes) else content.encode()
        for name, content in members(keys)
    }
    path = plain_tar(tmp_path / "x.tar", files, *options, names=[f"./{name}" for name in files])
    check_against_the_others(path, tmp_path / "out", keys)


def test_a_tar_of_a_folder_with_the_folders_first(tmp_path):
    files = {f"{folder}/{i}.{ext}": content for folder in "ba" for i in range(3)
             for ext, content in (("jpg", IMAGES[i]), ("cls", b"%d" % (i % 2)))}  # fmt: skip
    path = plain_tar(tmp_path / "x.tar", files, "--sort=name", names=["."])
    with tarfile.open(path) as tar:
        assert sum(member.isdir() for member in tar) == 3
    check_against_the_others(path, tmp_path / "out", [f"{f}/{i}" for f in "ab" for i in range(3)])


def test_tars_by_webdatasets_writer(tmp_path):
    with wds.TarWriter(str(tmp_path / "x.tar")) as writer:
        for i, key in enumerate(KEYS):
            writer.write({"__key__": key, "jpg": IMAGES[i], "cls": i % 2})
    check_against_the_others(tmp_path / "x.tar", tmp_path / "out", KEYS)


def test_a_name_that_is_no_utf8(tmp_path):
    named = [("XX.jpg", IMAGES[0]), ("XX.cls", "0"), ("YY.cls", "0")]
    content = write_tar(tmp_path / "a.tar", named, tarfile.USTAR_FORMAT).read_bytes()
    content = content.replace(b"XX.", b"\xff\xfe.").replace(b"YY.", b"\xfd\xfc.")
    path = tmp_path / "x.tar"
    path.write_bytes(rechecked(content))
    dataset, report = indexed(path, out=tmp_path / "out", allow_missing_classes=True)
    assert [key for key, _, _ in by_index(dataset)] == ["\udcff\udcfe"]
    assert r"\udcfd\udcfc in" in str(report)
    assert b"\xfd\xfc,has no image" in (tmp_path / "out/left_out.csv").read_bytes()
    str(report).encode()


def rechecked(content):
    """The tar with the checksums of its headers (which stand where a name is) made right."""
    blocks = bytearray(content)
    for at in range(0, len(blocks), BLOCK):
        if blocks[at + 257 : at + 262] == b"ustar":
            blocks[at + 148 : at + 156] = b" " * 8
            blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + BLOCK])
    return bytes(blocks)


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "x.tar", members(["a", "b", "c", "d"]), tarfile.USTAR_FORMAT)


def offsets(path):
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data) for member in tar}


def damage_found(path, out):
    with pytest.raises(DataError) as caught:
        indexed(path, out=out)
    assert not out.exists()
    assert str(path) in str(caught.value)
    assert "index again" in str(caught.value)
    return str(caught.value)


def test_one_flipped_header_byte_which_webdataset_reads_past(tar, tmp_path):
    assert len(by_webdataset(tar)) == 4
    header, _ = offsets(tar)["c.jpg"]
    content = bytearray(tar.read_bytes())
    for byte in (0, 124, 148, 257, 511):  # name, size, checksum, magic, padding
        damaged = content.copy()
        damaged[header + byte] ^= 0x02
        tar.write_bytes(damaged)
        assert len(by_webdataset(tar)) == 2  # it says nothing
        assert f"has a damaged header at byte {header:,}" in damage_found(tar, tmp_path / "out")
    damaged = content.copy()
    damaged[0] ^= 0x02
    tar.write_bytes(damaged)
    assert "is no tar, or its first header is damaged (byte 0)" in damage_found(
        tar, tmp_path / "out"
    )


def test_cut_at_every_kind_of_place(tar, tmp_path):
    content = tar.read_bytes()
    header, data = offsets(tar)["c.jpg"]
    _, cls_data = offsets(tar)["d.cls"]
    cuts = {
        header: f"ends at byte {header:,} without the mark of an archive's end",
        header + 200: f"is cut short in a header at byte {header:,}",
        data: "is cut short: member 'c.jpg'",
        data + 100: f"member 'c.jpg' at byte {header:,} should reach to byte",
        cls_data + 1: "is cut short: member 'd.cls'",  # the content whole, its padding not
        cls_data + BLOCK: "without the mark of an archive's end",
        cls_data + BLOCK + 100: "is cut short in a header",
        0: "is empty",
        100: "is cut short in a header at byte 0",
    }
    for cut, says in cuts.items():
        tar.write_bytes(content[:cut])
        assert says in damage_found(tar, tmp_path / "out")
    tar.write_bytes(content[:header])
    assert len(by_webdataset(tar)) == 2  # it says nothing
    tar.write_bytes(content[: cls_data + 2 * BLOCK])  # one block of zeros still proves the end
    assert len(indexed(tar, out=tmp_path / "out")[0].split("train").index) == 4


def test_data_after_the_end(tar, tmp_path):
    content = tar.read_bytes()
    tar.write_bytes(content + content)
    assert f"has data at byte {len(content):,}, after the mark" in damage_found(
        tar, tmp_path / "out"
    )
    tar.write_bytes(content + bytes(3 << 20))
    indexed(tar, out=tmp_path / "out")


def test_every_damaged_shard_is_named_at_once(tar, tmp_path):
    tars = [shutil.copy(tar, tmp_path / f"train-{i}.tar") for i in range(4)]
    content = tar.read_bytes()
    tars[1].write_bytes(content[:1000])
    tars[3].write_bytes(b"\x1f\x8b" + content)
    tars[2].chmod(0)
    with pytest.raises(DataError) as caught:
        indexed(*tars, out=tmp_path / "out")
    lines = str(caught.value).splitlines()
    wrong = [tars[1], tars[3]]
    if len(lines) == 4:  # not root, who may read everything
        wrong.insert(1, tars[2])
    assert lines[0].startswith(f"{len(wrong)} of 4 shards cannot be used")
    assert [line.split()[0] for line in lines[1:]] == [str(path) for path in wrong]


@pytest.mark.parametrize("pack", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_whatever_their_name(tmp_path, pack):
    with tarfile.open(tmp_path / "x.tar", f"w:{pack}") as tar:
        tar.addfile(tarfile.TarInfo("a.cls"))
    message = damage_found(tmp_path / "x.tar", tmp_path / "out")
    assert "is compressed" in message
    assert "data.backend=stream" in message
    (tmp_path / "x.tar").rename(tmp_path / f"x.tar.{pack}")
    for given in (tmp_path, tmp_path / f"x.tar.{pack}"):
        with pytest.raises(DataError, match="compressed tars cannot be indexed"):
            indexed(given, out=tmp_path / "out")


def pax_header(claimed, body=b""):
    member = tarfile.TarInfo("PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, claimed
    return member.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % BLOCK)


class CountingFile(io.FileIO):
    most = 0

    def read(self, size=-1):
        type(self).most = max(self.most, size if size >= 0 else 1 << 60)
        return super().read(size)

    def readinto(self, buffer):
        type(self).most = max(self.most, len(buffer))
        return super().readinto(buffer)


@pytest.mark.parametrize("claimed", [1 << 20, 8 << 30, 1 << 62])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_gigabytes_is_not_read(tar, tmp_path, claimed, kind, monkeypatch):
    header = bytearray(pax_header(claimed))
    header[156:157] = kind
    with open(tar, "r+b") as file:
        content = file.read()
        file.seek(0)
        file.write(rechecked(bytes(header)))
        file.write(content)
        file.truncate(9 << 30)  # a hole: the bytes that it claims are there
    monkeypatch.setattr(CountingFile, "most", 0)
    monkeypatch.setattr(
        "builtins.open", lambda path, mode, **_: io.BufferedReader(CountingFile(path, "rb"))
    )
    with pytest.raises(DataError, match="header at byte 0 that claims to be too large"):
        list(walk(tar))
    assert CountingFile.most <= 1 << 20


def test_members_are_not_held_in_memory(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.cls", "") for i in range(2000)])
    tracemalloc.start()
    try:
        assert sum(1 for _ in walk(path)) == 2000
        assert tracemalloc.get_traced_memory()[1] < 1_500_000  # nearly 2 MB, if they were
    finally:
        tracemalloc.stop()


def test_headers_that_make_no_sense(tar, tmp_path):
    whole = tar.read_bytes()
    for record in (
        b"20 size=-99999999999\n",
        b"0 path=x\n",
        b"99 size=9999999999999999999999999999\n",
        b"30 GNU.sparse.map=1,2,x\n",
        b"25 GNU.sparse.size=yy\n",
        b"19 GNU.sparse.major=1\n",
        b"\xff" * 300,
    ):
        tar.write_bytes(pax_header(len(record), record) + whole)
        with contextlib.suppress(DataError):
            assert len(list(walk(tar))) >= 8
    tar.write_bytes(pax_header(0) * 900 + whole)
    with pytest.raises(DataError, match="header"):
        list(walk(tar))
