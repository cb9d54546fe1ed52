"""``dataset.json``: what a data set says of itself, read and checked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from rtl_dist.core.errors import DataError
from rtl_dist.core.files import is_no_file
from rtl_dist.core.tasks import Task
from rtl_dist.core.text import command, is_showable
from rtl_dist.data.format.split import DatasetPlace
from rtl_dist.data.storage.remote import read_url

FORMAT = "rtl_dist/1"
DESCRIPTION = "dataset.json"
PACKER_KEY, INDEXER_KEY = "packer", "indexer"  # in it: which command made it, and its settings

_MOST_BYTES = 100_000_000  # 10^5 shards take 20 million


def read_description(place: DatasetPlace) -> dict[str, Any]:
    """What stands there, its splits not yet checked.

    Raises:
        DataError: there is none, or it is damaged, edited or of another format.
        RemoteError: the place cannot be reached.
    """
    where = place.path_of(DESCRIPTION)
    if not place.is_remote and is_no_file(Path(where)):
        raise DataError(f"{where} is not a plain file; pack or index again")
    try:
        content = _content(place, where)
        description = json.loads(content)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no data set at {place.where}: {_how_to_make(place)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {where}: {error}; pack again") from error
    try:
        if description["format"] != FORMAT:
            raise DataError(
                f"{where} is of format {description['format']!r}; this version reads"
                f" {FORMAT!r}: pack again"
            )
        if description["fingerprint"] != fingerprint_of(description):
            raise DataError(
                f"{where} does not match its own fingerprint: it was edited or damaged; pack again"
            )
        if description["task"] not in list(Task):
            raise DataError(f"{where} has an unknown task {description['task']!r}; pack again")
        if not isinstance(description["splits"], dict):
            raise TypeError("a table of splits")
        for name in (*description["classes"], *description["splits"]):
            if not is_showable(str(name)):  # it would be printed, and might say what we say
                raise DataError(
                    f"{where} names a class or split {str(name)!r}, which holds characters that"
                    " cannot be shown: rename it and pack or index again"
                )
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} lacks {error}; pack again") from error
    return dict(description)


def _content(place: DatasetPlace, where: str) -> bytes:
    if place.is_remote:
        return read_url(where, _MOST_BYTES, place.redirects)
    if os.stat(where).st_size > _MOST_BYTES:
        raise ValueError(f"it is no file of up to {_MOST_BYTES:,} bytes")
    return Path(where).read_bytes()


def fingerprint_of(description: dict[str, Any]) -> str:
    """sha256 over the whole description but the fingerprint itself.

    The description holds each shard's sha256 and each index file's, so equal fingerprints mean
    equal classes, samples, labels and bytes.
    """
    content = {key: value for key, value in description.items() if key != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _how_to_make(place: DatasetPlace) -> str:
    if place.is_remote:
        return f"{DESCRIPTION} is missing; correct the URL, or copy there what was packed"
    if Path(place.where).is_file():
        return f"it is a file; give the folder that {DESCRIPTION} is in"
    if not Path(place.where).exists():
        make = command("pack", "SOURCE", place.where)
        return f"there is no such folder; correct the path, or make it with `{make}`"
    make = command("pack", place.where, "OUT")
    return (
        f"{DESCRIPTION} is missing; if images are there, make one of them with `{make}`, of shards"
        " with `rtl-dist index`"
    )
