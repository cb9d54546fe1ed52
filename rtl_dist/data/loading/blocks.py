"""How the ranks share a whole split: in blocks, each of them taken by one rank.

An evaluation reads a split so, whether it scores images or cached features, and so are the features
computed and checked.
"""

from __future__ import annotations

from rtl_dist.core.text import and_more

EVAL_BLOCK = 64  # images scored at a time, with features as without


def blocks_of_rank(num_samples: int, size: int, *, rank: int, world_size: int) -> range:
    """The first samples of one rank's blocks of ``size`` samples; the last may have fewer."""
    return range(0, num_samples, size)[rank::world_size]


def num_rounds(num_samples: int, size: int, *, world_size: int) -> int:
    """How many blocks the rank with the most of them has."""
    return len(blocks_of_rank(num_samples, size, rank=0, world_size=world_size))


def cannot_evaluate(bad: list[str]) -> str:
    """What to say where every sample must count and some are damaged, by what they suffer from."""
    return (
        f"cannot evaluate exactly: {bad[0]}{and_more(len(bad) - 1, ', and {:,} more')}; each counts"
        " here, whatever data.bad_samples: `rtl-dist verify` tells of all, and `rtl-dist pack` or"
        " `index` again leaves them out"
    )
