"""A device's memory that runs out: known by any of its names, and batches computed in parts."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from rtl_dist.core import device_memory
from rtl_dist.core.device_memory import Attempt, InParts, is_shortage
from rtl_dist.core.errors import RtlDistError

# As torch, cuBLAS and cuDNN say it.
SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
]
OTHERS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    MemoryError(),
    ValueError("CUBLAS_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: str(error)[:30])
def test_a_shortage_is_known_and_no_error_any_more(error):
    assert is_shortage(error)
    with Attempt() as attempt:
        raise error
    assert attempt.ran_out


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_other_errors_are_raised(error):
    assert not is_shortage(error)
    attempt = Attempt()
    with pytest.raises(type(error)), attempt:
        raise error
    assert not attempt.ran_out


def test_what_failed_is_free_afterwards():
    def fail():
        big = torch.ones(3)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("injected")

    held: list[weakref.ref] = []
    gc.disable()
    try:
        with Attempt() as attempt:
            fail()
        assert attempt.ran_out
        assert held[0]() is None
    finally:
        gc.enable()


class Device:
    """Squares up to ``most`` numbers at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(batch))
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("injected")
        return batch**2


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(8, 8, [8]), (8, 5, [8, 4, 4]), (9, 3, [9, 5, 3, 3, 3]), (3, 1, [3, 2, 1, 1, 1])],
)
def test_a_batch_is_halved_until_it_fits(count, most, sizes):
    device, batch = Device(most), torch.arange(count)
    assert torch.equal(InParts("squaring")(device, batch), batch**2)
    assert device.sizes == sizes


def test_what_fits_is_remembered_and_told_once(monkeypatch):
    told: list[str] = []
    log = SimpleNamespace(info=lambda text, *values: told.append(text % values))
    monkeypatch.setattr(device_memory, "LOG", log)
    device, in_parts, batch = Device(4), InParts("evaluating val"), torch.arange(8)
    for _ in range(3):
        assert torch.equal(in_parts(device, batch), batch**2)
    assert torch.equal(in_parts(device, batch[:3]), batch[:3] ** 2)
    assert device.sizes == [8] + [4] * 6 + [3]
    assert told == ["out of memory evaluating val: 4 images at a time from here on"]


def test_not_even_one_is_told():
    with pytest.raises(RtlDistError, match="out of memory squaring, one image at a time; use a"):
        InParts("squaring")(Device(0), torch.arange(8))


def test_another_error_is_none_of_memory():
    with pytest.raises(ZeroDivisionError):
        InParts("dividing")(lambda batch: 1 / 0, torch.arange(8))


@pytest.mark.gpu
def test_a_real_gpu_that_is_full():
    free, _ = torch.cuda.mem_get_info()

    def compute(batch: torch.Tensor) -> torch.Tensor:
        torch.empty(len(batch) * (free // 5), dtype=torch.uint8, device="cuda")
        return batch.cuda() ** 2

    batch = torch.arange(16)
    assert torch.equal(InParts("squaring")(compute, batch).cpu(), batch**2)
