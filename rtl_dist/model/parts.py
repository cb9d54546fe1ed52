"""The parts of a classifier (stem, layer1, ..., head), freezing by part, and proofs about both."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.config import StageConfig
from rtl_dist.core.errors import UserError
from rtl_dist.core.text import did_you_mean
from rtl_dist.model.classifier import Classifier

NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


def parts_of(model: Classifier) -> dict[str, list[nn.Module]]:
    """The classifier's parts from the input to the head, each a list of modules.

    A part is a child of the trunk that holds parameters; the children before the first one named
    ``layer...`` are together the ``stem``.

    Raises:
        UserError: some parameter lies in no part, as a vision transformer's class token does.
    """
    children = [
        (n, m) for n, m in model.trunk.named_children() if any(True for _ in m.parameters())
    ]
    first_layer = next((i for i, (n, _) in enumerate(children) if n.startswith("layer")), 0)
    parts: dict[str, list[nn.Module]] = {}
    for i, (name, module) in enumerate(children):
        parts.setdefault("stem" if i < first_layer else name, []).append(module)
    parts["head"] = [model.head]
    _require_every_parameter(model, parts)
    return parts


def _require_every_parameter(model: Classifier, parts: dict[str, list[nn.Module]]) -> None:
    covered = {id(p) for modules in parts.values() for m in modules for p in m.parameters()}
    left_out = [name for name, p in model.named_parameters() if id(p) not in covered]
    if left_out:
        raise UserError(
            f"model.name: this network has parameters outside of its parts ({left_out[0]}), so it"
            " cannot be frozen part by part; choose a ResNet"
        )


def trainable_parts(model: Classifier, stage: StageConfig, *, key: str = "trainable") -> set[str]:
    """The names of the parts a stage trains.

    key: that names them, for an error.

    Raises:
        UserError: a part the model does not have.
    """
    known = list(parts_of(model))
    if stage.trainable == "all":
        return set(known)
    wanted = [stage.trainable] if isinstance(stage.trainable, str) else stage.trainable
    chosen: set[str] = set()
    for name in wanted:
        part = name.removesuffix("+")
        if part not in known:
            raise UserError(
                f"{key}: the model has no part {part!r}"
                f"{did_you_mean(part, known)} (its parts: {', '.join(known)}; all; or a part and"
                f" all above it, such as {known[-2]}+)"
            )
        chosen |= set(known[known.index(part) :]) if name.endswith("+") else {part}
    return chosen


def first_trainable_part(model: Classifier, stage: StageConfig) -> str:
    """The lowest part a stage trains: nothing below it changes in the stage."""
    chosen = trainable_parts(model, stage)
    return next(name for name in parts_of(model) if name in chosen)
