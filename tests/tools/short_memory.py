"""A device of little memory, played on a CPU: it takes so many images at a time, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rtl_dist.data.loading import loader


class OnHost(torch.Tensor):
    """Images that are still to be brought to a device that takes at most ``most`` of them."""

    most = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is not torch.Tensor.to:
            return out
        if len(args[0]) > cls.most and not (kwargs or {}).get("copy"):  # that is one on the host
            raise torch.OutOfMemoryError("injected into the copy")
        return out.as_subclass(torch.Tensor)


def refuse_copies(monkeypatch: pytest.MonkeyPatch, *, over: int) -> None:
    """No copy of more than ``over`` images to the device finds room there: whole batches stay on
    the host."""
    monkeypatch.setattr(OnHost, "most", over)
    monkeypatch.setattr(
        loader,
        "to_device",
        lambda batch, device: batch._replace(inputs=batch.inputs.as_subclass(OnHost)),
    )


def refuse_passes(monkeypatch: pytest.MonkeyPatch, kind: type[Any], *, over: int) -> list[int]:
    """No forward pass of a ``kind`` of module, outside of training steps, finds room for more than
    ``over`` images; returns how many each had that did."""
    forward, sizes = kind.forward, []

    def limited(self, inputs):
        if not torch.is_grad_enabled() and not inputs.is_meta:
            if len(inputs) > over:
                raise torch.OutOfMemoryError("injected into a forward pass")
            sizes.append(len(inputs))
        return forward(self, inputs)

    monkeypatch.setattr(kind, "forward", limited)
    return sizes
