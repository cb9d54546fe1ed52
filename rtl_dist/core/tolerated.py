"""What a run does not live by, such as pictures: it may fail, and a line says so."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rtl_dist.core.errors import RtlDistError

LOG = logging.getLogger("rtl_dist")


@contextmanager
def tolerated(what: str, *, but: str = "") -> Iterator[None]:
    """Whatever fails in the block ends the block alone, and a line says so.

    Args:
        what: could not be done, such as ``loss.png could not be drawn``.
        but: what holds nevertheless, or how to try it again.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a bug in it, too, must not cost a finished run
        LOG.warning("%s (%s)%s", what, _in_a_line(error), f"; {but}" if but else "")


def _in_a_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    said = " ".join(str(error).split())
    if isinstance(error, RtlDistError):
        return said
    frames = traceback.extract_tb(error.__traceback__)
    place = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {said[:200]}{place}"
