"""What accelerate would take from its environment besides the processes, where the config decides.

``accelerate launch`` hands a file of its own on (``accelerate config`` writes one that then holds
for every launch) as ``ACCELERATE_...`` variables, and ``Accelerator`` reads them as defaults: a
compiler, a divisor of every gradient, another way to share the work. None of it is in a run's
config, so the same config would give other bytes by another launcher.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rtl_dist.core.errors import UserError
from rtl_dist.core.text import brief

_PREFIX = "ACCELERATE_"
# where the processes compute, which no key of a config says
_KEPT = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY")
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_NOT_SET = ("", "no", "none", "false", "0", "1")
_DECIDED_BY = {
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "batch.micro"),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "optim.clip_grad_norm"),
    "ACCELERATE_DOWNCAST_BF16": ("downcast_bf16", "precision"),
}


def refuse_other_ways(env: Mapping[str, str] = os.environ) -> None:
    """Fails where the launcher wants the work shared otherwise than by DDP.

    Raises:
        UserError: it names the setting.
    """
    for name, what in _OTHER_WAYS.items():
        if env.get(name, "").strip().lower() not in ("", "false", "0", "no", "off"):
            raise UserError(
                f"{name} is {brief(env[name])}: the launcher asks for {what}, by which rtl_dist"
                " does not train (every process has the whole network); launch with a file from"
                " launch/, or unset it"
            )
    if device := env.get("ACCELERATE_TORCH_DEVICE"):
        raise UserError(
            f"ACCELERATE_TORCH_DEVICE is {brief(device)}, but each process takes the device of its"
            " local rank; unset it, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )


def overruled(env: Mapping[str, str] = os.environ) -> list[str]:
    """The settings of the launcher that would change a run, each with the key that decides."""
    return [
        f"{setting}: {env[name]} (the config's {key} decides)"
        for name, (setting, key) in _DECIDED_BY.items()
        if env.get(name, "").strip().lower() not in _NOT_SET
    ]


@contextmanager
def only_where_to_compute() -> Iterator[None]:
    """Within the block accelerate finds nothing in its environment but that."""
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(_PREFIX) and name not in _KEPT
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def on_the_network_s_own_device() -> Iterator[None]:
    """Within the block accelerate hands DDP no device. It would take the GPU of the rank's number,
    which is another than the network's where each rank sees only its own (accelerate 1.15)."""
    name = f"{_PREFIX}BYPASS_DEVICE_MAP"
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]
