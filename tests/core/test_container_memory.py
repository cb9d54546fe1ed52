"""The memory that a container grants is counted, not that of its machine."""

import pytest

from rtl_dist.core import memory
from rtl_dist.core.memory import available_memory, container_memory

GIB = 2**30


@pytest.mark.parametrize(("files", "granted"), [
    ({}, None),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1073741824\n"}, GIB),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
    ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": "2147483648\n",
      "sys/fs/cgroup/job/step/memory.max": "max\n"}, 2 * GIB),
    ({"proc/self/cgroup": "9:memory:/docker/x\n0::/\n",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n"}, GIB),
    ({"proc/self/cgroup": "9:cpu:/\n", "sys/fs/cgroup/cpu/memory.limit_in_bytes": "1\n"}, None),
])  # fmt: skip
def test_a_containers_limit_is_found(tmp_path, files, granted):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert container_memory(tmp_path) == granted


@pytest.mark.parametrize("granted", [GIB // 4, None, 2**63])
def test_no_more_is_available_than_there_is(monkeypatch, granted):
    monkeypatch.setattr(memory, "container_memory", lambda: None)
    whole = available_memory()
    assert whole > GIB // 4
    monkeypatch.setattr(memory, "container_memory", lambda: granted)
    assert available_memory() == min(whole, granted or whole)
