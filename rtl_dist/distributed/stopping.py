"""Requests to stop: a signal, the time limit of the run, a launcher that is gone.

While there is something to save, a first request is only noted: the ranks agree on it at the next
step, save together and end. A request before training has begun, and a second one from a user who
does not want to wait, end the process at once; files are whole at any moment, so that is safe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, NoReturn

from rtl_dist.core.errors import StopRequested

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
# What comes a second time but is no impatient user: SIGUSR1, which schedulers repeat; and a signal
# soon after the first, as Ctrl-C reaches a process both from the terminal and from its launcher.
_NEVER_IMPATIENT = {getattr(signal, "SIGUSR1", None)}
_SAME_REQUEST_S = 1.0
_END_OF_LISTENING = b"\0"  # no signal has the number 0
_FIRST_REQUEST = "{}: saving as soon as the step allows; again to leave at once"
IS_GUEST: ContextVar[bool] = ContextVar("IS_GUEST", default=False)
"""Whether the process is somebody else's, to whom its end and all signals but Ctrl-C belong."""


class StopRequests:
    """Handles the signals for as long as the block lasts: use as a context manager in the main
    thread, one at a time in a process.

    A signal ends the process at once (exit code 75), unless it comes within ``deferred``. There it
    sets ``reason``, and only a later one, other than SIGUSR1 and more than a second after the
    first, ends the process.

    As a guest (``IS_GUEST``) it hears Ctrl-C alone, and that in the main thread; where it would end
    the process it raises KeyboardInterrupt instead.
    """

    def __init__(self, *, time_limit_s: float | None = None) -> None:
        """
        Args:
            time_limit_s: seconds from now after which ``reason`` asks to stop; None: no limit.
        """
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._launcher = os.getppid() if was_launched() else None
        self._signal: str | None = None
        self._noted_at: float | None = None
        self._is_deferred = False
        self._old_handlers: dict[int, Any] = {}
        self._is_guest = IS_GUEST.get()

    @property
    def reason(self) -> str | None:
        """Why to stop, in words that follow "by"; None: nothing asks for it.

        A launcher that is gone counts as a request: accelerate's ends at a SIGTERM without passing
        it on to its processes.
        """
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "run.time_limit"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the end of its launcher"
        return None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first signal does not end the process: whoever runs in it looks at
        ``reason`` from time to time and stops."""
        self._is_deferred = True
        try:
            yield
        finally:
            # The thread may read a signal only after the block, though it came within it, and must
            # not end the process for it then: the caller is about to stop in order.
            self._is_deferred = self._signal is not None

    def __enter__(self) -> StopRequests:
        if self._is_guest:
            if threading.current_thread() is threading.main_thread():
                self._old_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            return self
        # Python calls a handler (``_note``) only once the main thread is back from what it is in,
        # such as an exchange with a rank that never answers. But at once it writes the signal's
        # number into a socket of ours, from which a thread reads it whatever the main one does.
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup: the user wants the run to outlive the terminal
            self._old_handlers[number] = signal.signal(number, self._note)
        self._thread = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=_forget_socket)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if self._is_guest:
            return
        signal.set_wakeup_fd(self._old_wakeup)
        self._writing.send(_END_OF_LISTENING)
        self._thread.join()
        self._writing.close()
        self._reading.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It runs in the middle of anything, so it only sets a flag: no I/O,
        no exchange with other ranks."""
        self._signal = self._signal or signal.Signals(number).name

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of Ctrl-C in a guest."""
        now = time.monotonic()
        is_again = self._noted_at is not None and now - self._noted_at > _SAME_REQUEST_S
        if not self._is_deferred or is_again:
            raise KeyboardInterrupt
        if self._noted_at is None:
            self._signal, self._noted_at = signal.Signals(number).name, now
            with contextlib.suppress(OSError, RuntimeError):  # it may be within another write
                sys.stderr.write(f"{_FIRST_REQUEST.format(self._signal)}\n")

    def _listen(self) -> None:
        """The thread: acts on each signal whose number arrives."""
        while True:
            for number in self._reading.recv(64):
                if number == _END_OF_LISTENING[0]:
                    return
                if number in STOP_SIGNALS:
                    self._act_on(signal.Signals(number))

    def _act_on(self, number: signal.Signals) -> None:
        """Ends the process, if the signal is one that may; else tells the user that it came."""
        now = time.monotonic()
        if not self._is_deferred:
            _leave(number.name)
        if self._noted_at is None:
            self._noted_at = now
            if os.environ.get("RANK", "0") == "0":
                _say(_FIRST_REQUEST.format(number.name))
        elif number not in _NEVER_IMPATIENT and now - self._noted_at > _SAME_REQUEST_S:
            _leave(number.name)


def was_launched() -> bool:
    """Whether accelerate or torchrun started this process."""
    return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))


def _leave(name: str) -> NoReturn:
    """Ends this process now, with the code that says that it can be resumed.

    Args:
        name: the signal's.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
    _say(f"left at once ({name}); start the same command again")
    os._exit(StopRequested.exit_code)


def _say(what: str) -> None:
    """Writes a line to stderr without its buffer, whose lock the main thread may hold."""
    with contextlib.suppress(OSError):
        over_a_bar = "\r\x1b[K" if os.isatty(2) else ""
        os.write(2, f"{over_a_bar}rtl-dist: {what}\n".encode())


def _forget_socket() -> None:
    """In a forked child, such as a loader's worker: its signals are not written into the socket,
    which it shares with its parent, who would take them for its own."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
