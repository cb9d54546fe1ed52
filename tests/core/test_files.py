"""Files read where they may be missing or damaged."""

import pytest

from rtl_dist.core.files import read_object, write_json


def test_an_object_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert read_object(tmp_path / "a.json") == {"ü": [1, None]}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[1]", b'"text"', b"\xff{}", b"[" * 10**5]
)
def test_what_is_no_object_is_empty(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_object(tmp_path / "a.json") == {}


def test_what_is_not_there_is_empty(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "a.json", tmp_path, tmp_path / "file" / "a.json"):
        assert read_object(path) == {}
