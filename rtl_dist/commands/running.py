"""How a command starts and ends: its imports, its last word on the terminal, its exit code."""

from __future__ import annotations

import atexit
import gc
import io
import json
import os
import signal
import sys
import threading
import traceback
from codecs import register_error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TextIO, cast

from rtl_dist.core.errors import RtlDistError, StopRequested, UserError
from rtl_dist.core.open_files import is_too_many, raise_limit, too_many_open
from rtl_dist.core.text import shorten, shown, shown_lines
from rtl_dist.distributed.stopping import STOP_SIGNALS

_OUR_FAULT = 1
_AS_IN_JSON = "rtl_dist.as_in_json"
_NO_MEMORY = (
    "the memory that this process may use is not enough: give it more (ulimit -v, the job's or"
    " container's limit), or ask for less (data.workers, batch.micro); --debug shows where"
)
_READ_AT_IMPORT = ("ACCELERATE_", "TORCH", "PYTORCH_", "HF_")  # by libraries, which may raise


class _Interrupted(BaseException):
    """A request to stop. Not a KeyboardInterrupt: one that passes through an ``exec``, as of a
    dataclass that is being made, has Python end by SIGINT whatever ``sys.exit`` says then."""


class _NotLoaded(Exception):
    """A library that a command needs fails as it is imported; says why."""


@contextmanager
def first_imports() -> Iterator[None]:
    """Around a command's imports of torch and its like, which make a million objects that all stay.

    Looking through them for garbage, again and again as they come and later in every full
    collection and every loader worker, took a fifth of a start.

    Raises:
        _NotLoaded: one of them fails, for what the environment says (``TORCH_LOGS``,
            ``ACCELERATE_LOG_LEVEL``) or for how it is installed.
    """
    if "torch" in sys.modules or not gc.isenabled():  # more than imports could be frozen
        yield
        return
    gc.disable()
    try:
        yield
    except Exception as error:
        raise _NotLoaded(_why_not_loaded(error)) from error
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or triton would complain of what is never freed


def _why_not_loaded(error: Exception) -> str:
    variables = sorted(name for name in os.environ if name.startswith(_READ_AT_IMPORT))
    seen = f" ({shorten(variables)})" if variables else ""
    lines = str(error).strip().split("\n")
    return (
        f"torch and what builds on it cannot be loaded: {type(error).__name__}: {lines[0]}; correct"
        f" the variables of the environment{seen} or the installation; --debug shows where"
    )


def leave(code: int) -> NoReturn:
    """Ends the program. Its code is decided: to be asked to stop while it is taken down, which
    takes torch a while, must not change it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def run_command(command: Callable[[], str | None], *, debug: bool) -> int:
    """Runs a command and returns its exit code; its result, or the error, is its last line."""
    asked_to_stop: list[int] = []
    _open_what_is_closed()
    raise_limit()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal need not have every letter
        register_error(_AS_IN_JSON, _escaped)
        sys.stdout.reconfigure(errors=_AS_IN_JSON)
    try:
        with _interrupted_by_requests(asked_to_stop):
            result = command()
    except RtlDistError as error:
        if debug:
            traceback.print_exc()
        is_one_of_many = os.environ.get("RANK", "0") != "0"  # and all of them say the same
        if not (error.was_told or (isinstance(error, StopRequested) and is_one_of_many)):
            _say(_as_said(error))
        return error.exit_code
    except (KeyboardInterrupt, _Interrupted):
        return _say_interrupted()
    except Exception as error:  # noqa: BLE001 - the one place where our own faults end
        if asked_to_stop and not debug:  # a library made another error of the interrupt
            return _say_interrupted()
        if not debug and (told := _not_our_fault(error)):
            _say(f"rtl-dist: {shown(told[0])}")
            return told[1]
        traceback.print_exc()
        _say("rtl-dist: this is a fault of rtl_dist itself; please report it")
        return _OUR_FAULT
    if result:
        _tell(result)
    return 0


def _open_what_is_closed() -> None:
    """A standard stream that the caller closed (``2>&-``) leads nowhere: else the next file opened
    has its number, and what a library prints would be written into a checkpoint."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, _stream(number, mode))


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What a terminal has no letters for, escaped as JSON does it: what is printed may be JSON."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _stream(number: int, mode: str) -> TextIO:
    return cast(
        TextIO,
        open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False),
    )


def _tell(result: str) -> None:
    """Prints what a command found. It is done all the same where nobody can be told."""
    try:
        sys.stdout.write(f"{shown_lines(result)}\n")
        sys.stdout.flush()
    except OSError as error:  # a full disk, a pipe whose reader has gone
        # or Python tries again as it ends, and leaves with 120
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end
        if not isinstance(error, BrokenPipeError):
            _say(f"rtl-dist: done, but the result cannot be printed: {error.strerror}")


def _say(line: str) -> None:
    with suppress(OSError):  # the exit code is told all the same
        sys.stderr.write(f"{line}\n")


def _not_our_fault(error: Exception) -> tuple[str, int] | None:
    """(what to say, exit code) where the machine or environment ends a command."""
    if isinstance(error, _NotLoaded):
        return str(error), UserError.exit_code
    if isinstance(error, MemoryError):
        return _NO_MEMORY, RtlDistError.exit_code
    if is_too_many(error):
        where = getattr(error, "filename", None) or "another file"
        return str(too_many_open(where)), RtlDistError.exit_code
    return None


def _as_said(error: RtlDistError) -> str:
    """Names from elsewhere are in it, and what they hold must not pass for a line of ours: so all
    lines but the first are indented."""
    first, *others = shown_lines(str(error)).split("\n")
    indented = (line if line.startswith("  ") else f"  {line}" for line in others)
    return "\n".join((f"rtl-dist: {first}", *indented))


@contextmanager
def _interrupted_by_requests(asked: list[int]) -> Iterator[None]:
    """Within the block a signal that asks to stop interrupts the command, as Ctrl-C does, and is
    noted. A command that saves itself first listens by itself (``StopRequests``)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise _Interrupted

    usual = (signal.SIG_DFL, signal.default_int_handler)
    old = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    mine = [number for number, handler in old.items() if handler in usual]
    if threading.current_thread() is not threading.main_thread():
        mine = []  # signals are the main thread's alone
    for number in mine:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, old[number])


def _say_interrupted() -> int:
    _say("rtl-dist: interrupted; start the same command again")
    return StopRequested.exit_code
