"""Folders and files as a config, or an option, names them."""

from __future__ import annotations

import os
from typing import Annotated

from rtl_dist.core.text import brief
from rtl_dist.core.urls import is_url

_LONGEST, _LONGEST_NAME = 3800, 255  # bytes; Linux takes 4,095, in which our own names must fit

Place = Annotated[str, "a folder, a file or a URL: ~ at its beginning is the home folder"]


def place_at(text: str) -> str:
    """A path with ``~`` as the home folder, as a shell reads it; a URL as it is.

    Raises:
        ValueError: there is no such home folder, or no file system has such long names.
    """
    if is_url(text) or text.startswith("pipe:"):
        return text
    place = os.path.expanduser(text)
    if place.startswith("~"):
        raise ValueError(
            f"there is no home folder of a user {brief(text[1:].partition('/')[0])}; write the"
            " whole path, or ./~... for a name that begins with ~"
        )
    if "{" in place:  # of many files
        return place
    longest = max(len(os.fsencode(name)) for name in place.split("/"))
    if len(os.fsencode(place)) > _LONGEST or longest > _LONGEST_NAME:
        raise ValueError("is a longer path than file systems take")
    return place
