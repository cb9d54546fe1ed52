"""What the launcher said about the processes of this job, in the words of torchrun.

torchrun and accelerate set ``RANK``, ``WORLD_SIZE`` and where the processes meet. srun does not,
and each of its tasks would train alone. Its own variables hold the same, so they are translated.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, MutableMapping
from datetime import timedelta

from rtl_dist.core.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # of ranks that wait for each other


def launched_world_size(env: MutableMapping[str, str] = os.environ) -> int:
    """How many processes there are to be; makes ``env`` say what torchrun would for srun's tasks.

    Raises:
        UserError: several processes that were not told where to meet.
    """
    if "WORLD_SIZE" not in env and _is_one_of_sruns(env):
        env["RANK"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_LOCALID"]
        env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_WORLD_SIZE"] = str(_tasks_on_this_node(env))
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env["SLURM_STEP_NODELIST"])
        # below the ports that systems hand out by themselves, and another for each job
        env.setdefault("MASTER_PORT", str(12000 + int(env["SLURM_JOB_ID"]) % 20000))
    world_size = int(env.get("WORLD_SIZE", "1"))
    if world_size > 1 and "MASTER_ADDR" not in env:
        raise UserError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR, where the processes meet, is not set:"
            " launch with torchrun, srun or accelerate and a file from launch/, or unset WORLD_SIZE"
        )
    return world_size


def may_end_alone(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first, and the launcher ends the others after it; srun does not
    do so soon."""
    return env.get("RANK", "0") == "0" and ("RANK" in env or not _is_one_of_sruns(env))


def _is_one_of_sruns(env: Mapping[str, str]) -> bool:
    return int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1  # not set in a batch script


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """From srun's list such as ``2(x3),1``: two tasks on each of three nodes, one on the next."""
    counts: list[int] = []
    for item in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = item.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(env["SLURM_NODEID"])]


def _first_host(nodes: str) -> str:
    """The first of SLURM's compact list of nodes, such as ``gpu[03-07,12]``.

    Raises:
        UserError: there is no scontrol here, as in many containers, or it does not answer.
    """
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"cannot ask SLURM for the first of the nodes {nodes} ({error}); set MASTER_ADDR to its"
            " name before srun"
        ) from error
    return listing.stdout.split()[0]
