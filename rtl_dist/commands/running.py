"""How a command starts and ends: its imports, its last word on the terminal, its exit code."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rtl_dist.core.errors import RtlDistError, StopRequested
from rtl_dist.distributed.stopping import STOP_SIGNALS

_OUR_FAULT = 1


@contextmanager
def first_imports() -> Iterator[None]:
    """Around a command's imports of torch and its like, which make a million objects that all stay.

    Looking through them for garbage, again and again as they come and later in every full
    collection and every loader worker, took a fifth of a start.
    """
    if "torch" in sys.modules or not gc.isenabled():  # more than imports could be frozen
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or triton would complain of what is never freed


def leave(code: int) -> NoReturn:
    """Ends the program. Its code is decided: to be asked to stop while it is taken down, which
    takes torch a while, must not change it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def run_command(command: Callable[[], str | None], *, debug: bool) -> int:
    """Runs a command and returns its exit code; its result, or the error, is its last line."""
    try:
        result = command()
    except RtlDistError as error:
        if debug:
            traceback.print_exc()
        is_one_of_many = os.environ.get("RANK", "0") != "0"  # and all of them say the same
        if not (isinstance(error, StopRequested) and is_one_of_many):
            sys.stderr.write(f"rtl-dist: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("rtl-dist: interrupted; start the same command again\n")
        return StopRequested.exit_code
    except Exception:  # noqa: BLE001 - the one place where our own faults end
        traceback.print_exc()
        sys.stderr.write("rtl-dist: this is a fault of rtl_dist itself; please report it\n")
        return _OUR_FAULT
    if result:
        sys.stdout.write(f"{result}\n")
    return 0
