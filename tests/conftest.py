"""What every test runs under: set before anything imports torch, matplotlib or wandb."""

import atexit
import gc
import os
import shutil
import signal
import tempfile

import pytest

# Test processes share the cores (pytest -n); OpenMP threads that spin against each other's made the
# tests 7 times slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rtl_dist-tests-")  # not the user's own
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WANDB_API_KEY"):
    os.environ.pop(_name, None)

# A shell starts what it puts in the background with SIGINT ignored, and tests send it to processes.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Two ranks of a test would meet on one GPU, and a GPU rounds otherwise than what tests compare
    with: only ``-m gpu`` sees those of this machine. Before anything imports torch."""
    asked = config.getoption("markexpr")
    if "gpu" not in asked.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def pytest_collection_finish():
    """Runs collect garbage often; all that was imported by now would take most of their time."""
    _freeze()
    atexit.register(gc.unfreeze)  # or triton would complain of what is never freed


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """So would what the tests of a file were the first to import, in all files behind it: after
    those of exports (transformers, onnx) a tiny prediction took seconds instead of a tenth."""
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze():
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture
def own_features(tmp_path, monkeypatch):
    """Features that other tests have kept are not found, nor this one's by them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def undrawn(monkeypatch):
    """Runs draw no report at their end, which takes longer than a tiny run."""
    monkeypatch.setattr("rtl_dist.report.run.draw_run", lambda run: None)


@pytest.fixture
def without_pictures(monkeypatch):
    """Pages and tables of runs and evaluations are written, and no picture, which takes longest."""
    for page in ("evaluation", "run"):
        monkeypatch.setattr(f"rtl_dist.report.{page}.draw", lambda path, make: None)


@pytest.fixture
def computed(monkeypatch):
    """The split of each view of features that is computed."""
    from rtl_dist.features import maker

    found: list[str] = []
    compute = maker.compute_view

    def note(plan, store, **arguments):
        found.append(plan.split.name)
        compute(plan, store, **arguments)

    monkeypatch.setattr(maker, "compute_view", note)
    return found
