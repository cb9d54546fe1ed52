"""The parts of a classifier (stem, layer1, ..., head), freezing by part, and proofs about both."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rtl_dist.config import StageConfig
from rtl_dist.core.errors import UserError
from rtl_dist.core.text import did_you_mean
from rtl_dist.model.classifier import Classifier

# what timm and torchvision call the children that hold a network's stages or blocks, one by one
_STAGES = ("stages", "blocks", "layers", "features")
_BEFORE_HEAD = "pre_head"


class OwnParameters(nn.ParameterList):
    """Those that a network holds itself, in no layer: a vision transformer's class token and its
    embedding of positions. They belong to its stem."""


NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, OwnParameters)
"""Whose parameters no weight decay is for."""


def parts_of(model: Classifier) -> dict[str, list[nn.Module]]:
    """The classifier's parts from the input to the head, each a list of modules.

    A part is a child of the trunk that holds parameters, or, of one that holds a network's stages,
    each of these (``stages.0``, ...); what comes before the first ``layer...`` or stage is together
    the ``stem``; what of the trunk is called head, such as ConvNeXt's norm, the ``pre_head``.

    Raises:
        UserError: some parameter lies in no part.
    """
    parts: dict[str, list[nn.Module]] = {}
    names = [name for name, module in model.trunk.named_children() if _learns(module)]
    first = next((i for i, n in enumerate(names) if n in _STAGES or n.startswith("layer")), 0)
    for i, name in enumerate(names):
        module = model.trunk.get_submodule(name)
        stages = [(f"{name}.{n}", m) for n, m in module.named_children() if _learns(m)]
        if i < first:
            parts.setdefault("stem", []).append(module)
        elif name in _STAGES and isinstance(module, nn.Sequential | nn.ModuleList):
            parts |= {stage: [part] for stage, part in stages}
        else:
            parts[_BEFORE_HEAD if name == "head" else name] = [module]
    if own := list(model.trunk.parameters(recurse=False)):
        parts = {"stem": [*parts.pop("stem", []), OwnParameters(own)], **parts}
    parts["head"] = [model.head]
    _require_every_parameter(model, parts)
    return parts


def _learns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _require_every_parameter(model: Classifier, parts: dict[str, list[nn.Module]]) -> None:
    covered = {id(p) for modules in parts.values() for m in modules for p in m.parameters()}
    left_out = [name for name, p in model.named_parameters() if id(p) not in covered]
    if left_out:
        raise UserError(
            f"model.name: this network has parameters outside of its stages ({left_out[0]}), so it"
            " cannot be frozen part by part; choose another, such as a ResNet or ConvNeXt"
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
        within = [each for each in known if each.startswith(f"{part}.")]
        if within and part not in known:
            chosen |= set(known[known.index(within[0]) :]) if name.endswith("+") else set(within)
            continue
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
