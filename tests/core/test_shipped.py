"""What comes with the package is found from any folder; a user's own goes first."""

from rtl_dist.config import load_config
from rtl_dist.core.shipped import or_shipped
from rtl_dist.core.text import command
from rtl_dist.model.weights import find_weights


def test_shipped_configs_and_weights_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("configs/quickstart.yaml", [])
    weights, classes = find_weights(config.model.weights)
    assert weights.is_file()
    assert classes


def test_what_is_there_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").touch()
    for path in ("configs/quickstart.yaml", "configs/none.yaml", "none", "/configs/transfer.yaml"):
        assert str(or_shipped(path)) == path


def test_a_command_can_be_pasted():
    words = ("train", "data.path=a b/c #1", "run.dir=runs/it's")
    assert command(*words) == """rtl-dist train 'data.path=a b/c #1' 'run.dir=runs/it'"'"'s'"""
