"""The CPUs that a container grants are counted, not those of its machine."""

import pytest

from rtl_dist.core.cpus import available_cpus, container_cpus, share_of_cpus


def make_files(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(("files", "cpus"), [
    ({}, None),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
      "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 2.0),
    ({"proc/self/cgroup": "9:cpu,cpuacct:/docker/x\n0::/\n",
      "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ({"proc/self/cgroup": "9:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/cpu.max": "a b c\n"}, None),
])  # fmt: skip
def test_a_containers_limit_is_found(tmp_path, files, cpus):
    make_files(tmp_path, files)
    assert container_cpus(tmp_path) == cpus


def test_there_is_always_a_cpu():
    assert available_cpus() >= 1


ALL, FIRST, SECOND = frozenset(range(16)), frozenset(range(8)), frozenset(range(8, 16))


@pytest.mark.parametrize(("processes", "granted", "share"), [
    ([ALL], None, 16),
    ([ALL] * 4, None, 4),  # a launcher's, which share the machine
    ([ALL] * 3, None, 5),
    ([ALL] * 64, None, 1),
    ([FIRST, SECOND], None, 8),  # srun --cpus-per-task=8 gave each its own
    ([FIRST, FIRST, SECOND], None, 4),
    ([FIRST | {9}, SECOND], None, 8),
    ([ALL] * 2, 6.0, 3),  # a container's time is that of both
    ([FIRST, SECOND], 6.0, 6),
    ([ALL], 0.5, 1),
])  # fmt: skip
def test_cpus_are_shared_by_those_that_may_use_them(processes, granted, share):
    assert share_of_cpus(processes[0], processes, granted) == share
