"""Checkpoints written beside training, which waits only while tensors are copied to the host."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from rtl_dist.core.errors import RtlDistError, disk_refused
from rtl_dist.records.checkpoint import Snapshot, save_checkpoint


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread of its own; of rank 0."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def failure(self) -> Exception | None:
        """Why the last checkpoint was not written, once that is known."""
        return self._failure

    def write(
        self, run: Path, snapshot: Snapshot, *, keep: int, before: Callable[[], None]
    ) -> None:
        """Copies the snapshot and returns; waits for the checkpoint before, if there is one.

        Args:
            before: makes durable what the checkpoint refers to; called in the writing thread.

        Raises:
            RtlDistError: the checkpoint before could not be written.
        """
        self.wait()
        copied = snapshot.on_host()

        def save() -> None:
            try:
                before()
                save_checkpoint(run, copied, keep=keep)
            except RtlDistError as error:
                self._failure = error
            except OSError as error:
                self._failure = disk_refused(error, error.filename or run)
            except Exception as error:  # noqa: BLE001 - raised again by all ranks
                self._failure = RuntimeError(f"a checkpoint could not be written: {error!r}")

        self._thread = threading.Thread(target=save, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns once what was asked for is on the disk.

        Raises:
            RtlDistError: it could not be written.
        """
        self.join()
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        """Waits for the thread, whatever it met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
