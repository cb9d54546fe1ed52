"""The ranks of a machine together hold data in a part of its memory, however many they are."""

import pytest

from rtl_dist.core.memory import available_memory
from rtl_dist.distributed.runtime import Runtime


@pytest.mark.parametrize("ranks", [1, 8, 96])
def test_the_ranks_share_a_quarter_of_the_memory(monkeypatch, ranks):
    with Runtime("no") as runtime:
        monkeypatch.setattr(runtime, "local_world_size", ranks)
        of_rank = 2 * runtime.loader_bytes + runtime.kept_bytes  # training and evaluation load
    quarter = available_memory() / 4
    assert 0.99 * quarter <= ranks * of_rank <= quarter
