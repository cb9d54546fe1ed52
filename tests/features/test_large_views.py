"""Views larger than memory: the disk brings the rows that are asked for, and nothing besides."""

import mmap
import sys
from pathlib import Path

import pytest
from tiny_runs import make_dataset, same, train, weights

from rtl_dist.features import maker
from rtl_dist.features.view import View

pytestmark = pytest.mark.usefixtures("undrawn", "own_features")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"), val=3)


def advised_files() -> set[str]:
    """The names of files that this process has mapped for reading at random (the kernel's word
    for it is ``rr``)."""
    found, path = set(), None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            path = Path(head[5]) if len(head) > 5 else None
        elif head[0] == "VmFlags:" and "rr" in head and path is not None:
            found.add(path.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="tells of it in /proc")
@pytest.mark.parametrize("memory", [1, 2**40], ids=["larger", "smaller"])
def test_only_what_a_stage_trains_on_is_read_at_random(tmp_path, dataset, monkeypatch, memory):
    stages = [{"name": "head", "steps": 4, "trainable": "head", "lr": 1e-2, "views": 1}]
    plain = train(tmp_path, dataset, "plain", stages=stages)
    monkeypatch.setattr(maker, "available_memory", lambda: memory)
    advised: list[View] = []
    advise = View.will_be_read_at_random

    def noted(self):
        advise(self)
        advised.append(self)
        assert advised_files() == {"features.bin"}

    monkeypatch.setattr(View, "will_be_read_at_random", noted)
    run = train(tmp_path, dataset, stages=stages)
    assert [len(view.used) for view in advised] == ([57] if memory == 1 else [])
    assert all(isinstance(view.mapping, mmap.mmap) for view in advised)
    assert same(weights(run), weights(plain))
