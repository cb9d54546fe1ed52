"""How many processes this job has and where they meet, from the launcher's environment variables.

torchrun and accelerate set ``RANK``, ``WORLD_SIZE`` and ``MASTER_ADDR`` for each process. srun does
not, and each of its tasks would train alone; but it sets variables of its own that say the same, so
for its tasks torchrun's are filled in here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from datetime import timedelta

from rtl_dist.core.errors import UserError
from rtl_dist.core.text import brief

# How long a process waits for the others to come, or in one exchange on the device, before it ends.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def launched_world_size(env: MutableMapping[str, str] = os.environ) -> int:
    """How many processes the launcher started; 1 without a launcher.

    Args:
        env: for a task of srun, ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``,
            ``MASTER_ADDR`` and ``MASTER_PORT`` are added to it.

    Raises:
        UserError: several processes that were not told where to meet.
    """
    if "WORLD_SIZE" not in env and _is_srun_task(env):
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_WORLD_SIZE"] = str(_tasks_on_this_node(env))
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
        # Another port for each job, so that two on one node do not meet; below 32768, where Linux
        # begins to hand ports out by itself.
        env.setdefault("MASTER_PORT", str(12000 + int(env["SLURM_JOB_ID"]) % 20000))
    world_size = whole_number(env, "WORLD_SIZE", 1)
    if world_size > 1 and "MASTER_ADDR" not in env:
        raise UserError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR, where the processes meet, is not set:"
            " launch with torchrun, srun or accelerate and a file from launch/, or unset WORLD_SIZE"
        )
    return world_size


def whole_number(env: Mapping[str, str], name: str, default: int) -> int:
    """The value of a variable that a launcher sets.

    Raises:
        UserError: it is none.
    """
    text = env.get(name, str(default))
    if not text.strip().isdecimal():
        raise UserError(f"{name} is {brief(text)}, not a whole number: let a launcher set it")
    return int(text)


def may_end_alone(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process may end with an error before the processes have met, without leaving
    the others to wait for it.

    True of rank 0 of a launcher that then ends the other processes, and of a process without a
    launcher; False under srun, which lets the others wait for long.
    """
    return env.get("RANK", "0") == "0" and ("RANK" in env or not _is_srun_task(env))


def _is_srun_task(env: Mapping[str, str]) -> bool:
    """Whether this process is one of several that one srun started."""
    return whole_number(env, "SLURM_STEP_NUM_TASKS", 1) > 1  # not set in a batch script


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """From srun's list such as ``2(x3),1``: two tasks on each of three nodes, one on the next."""
    counts: list[int] = []
    for item in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = item.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(env["SLURM_NODEID"])]


def allow_forks(env: MutableMapping[str, str] = os.environ) -> None:
    """Before NCCL opens a network: that of larger EC2 machines (EFA, by libfabric) would end a
    process that forks, as loaders do, unless it was told that it does. Others do not read this."""
    for name in ("FI_EFA_FORK_SAFE", "RDMAV_FORK_SAFE"):
        env.setdefault(name, "1")


def first_host(nodes: str) -> str:
    """The first of SLURM's compact list of nodes, such as ``gpu[03-07,12],cpu1``; read here, since
    in a container there is no scontrol to ask."""
    outside = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)  # up to a comma that is in no bracket
    assert outside is not None  # it matches anything
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", outside[0])
