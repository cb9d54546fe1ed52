"""Requests to stop: signals, a time limit, a launcher that is gone.

Where there is something to save a request is only noted, and the ranks act on it together. What
must not wait for them, a request before that or a second one, ends the process at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

from rtl_dist.core.errors import StopRequested

STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
# Schedulers repeat a polite request, and launchers pass on what their processes got from the
# terminal themselves: neither is an impatient user.
_POLITE = {getattr(signal, "SIGUSR1", None)}
_SAME_REQUEST_S = 1.0
_END = b"\0"  # no signal's number


class StopRequests:
    """Use as a context manager in the main thread; one at a time in a process.

    A request ends the process at once unless it comes within ``deferred``; and there too, if it is
    a SIGINT or SIGTERM more than a second after the first request.
    """

    def __init__(self, *, time_limit_s: float | None = None) -> None:
        """time_limit_s: from now; None: no limit."""
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._launcher = os.getppid() if was_launched() else None
        self._signal: str | None = None
        self._noted_at: float | None = None
        self._is_deferred = False
        self._old_handlers: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, or None. A launcher that is gone counts: accelerate's ends at a SIGTERM
        without passing it on."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "run.time_limit"
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the end of its launcher"
        return None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first request is only noted: look at ``reason`` and act on it."""
        self._is_deferred = True
        try:
            yield
        finally:
            # of one that was noted the thread may learn only now
            self._is_deferred = self._signal is not None

    def __enter__(self) -> StopRequests:
        # Python's own handlers wait for the main thread, which may be waiting for another rank; the
        # number of a signal that came is written here whatever that does.
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup a terminal that closes is no request
            self._old_handlers[number] = signal.signal(number, self._note)
        self._thread = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._thread.start()
        os.register_at_fork(after_in_child=_forget_wakeup)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._writing.send(_END)
        self._thread.join()
        self._writing.close()
        self._reading.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # only a flag: no I/O and no collective inside a handler
        self._signal = self._signal or signal.Signals(number).name

    def _listen(self) -> None:
        while True:
            for number in self._reading.recv(64):
                if number == _END[0]:
                    return
                if number in STOP_SIGNALS:
                    self._act_on(signal.Signals(number))

    def _act_on(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self._is_deferred:
            _leave(number.name)
        if self._noted_at is None:
            self._noted_at = now
            if os.environ.get("RANK", "0") == "0":
                _say(f"{number.name}: saving as soon as the step allows; again to leave at once")
        elif number not in _POLITE and now - self._noted_at > _SAME_REQUEST_S:
            _leave(number.name)


def was_launched() -> bool:
    """Whether accelerate or torchrun started this process."""
    return any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))


def _leave(name: str) -> NoReturn:
    """Ends this process now: whatever is on the disk is whole at any moment."""
    for worker in multiprocessing.active_children():
        worker.kill()
    _say(f"left at once ({name}); start the same command again")
    os._exit(StopRequested.exit_code)


def _say(what: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"rtl-dist: {what}\n".encode())


def _forget_wakeup() -> None:
    """A forked child's signals are its own."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
