"""An optimizer's state by the names of its parameters."""

from __future__ import annotations

import torch

from rtl_dist.core.errors import UserError


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[int, str]
) -> dict[str, torch.Tensor]:
    """The optimizer's state as ``<state>/<parameter name>``; ``names`` by ``id`` of parameter."""
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{names[id(parameter)]}"] = value
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what ``optimizer_tensors`` took, through ``load_state_dict``.

    Raises:
        UserError: a tensor belongs to no parameter of this stage.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    position = {names[id(p)]: i for i, p in enumerate(parameters)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in position:
            raise UserError(
                f"the checkpoint's optimizer knows {name!r}, this stage does not train"
                " it: resume with the config the run was started with"
            )
        parameter = parameters[position[name]]
        if value.shape == parameter.shape:
            # strides like the parameter's: the fused kernels go through memory, not through indices
            # (torch 2.15, CPU), and what safetensors holds is not channels_last
            value = torch.empty_like(parameter, device=value.device, dtype=value.dtype).copy_(value)
        state.setdefault(position[name], {})[kind] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
