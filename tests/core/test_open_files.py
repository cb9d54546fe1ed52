"""Few files may be open at once: more are allowed, fewer are kept, and no data is blamed."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rtl_dist.core.errors import RtlDistError, ShardError
from rtl_dist.core.open_files import raise_limit
from rtl_dist.data.storage.shard_files import ShardFiles, Shards

NUM_SHARDS = 40


@pytest.fixture
def files(tmp_path):
    for n in range(NUM_SHARDS):
        (tmp_path / f"{n}.tar").write_bytes(bytes([n]))
    shard = {"num_samples": 1, "bytes": 1, "sha256": "0" * 64}
    shards = Shards([{"path": f"{n}.tar", **shard} for n in range(NUM_SHARDS)])
    files = ShardFiles(str(tmp_path), shards, None)
    yield files
    files.close()


@pytest.fixture
def limit():
    """Sets how many more files may be opened than are open now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def set_limit(more):
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + more, before[1]))

    yield set_limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("more", [1, 3, 20])
def test_shards_are_read_whatever_the_limit(files, limit, more):
    limit(more)
    for n in [*range(NUM_SHARDS), *range(NUM_SHARDS)]:
        assert files.read(n, 0, 1) == bytes([n])


def test_where_nothing_can_be_opened_the_limit_is_named_and_not_the_data(files, limit):
    limit(0)
    with pytest.raises(RtlDistError, match=r"files open at once; raise the limit \(ulimit") as told:
        files.read(0, 0, 1)
    assert not isinstance(told.value, ShardError)


def test_the_limit_is_raised_as_far_as_a_user_may(limit):
    limit(10)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 1024)


def test_a_command_without_files_to_open_says_so(tmp_path):
    code = (
        "import os, resource\n"
        "from rtl_dist.commands.running import run_command\n"
        "def opens():\n"
        "    while True: os.open('/', 0)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "raise SystemExit(run_command(opens, debug=False))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "may have no more than 64 files open at once; raise the limit" in line
