"""The tar writer: readable by others, bytes by content alone."""

import hashlib
import io
import subprocess
import tarfile

import pytest

from rtl_dist.data.format.tar import TarWriter

MEMBERS = [("a.jpg", b"x" * 513), ("a.cls", b"3"), ("b.png", b""), ("b.cls", b"10")]


def written() -> tuple[bytes, list[int], TarWriter]:
    stream = io.BytesIO()
    tar = TarWriter(stream)
    offsets = [tar.add(name, content) for name, content in MEMBERS]
    tar.finish()
    return stream.getvalue(), offsets, tar


def test_python_reads_it():
    content, _, _ = written()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        read = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
        assert read == MEMBERS
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in tar.getmembers()} == {(0, 0, 0, 0o644)}


def test_gnu_tar_reads_it_without_complaint(tmp_path):
    (tmp_path / "x.tar").write_bytes(written()[0])
    listed = subprocess.run(
        ["tar", "tf", str(tmp_path / "x.tar")], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split() == [name for name, _ in MEMBERS]
    assert listed.stderr == ""


def test_offsets_size_and_hash_are_the_files():
    content, offsets, tar = written()
    for offset, (_, expected) in zip(offsets, MEMBERS, strict=True):
        assert content[offset : offset + len(expected)] == expected
    assert tar.num_bytes == len(content)
    assert tar.sha256 == hashlib.sha256(content).hexdigest()
    assert content == written()[0]


@pytest.mark.parametrize("name", ["", "k" * 97 + ".jpg", "é" * 50 + "x"])
def test_names_that_need_an_extension_record_are_refused(name):
    with pytest.raises(ValueError, match="1 to 100 bytes"):
        TarWriter(io.BytesIO()).add(name, b"")
