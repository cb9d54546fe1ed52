"""What there is to learn: one class an image, or any number of them."""

from __future__ import annotations

SINGLE_LABEL = "single_label"
MULTI_LABEL = "multi_label"
