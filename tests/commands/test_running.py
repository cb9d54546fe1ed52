"""The collector rests while a command imports torch for the first time, and only then."""

import gc
import sys

import pytest

from rtl_dist.commands.running import first_imports


@pytest.fixture
def fresh_process(monkeypatch):
    """As if torch had not been imported yet; see also ``pytest_collection_finish``."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("fresh_process")
def test_what_is_imported_is_not_searched_for_garbage():
    with first_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


@pytest.mark.usefixtures("fresh_process")
def test_the_collector_goes_on_after_an_import_that_failed():
    with pytest.raises(ImportError), first_imports():
        raise ImportError
    assert gc.isenabled()


def test_nothing_is_done_where_torch_is_there_already(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("it was frozen"))
    with first_imports():
        assert gc.isenabled()


@pytest.mark.usefixtures("fresh_process")
def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with first_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
