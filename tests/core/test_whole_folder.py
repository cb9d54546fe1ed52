"""Folders that are whole or not there; ``tests/system/test_save_faults.py`` kills both users."""

import errno
import os
import re
from pathlib import Path

import pytest

from rtl_dist.core import whole_folder
from rtl_dist.core.whole_folder import (
    clear_incomplete,
    delete_folder,
    discard_folder,
    incomplete_folder,
    publish_folder,
)


def filled(final: Path, text: str = "new", *, shared: bool = False) -> Path:
    folder = incomplete_folder(final, shared=shared)
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_bears_its_name_only_when_it_is_whole(tmp_path):
    folder = filled(tmp_path / "a")
    assert names_in(tmp_path) == [".incomplete-a"]
    publish_folder(folder, tmp_path / "a")
    assert names_in(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "new"


@pytest.mark.parametrize("replace", [False, True])
def test_one_of_the_same_name_goes_only_where_that_is_meant(tmp_path, replace):
    publish_folder(filled(tmp_path / "a", "old"), tmp_path / "a")
    folder = filled(tmp_path / "a")
    if replace:
        publish_folder(folder, tmp_path / "a", replace=True)
    else:
        with pytest.raises(OSError) as caught:
            publish_folder(folder, tmp_path / "a")
        assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
        discard_folder(folder)
    assert (tmp_path / "a" / "file").read_text() == ("new" if replace else "old")
    assert names_in(tmp_path) == ["a"]


def test_everything_is_flushed_then_renamed_then_the_name_is_flushed(tmp_path, monkeypatch):
    calls = []
    rename = Path.rename
    monkeypatch.setattr(whole_folder, "flush_to_disk", lambda path: calls.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda a, b: calls.append("renamed") or rename(a, b))
    publish_folder(filled(tmp_path / "a"), tmp_path / "a")
    assert calls == ["file", ".incomplete-a", "renamed", tmp_path.name]


def test_what_is_half_deleted_has_lost_its_name(tmp_path, monkeypatch):
    publish_folder(filled(tmp_path / "a"), tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(whole_folder.shutil, "rmtree", lambda *_, **__: None)  # killed before it
        delete_folder(tmp_path / "a")
    filled(tmp_path / "b")
    assert names_in(tmp_path) == [".gone-a", ".incomplete-b"]
    clear_incomplete(tmp_path, re.compile("[ab]"))
    assert names_in(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        delete_folder(tmp_path / "a")


def test_processes_that_share_a_place_do_not_share_what_they_fill(tmp_path):
    one, other = (filled(tmp_path / "a", text, shared=True) for text in "12")
    assert one != other
    assert one.name.startswith(f".incomplete-a.{os.getpid()}.")
    publish_folder(other, tmp_path / "a")
    assert (one / "file").read_text() == "1"
    delete_folder(tmp_path / "a", shared=True)
    assert names_in(tmp_path) == [one.name]
