"""The run that is killed, and what it leaves when it is not."""

from pathlib import Path

import pytest
from kills import CHANGES, gone_on
from tiny_runs import make_dataset, tiny_config, write_config


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """With three batches of validation images."""
    return make_dataset(tmp_path_factory.mktemp("data"), val=150)


@pytest.fixture(scope="session")
def config(dataset, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "c.yaml", tiny_config(dataset, folder / "nowhere", **CHANGES))


@pytest.fixture(scope="session")
def undisturbed(config, tmp_path_factory) -> dict[int, Path]:
    """The run by number of processes."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp("undisturbed") / "run"
        gone_on(config, runs[world_size], world_size=world_size)
    return runs
