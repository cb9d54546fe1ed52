"""Loads weights from a file or folder into a classifier, or says exactly why they do not fit.

Nothing is ever unpickled beyond tensors: safetensors, or ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from rtl_dist.core.errors import UserError
from rtl_dist.core.files import read_object
from rtl_dist.core.shipped import or_shipped
from rtl_dist.core.text import shorten
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.head import folded_state
from rtl_dist.model.stem import adapt_stem_kernel

_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 4  # keys named in an error before "and N more"


def load_weights(
    model: Classifier, path: str, *, head: Literal["auto", "new", "keep"], classes: tuple[str, ...]
) -> str:
    """Loads native-named weights into the trunk and, if ``head`` allows, the head.

    Args:
        path: a weights file, or a run, best, checkpoint or exported folder.
        head: see ``config.ModelConfig.head``.
        classes: what the head should tell apart, in order.

    Returns:
        A line on what was loaded.

    Raises:
        UserError: nothing there, not weights, or keys or shapes that do not fit.
    """
    file, source_classes = find_weights(path)
    state = _native_names(read_state_dict(file), model.native_head)
    head_state, trunk_state = {}, {}
    for key, value in state.items():
        if key.startswith(f"{model.native_head}."):
            head_state[key.removeprefix(f"{model.native_head}.")] = value
        else:
            trunk_state[key] = value
    _load_trunk(model, trunk_state, file)
    head_state = folded_state(head_state)

    fits = {k: v.shape for k, v in head_state.items()} == {
        k: v.shape for k, v in model.head.plain_state().items()
    }
    if head == "keep" and not fits:
        found = next((len(v) for v in head_state.values()), 0)
        raise UserError(
            f"model.head: keep, but the head in {file} is for {found} classes and the data has"
            f" {len(classes)}; use head: new, or the data it was trained on"
        )
    same_classes = source_classes == classes
    if head == "keep" or (head == "auto" and fits and same_classes):
        model.head.load_state_dict(head_state)
        return f"weights and head from {file}"
    return f"weights from {file}, a new head"


def find_weights(path: str) -> tuple[Path, tuple[str, ...] | None]:
    """The weights file a path means, and the classes of its head where they are known."""
    given = or_shipped(path)
    if given.is_file():
        return given, _classes_beside(given)
    for folder in (given / "best", given):
        file = folder / "model.safetensors"
        if file.is_file():
            return file, _classes_beside(file)
    what = (
        "holds no best/model.safetensors or model.safetensors" if given.is_dir() else "is missing"
    )
    raise UserError(
        f"model.weights: {path} {what}; give a weights file, a run folder, pretrained or none"
    )


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, unwrapped and without the prefixes that wrappers leave."""
    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle raises anything: IndexError, struct.error, ...
        reason = " ".join((str(e) or repr(e)).split())[:200]
        raise UserError(
            f"model.weights: {file} cannot be read as plain tensors ({reason}); save it again with"
            " safetensors, or torch.save(model.state_dict(), file)"
        ) from e
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    tensors = {}
    if isinstance(state, dict):
        tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"model.weights: {file} holds no state dict of tensors")
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _native_names(state: dict[str, torch.Tensor], native_head: str) -> dict[str, torch.Tensor]:
    """A checkpoint of ours holds the names of ``Classifier``; any other file is as it should be."""
    if not all(key.startswith(("trunk.", "head.")) for key in state):
        return state
    names = {key: key.removeprefix("trunk.") for key in state if key.startswith("trunk.")}
    names |= {key: native_head + key.removeprefix("head") for key in state if key not in names}
    return {names[key]: value for key, value in state.items()}


def _classes_beside(file: Path) -> tuple[str, ...] | None:
    """The classes of the head, from the description of a model folder or a checkpoint."""
    try:
        if (state := file.parent / "state.json").is_file():
            return tuple(read_object(state)["identity"]["classes"])
        return tuple(read_object(file.parent / "config.json")["label_names"])
    except (OSError, KeyError, TypeError):
        return None  # none, or somebody else's; the head is then of unknown classes


def _load_trunk(model: Classifier, state: dict[str, torch.Tensor], file: Path) -> None:
    own = model.trunk.state_dict()
    _adapt_input_convolution(state, own)
    adapt_stem_kernel(state, own)
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    # a foreign head under another name (fc, classifier, ...) is the only extra that is expected
    extra = [k for k in state if k not in own and k.split(".")[0] not in _HEAD_NAMES]
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or extra or shapes:
        complaints = [
            f"{what}: {shorten(keys, _SHOWN)}"
            for what, keys in (
                ("missing", missing),
                ("not in the model", extra),
                ("of another shape", shapes),
            )
            if keys
        ]
        raise UserError(
            f"model.weights: {file} does not fit this model ({'; '.join(complaints)}); set"
            " model.name to the architecture the weights were trained with"
        )
    model.trunk.load_state_dict({k: state.get(k, v) for k, v in own.items()})


_HEAD_NAMES = ("fc", "classifier", "head", "heads", "linear")


def _adapt_input_convolution(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> None:
    """Colour weights for grey input: the first kernel summed over its input channels; and back."""
    first = next((k for k, v in own.items() if v.ndim == 4), None)
    if first is None or first not in state or state[first].ndim != 4:
        return
    have, want = state[first].shape[1], own[first].shape[1]
    if (have, want) == (3, 1):
        state[first] = state[first].sum(1, keepdim=True)
    elif (have, want) == (1, 3):
        state[first] = state[first].repeat(1, 3, 1, 1) / 3
