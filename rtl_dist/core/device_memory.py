"""A device's memory that does not hold what is asked: how that is known, and work in parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

import torch

from rtl_dist.core.errors import RtlDistError

LOG = logging.getLogger("rtl_dist")
# What CUDA and its libraries, whose memory is not torch's, say of it in errors without a class of
# their own: "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", ...
_WORDS = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_shortage(error: BaseException | None) -> bool:
    """Whether it says that the device's memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


class Attempt(AbstractContextManager["Attempt"]):
    """A block that may fail for want of the device's memory: ``ran_out`` says afterwards whether it
    did. By then all is free that the error held on to."""

    def __init__(self) -> None:
        self.ran_out = False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.ran_out = is_shortage(error)
        return self.ran_out


class InParts:
    """Computes batches without gradient, in smaller and smaller parts where the device's memory
    does not hold them whole; what was found to fit is remembered.

    Each image's values are what they were, but that another kernel may round them otherwise, as it
    is chosen by the number of images.
    """

    def __init__(self, what: str) -> None:
        """
        Args:
            what: is computed, for messages: "evaluating val".
        """
        self._what = what
        self._most: int | None = None

    def __call__(
        self, compute: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            compute: one value for each of the batch's; it brings them to the device if need be.

        Raises:
            RtlDistError: not even one fits.
        """
        size = min(len(batch), self._most or len(batch))
        while True:
            with Attempt() as attempt:
                parts = [compute(part) for part in batch.split(size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            assert attempt.ran_out
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if size == 1:
                raise RtlDistError(
                    f"out of memory {self._what}, one image at a time; use a smaller model or"
                    " data.image_size, or free the device (nvidia-smi shows who else uses it)"
                )
            self._most = size = (size + 1) // 2
            LOG.info("out of memory %s: %d images at a time from here on", self._what, size)
