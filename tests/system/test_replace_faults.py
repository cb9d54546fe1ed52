"""What replaces something, a file, the best weights, a view of features, is killed, or refused by the
disk, at each of its calls of the C library: the old or the new one is there, whole.
"""

import errno
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from call_faults import ERRORS, KILLS, at_each_call, calls_of
from grids import one_of_each
from killed_runs import FAIL_ON, FULL, in_child, require_shim
from tiny_runs import make_dataset, tiny_config, write_config

from rtl_dist.config import load_config
from rtl_dist.core import files
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.view import ViewShape
from rtl_dist.features.view_files import write_block
from rtl_dist.model.build import build_model
from rtl_dist.model.folder import load_model, write_model_folder


@pytest.fixture(autouse=True)
def _shim():
    require_shim()


# --- files that are replaced -------------------------------------------------------------------


OLD, NEW = {"number": 1, "text": "old " * 5000}, {"number": 2, "text": "new " * 5000}


def replaced_text(folder: Path) -> Callable[[], object]:
    file = folder / "within" / "file.json"
    files.write_json(file, OLD)
    return lambda: files.write_json(file, NEW)


def fault_replacements(action: int, error: int) -> int:
    """Returns how many calls one makes."""
    outcome = None
    for folder, outcome in at_each_call(replaced_text, action, error):
        found = json.loads((folder / "within" / "file.json").read_text())
        assert found in ((NEW,) if outcome.ending == "done" else (OLD, NEW)), outcome
        if outcome.ending == "crash":
            assert f"[Errno {error}]" in outcome.message  # an OSError, for callers to put in words
        if outcome.ending != "killed" and action != FAIL_ON:
            assert [path.name for path in (folder / "within").iterdir()] == ["file.json"], outcome
    assert outcome is not None
    return outcome.call - 1


@pytest.mark.parametrize("how", [*KILLS, *ERRORS])
def test_a_file_is_the_old_or_the_new_one(how):
    action, error = ERRORS.get(how) or (KILLS[how], 0)
    assert in_child(fault_replacements, action, error) >= (3 if action == FULL else 6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def prepared_best(dataset: Path) -> tuple[Callable[[Path, float], None], Callable[[Path], float]]:
    """To write a model folder whose weights are all one number; and to read that number."""
    with tempfile.TemporaryDirectory() as folder:
        content = tiny_config(dataset, Path(folder, "run"))
        config = load_config(write_config(Path(folder, "c.yaml"), content))
    data = open_dataset(dataset)
    model, _ = build_model(config.model, config.data, classes=data.classes, seed=0)

    def write(best: Path, number: float) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        write_model_folder(best, model, config.model, data, precision=config.precision)

    def read(best: Path) -> float:
        (number,) = {
            value
            for parameter in load_model(best).model.parameters()
            for value in parameter.unique().tolist()
        }
        return number

    return write, read


def fault_best_weights(dataset: Path, action: int, error: int) -> int:
    """Returns how many calls writing ``best/`` makes."""
    write, read = prepared_best(dataset)

    def prepare(folder: Path) -> Callable[[], object]:
        write(folder / "best", 1)
        return lambda: write(folder / "best", 2)

    outcome = None
    for folder, outcome in at_each_call(prepare, action, error):
        number = read(folder / "best")
        assert number in ((2,) if outcome.ending == "done" else (1, 2)), outcome
        if outcome.ending == "crash":
            assert (
                f"[Errno {errno.EIO}]" in outcome.message or f"[Errno {error}]" in outcome.message
            )
        write(folder / "best", 3)
        assert read(folder / "best") == 3
    assert outcome is not None
    return outcome.call - 1


@pytest.mark.parametrize("how", one_of_each([*KILLS, *ERRORS], lambda how: how in KILLS))
def test_the_best_weights_are_the_old_or_the_new_ones(dataset, how):
    action, error = ERRORS.get(how) or (KILLS[how], 0)
    assert in_child(fault_best_weights, dataset, action, error) >= 12


# --- cached features ---------------------------------------------------------------------------


ROWS = torch.arange(200 * 30, dtype=torch.float32).view(200, 30)
SHAPE = ViewShape(num_samples=200, row=(30,), dtype=torch.float32, block_size=64)
KEY = "0" * 32


def add_view(store: FeatureStore) -> None:
    """As ``features`` does, by one rank."""
    folder = store.reserve(KEY, SHAPE, keep=set())
    try:
        blocks = range(0, 200, 64)
        checksums = [
            write_block(folder, first, ROWS[first : first + 64], store.seal) for first in blocks
        ]
        used = np.arange(200)
        store.publish(folder, KEY, SHAPE, checksums=checksums, used=used, bad=[], content={})
    finally:
        store.discard(folder)


def fault_views(action: int, error: int) -> int:
    """Returns how many calls making a view makes."""
    outcome = None

    def prepare(folder: Path) -> Callable[[], object]:
        (folder / "store").mkdir()
        return lambda: add_view(FeatureStore(folder / "store", 10**9))

    for folder, outcome in at_each_call(prepare, action, error):
        store = FeatureStore(folder / "store", 10**9)
        if outcome.ending == "done":
            assert store.has(KEY)
        elif outcome.ending == "crash":
            assert "OSError" in outcome.message, outcome.message
            if action != FAIL_ON:
                assert [path.name for path in store.root.iterdir()] in ([], [KEY]), outcome
        if not store.has(KEY):
            add_view(store)
        assert store.is_sound(KEY, rank=0, world_size=1), outcome
        view = store.open(KEY)
        assert torch.equal(view.features, ROWS)
        assert view.used.tolist() == list(range(200))
    assert outcome is not None
    return outcome.call - 1


def order_of_a_view(folder: Path) -> list[str]:
    folder.mkdir()
    return calls_of(lambda: add_view(FeatureStore(folder, 10**9)), folder)


def test_all_of_a_view_is_flushed_to_disk_before_it_counts(tmp_path):
    calls = in_child(order_of_a_view, tmp_path / "store")
    (published,) = [n for n, call in enumerate(calls) if call == f"rename {KEY}"]
    for name in ("features.bin", "used.npy", "description.json"):
        (flushed,) = [n for n, call in enumerate(calls) if re.match(rf"fsync .+/{name}", call)]
        written = [n for n, call in enumerate(calls) if re.match(rf"write .+/{name}", call)]
        assert written, name
        assert max(written) < flushed < published


@pytest.mark.parametrize("how", one_of_each([*KILLS, *ERRORS], lambda how: how in KILLS))
def test_a_view_is_whole_or_not_there(how):
    action, error = ERRORS.get(how) or (KILLS[how], 0)
    assert in_child(fault_views, action, error) >= 12
