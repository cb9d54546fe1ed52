"""Paths that are URLs, and what a URL must not hold."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

Redirects = Literal["origin", "any"]  # where they may lead: to the same server, or to others too
_SECRET = re.compile(r"(?i)sig|token|secret|password|credential|key|auth")


def is_url(path: str) -> bool:
    return "://" in path


def join_url(root: str, path: str) -> str:
    return f"{root.rstrip('/')}/{path}"


def secret_in(url: str) -> str | None:
    """Why a URL cannot be written into files for everyone to read; None if it can."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"what follows :// is no address ({error})"
    query = parse_qsl(parts.query, keep_blank_values=True)
    if "@" not in parts.netloc and not any(_SECRET.search(name) for name, _ in query):
        return None
    shown = url.split("?")[0].rsplit("@", 1)[-1]
    return (
        f"the URL of {shown} holds a password or token, which files of the run and the data set"
        " would show: give the plain URL, and credentials as the storage's own tools expect them"
        " (~/.netrc, ~/.aws, environment)"
    )
