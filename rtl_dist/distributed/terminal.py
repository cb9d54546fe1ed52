"""What a job says on stderr while it runs: lines with their time, and how far long work has come.

On a terminal that is a bar, above which lines are written, wrapped at its width; elsewhere, as in a
scheduler's log, a line now and then.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from rtl_dist.core.text import duration, shown_lines

LOG = logging.getLogger("rtl_dist")
FIRST_S, MOST_S = 10.0, 300.0  # between lines of progress: twice as long each time
_INDENT = " " * len("00:00:00 ")


def _lock_threads_alone() -> None:
    """tqdm's own lock is shared with forks, and a loader worker that is killed while it writes a
    line would never give it back."""
    tqdm.set_lock(threading.RLock())


_lock_threads_alone()
os.register_at_fork(after_in_child=_lock_threads_alone)


class Progress(Protocol):
    """How far some work has come; use as a context manager."""

    def update(self, n: int = 1, /) -> Any:
        """So many units more are done."""

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> Any: ...


class ProgressLines:
    """Says now and then how far some work has come, at which rate, and how long it will take."""

    def __init__(
        self,
        *,
        total: int,
        what: str,
        unit: str,
        done: int = 0,
        images: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            total, what, unit, done, images: see ``progress``.
            clock: seconds.
        """
        self._total, self._what, self._unit, self._images = total, what, unit, images
        self._first = self._done = done
        self._clock, self._pause_s = clock, FIRST_S
        self._began_at = clock()
        self._next_at = self._began_at + FIRST_S

    def update(self, n: int = 1, /) -> None:
        self._done += n
        now = self._clock()
        if now < self._next_at or self._done >= self._total:
            return
        self._pause_s = min(2 * self._pause_s, MOST_S)
        self._next_at = now + self._pause_s
        rate = (self._done - self._first) / (now - self._began_at)
        told = f"{rate:,.3g} {self._unit}/s"
        if self._images:
            told = f"{rate * self._images:,.0f} images/s"
        LOG.info(
            "%s: %s %s of %s (%.0f %%), %s, about %s left",
            self._what,
            self._unit,
            f"{self._done:,}",
            f"{self._total:,}",
            100 * self._done / self._total,
            told,
            duration((self._total - self._done) / rate),
        )

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        return


def progress(
    *, total: int, what: str, unit: str, done: int = 0, images: int = 0, silent: bool = False
) -> Progress:
    """A bar on a terminal, else lines.

    Args:
        total: when all is done, in ``unit``.
        what: what is done.
        unit: of what is counted, such as ``step``.
        done: where it starts, of a job that goes on.
        images: in a unit, if the rate is to be told in images.
        silent: neither bar nor lines.
    """
    if silent or sys.stderr.isatty() or _is_notebook():
        bar: Progress = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            disable=silent,
            leave=False,
            dynamic_ncols=True,
            # a notebook's page has no lines to go up to: bars take turns on one
            position=0 if _is_notebook() else None,
        )
        return bar
    return ProgressLines(total=total, what=what, unit=unit, done=done, images=images)


def _is_notebook() -> bool:
    """Whether stderr is a notebook's, on which a bar can be drawn as on a terminal."""
    return type(sys.stderr).__module__.partition(".")[0] == "ipykernel"


class _Shown(logging.Formatter):
    """Messages name what is from elsewhere, and a terminal would obey what that holds."""

    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record))


class _LinesAboveBars(logging.StreamHandler[Any]):
    """Takes bars off the terminal while it writes, and puts them back below."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(_wrapped(self.format(record), self.stream), file=self.stream)
            self.flush()
        except Exception:  # noqa: BLE001 - as every handler does
            self.handleError(record)


def _wrapped(line: str, stream: Any) -> str:
    if not stream.isatty():
        return line
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return line
    if len(line) <= width or width <= 2 * len(_INDENT):
        return line
    return textwrap.fill(
        line,
        width,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def configure_logging(*, is_main: bool) -> None:
    """Sends this package's messages to stderr, a line each with its time: all of rank 0's, and only
    the warnings of the other ranks."""
    LOG.handlers.clear()
    handler = _LinesAboveBars(sys.stderr)
    handler.setFormatter(_Shown("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO if is_main else logging.WARNING)
    LOG.propagate = False
