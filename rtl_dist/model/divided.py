"""A classifier cut in two: what is frozen, up to the first trained part, and the rest.

The frozen half is a copy made for speed: BatchNorm folded into the convolutions before it, weights
in the precision they are multiplied in, no autograd. The other half shares its layers with the
classifier, so training it trains the classifier.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rtl_dist.model.classifier import Classifier
from rtl_dist.model.parts import parts_of


@dataclass(frozen=True)
class Divided:
    """The two halves; one after the other they are the classifier, but for rounding."""

    frozen: FrozenPart | Classifier | None
    """uint8 images (n, C, S, S) to activations; None where the first part is trained already or the
    network cannot be cut."""
    trained: nn.Module
    """Activations, or images where nothing is frozen, to scores (n, num_classes)."""


def divide(model: Classifier, first_trained: str, *, dtype: torch.dtype | None) -> Divided:
    """Cuts a classifier below the part ``first_trained`` (see ``parts_of``).

    Args:
        dtype: autocast's, in which the frozen convolutions are kept; None without autocast.
    """
    if not model.shows_layers:
        return Divided(model, nn.Identity())
    names = list(parts_of(model))
    if first_trained == names[0]:
        return Divided(None, model)
    graph = _traced(model.trunk, training=False)
    if first_trained == "head":
        trunk = model.trunk if graph is None else _folded(model.trunk, graph, dtype)
        return Divided(FrozenPart(model, trunk), model.head)
    halves = None
    # one graph has to serve both modes
    if graph is not None and str(graph) == str(_traced(model.trunk, training=True)):
        halves = _cut(model, graph, first_trained)
    if halves is None:
        return Divided(None, model)
    below, above = halves
    return Divided(
        FrozenPart(model, _folded(model.trunk, below, dtype)),
        _Upper(fx.GraphModule(model.trunk, above), model),
    )


class FrozenPart(nn.Module):
    """Images to what the frozen layers make of them; never in training mode, without autograd."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: Classifier, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.register_buffer("mean", model.mean, persistent=False)
        self.register_buffer("std", model.std, persistent=False)

    def describe(self) -> str:
        """What is computed, whatever the weights: networks of other layers may have the same."""
        graph = self.trunk.graph if isinstance(self.trunk, fx.GraphModule) else ""
        return f"{graph}\n{self.trunk}"

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        out: torch.Tensor = self.trunk(pixels.contiguous(memory_format=torch.channels_last))
        return out


class _Upper(nn.Module):
    """The upper part of a trunk, and the head; the layers are the classifier's own."""

    def __init__(self, trunk: fx.GraphModule, model: Classifier) -> None:
        super().__init__()
        self.trunk, self.head = trunk, model.head

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.trunk(activations))
        return scores


def _traced(trunk: nn.Module, *, training: bool) -> fx.Graph | None:
    """The trunk's calls in order, in one mode; None where they depend on what goes through it."""
    modes = {module: module.training for module in trunk.modules()}
    try:
        return fx.Tracer().trace(trunk.train(training))
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode


def _cut(
    model: Classifier, graph: fx.Graph, first_trained: str
) -> tuple[fx.Graph, fx.Graph] | None:
    """The graphs below and above; None unless exactly one tensor crosses the cut and no layer is
    on both sides of it."""
    names = list(parts_of(model))
    upper_parts = names[names.index(first_trained) :]
    upper_layers = {id(m) for part in upper_parts for root in parts_of(model)[part]
                    for m in root.modules()}  # fmt: skip
    nodes = [node for node in graph.nodes if node.op != "output"]
    is_upper = [_layer_of(model.trunk, node) in upper_layers for node in nodes]
    if True not in is_upper:
        return None
    cut = is_upper.index(True)
    if any(node.op == "call_module" and not is_upper[i] and _has_parameters(model.trunk, node)
           for i, node in enumerate(nodes) if i >= cut):  # fmt: skip
        return None
    if any(node.op == "get_attr" for node in nodes):
        return None  # a tensor of the trunk's own: it may be a parameter on either side
    below = set(nodes[:cut])
    crossing = [node for node in nodes[:cut] if any(user not in below for user in node.users)]
    if len(crossing) != 1 or crossing[0].op == "placeholder":
        return None
    lower, upper = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:cut]:
        copies[node] = lower.node_copy(node, lambda n: copies[n])
    lower.output(copies[crossing[0]])
    copies = {crossing[0]: upper.placeholder("activations")}
    for node in [*nodes[cut:], graph.output_node()]:
        copies[node] = upper.node_copy(node, lambda n: copies[n])
    return lower, upper


def _layer_of(trunk: nn.Module, node: fx.Node) -> int | None:
    return id(trunk.get_submodule(str(node.target))) if node.op == "call_module" else None


def _has_parameters(trunk: nn.Module, node: fx.Node) -> bool:
    return any(True for _ in trunk.get_submodule(str(node.target)).parameters())


def _folded(trunk: nn.Module, graph: fx.Graph, dtype: torch.dtype | None) -> fx.GraphModule:
    """A copy of the layers of a graph in evaluation mode, in which a convolution followed by
    BatchNorm is one convolution (Jacob et al. 2017, arXiv 1712.05877, section 3.2)."""
    folded = copy.deepcopy(fx.GraphModule(trunk, graph)).eval().requires_grad_(False)
    for node in list(folded.graph.nodes):
        if node.op != "call_module" or not isinstance(
            norm := folded.get_submodule(str(node.target)), _BatchNorm
        ):
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        path = str(source.target)
        conv = folded.get_submodule(path)
        if type(conv) is not nn.Conv2d or _times_used(folded.graph, path) > 1:
            continue
        if norm.running_mean is None:
            continue
        folded.set_submodule(path, fuse_conv_bn_eval(conv, norm))
        node.replace_all_uses_with(source)
        folded.graph.erase_node(node)
    folded.recompile()
    folded.delete_all_unused_submodules()
    if dtype is not None:
        for module in folded.modules():
            if type(module) is nn.Conv2d:
                module.to(dtype)  # once, not in each forward pass
    return folded.to(memory_format=torch.channels_last)


def _times_used(graph: fx.Graph, path: str) -> int:
    return sum(node.op == "call_module" and node.target == path for node in graph.nodes)
