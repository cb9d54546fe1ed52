"""What makes a pack that was killed at any moment resumable: the work folder ``OUT/.pack``.

It holds ``plan.json`` (the plan's digest and every file the pack may write), a sidecar for each
finished shard, files not yet finished, and a lock. A file counts only once it was written whole,
fsynced and renamed. The folder disappears when the data set is complete, after ``dataset.json``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import read_object, sha256_of
from rtl_dist.data.format.description import DESCRIPTION, PACKER_KEY
from rtl_dist.prepare.publish import published_files
from rtl_dist.prepare.work_folder import LOCK_FILE, PLAN_FILE, WORK_FOLDER, publishing


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What is known of a finished shard: its sidecar, and what the index is made from."""

    path: str
    """Relative to the data set."""
    bytes: int
    """The tar's size."""
    sha256: str
    """Of the tar, in hexadecimal."""
    rows: list[tuple[int, int, int, int]]
    """(the item's position in the shard's plan, offset, size in bytes, crc32) of each sample's
    image, in the order of the tar."""
    left_out: list[tuple[str, str]]
    """(name, reason) of each item that is not in it."""
    doubtful: list[tuple[str, str]]
    """(name, ``doubt_of``) of each item that is in it with a doubt."""


def check_unfinished(out: Path) -> None:
    """Raises UserError: OUT holds a finished data set, and no start to go on from."""
    if (out / DESCRIPTION).exists() and _read_state(out / WORK_FOLDER) is None:
        raise _already_finished(out)


def claim(out: Path, digest: str, files: list[str], overwrite: bool) -> None:
    """Makes OUT ready for the plan with this digest: keeps its finished shards, clears any others.

    Raises:
        UserError: OUT holds a finished data set, or files that no pack of ours wrote.
    """
    work = out / WORK_FOLDER
    state = _read_state(work)
    if state is not None and state["digest"] == digest:
        _remove_unfinished(work)
        return
    if (out / DESCRIPTION).exists():
        if not overwrite:
            raise _already_finished(out)
        # From here on the old files are the remains of a plan that is not ours, so that a kill
        # while they are being removed leaves what the next start can clear.
        state = {"digest": "", "files": _files_of(out) + (state["files"] if state else [])}
        _write_state(work, state["digest"], state["files"])
    if state is None:
        strange = [name for name in os.listdir(out) if not name.startswith(".")]
        # no pack got as far as to write there, and a finished one removes the folder
        begun = re.compile(rf"{LOCK_FILE}|\.{re.escape(PLAN_FILE)}\.\d+\.tmp")
        strange += [f"{WORK_FOLDER}/{n}" for n in os.listdir(work) if not begun.fullmatch(n)]
        if strange:
            raise UserError(
                f"{out} is not empty (it holds {min(strange)}) and holds no data set: choose"
                " another OUT"
            )
    else:
        _clear(out, state["files"])
    _write_state(work, digest, files)


def release(out: Path) -> None:
    """Removes the work folder: the data set is complete."""
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)


def read_record(out: Path, path: str) -> ShardRecord:
    """A shard's sidecar. Raises OSError, ValueError, KeyError or TypeError: missing or damaged."""
    content = json.loads(_sidecar(out, path).read_text(encoding="utf-8"))
    rows = [tuple(row) for row in content["rows"]]
    left_out = [tuple(file) for file in content["left_out"]]
    doubtful = [tuple(file) for file in content["doubtful"]]
    return ShardRecord(**{**content, "rows": rows, "left_out": left_out, "doubtful": doubtful})


def is_finished(out: Path, path: str) -> bool:
    """Whether a shard is already there and whole: its bytes are hashed again."""
    try:
        return sha256_of(out / path) == read_record(out, path).sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False


def record_shard(out: Path, record: ShardRecord) -> None:
    """Writes the sidecar. To be called before the shard gets its final name."""
    with publishing(out, _sidecar(out, record.path)) as file:
        file.write(json.dumps(asdict(record)).encode())


def _already_finished(out: Path) -> UserError:
    return UserError(
        f"{out} already holds a data set: choose another OUT, or replace it with --overwrite"
    )


def _sidecar(out: Path, path: str) -> Path:
    return out / WORK_FOLDER / f"{Path(path).name}.json"


def _read_state(work: Path) -> dict | None:
    state = read_object(work / PLAN_FILE)
    try:
        return {"digest": state["digest"], "files": list(state["files"])}
    except (KeyError, TypeError):
        return None  # no pack got as far as to write it, so nothing of a pack is in OUT


def _write_state(work: Path, digest: str, files: list[str]) -> None:
    with publishing(work.parent, work / PLAN_FILE) as file:
        file.write(json.dumps({"digest": digest, "files": files}).encode())


def _files_of(out: Path) -> list[str]:
    """The files of the data set in OUT, the description first. Raises UserError: it is foreign."""
    description = read_object(out / DESCRIPTION)
    try:
        ours = PACKER_KEY in description
        splits = description["splits"]
        shards = [shard["path"] for split in splits.values() for shard in split["shards"]]
    except (KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(
            f"the data set in {out} was not written by `rtl-dist pack`, so it is not replaced:"
            " choose another OUT, or remove the folder yourself"
        )
    return [*published_files(splits), *shards]


def _clear(out: Path, files: list[str]) -> None:
    """Removes these files, the folders they leave empty, and the sidecars."""
    for name in files:
        if not _is_inside(name):
            continue
        (out / name).unlink(missing_ok=True)
        if (out / name).parent != out:
            with contextlib.suppress(OSError):  # not empty, or gone already
                (out / name).parent.rmdir()
    work = out / WORK_FOLDER
    for path in work.iterdir():
        if path.name not in (LOCK_FILE, PLAN_FILE):
            path.unlink()


def _is_inside(name: str) -> bool:
    """Whether a path stays in its folder: an edited dataset.json must not reach outside."""
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _remove_unfinished(work: Path) -> None:
    for path in work.glob("*.tmp"):
        path.unlink()
