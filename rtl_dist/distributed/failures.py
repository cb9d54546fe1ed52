"""What to tell the user of an error that is raised by the machine, not by us."""

from __future__ import annotations

from rtl_dist.core.device_memory import is_shortage
from rtl_dist.core.errors import RtlDistError
from rtl_dist.distributed.devices import why_it_failed
from rtl_dist.distributed.lost_peers import explained


def told_to_the_user(error: BaseException | None, *, world_size: int) -> RtlDistError | None:
    """An error to raise instead; None: there is nothing to say but what it says.

    Args:
        world_size: only where there are several ranks another may be the cause.
    """
    if is_shortage(error):
        return RtlDistError(
            f"out of memory ({str(error).splitlines()[0]}); set batch.micro lower or use a"
            " smaller data.image_size, and start the same command again"
        )
    if why := why_it_failed(error):
        return RtlDistError(why)
    return explained(error) if world_size > 1 else None
