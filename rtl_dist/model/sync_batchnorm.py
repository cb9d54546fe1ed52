"""BatchNorm layers that see the microbatches of all processes together."""

from __future__ import annotations

from rtl_dist.model.classifier import Classifier


def synchronize_batchnorm(model: Classifier) -> None:
    """Puts a SyncBatchNorm of the same tensors in the place of each BatchNorm layer of the trunk.

    timm's converter, not torch's: that one makes a plain SyncBatchNorm of timm's ``BatchNormAct2d``
    too, whose activation (and drop) is then gone without a word.
    """
    from timm.layers import convert_sync_batchnorm  # all of timm, a second that few runs need

    model.trunk = convert_sync_batchnorm(model.trunk)
