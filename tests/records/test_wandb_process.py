"""What is kept of W&B's, and whether it is asked at all."""

import os
import shutil
from pathlib import Path

import pytest

from rtl_dist.records import wandb_process
from rtl_dist.records.wandb_process import wandb_mode

CANARY = "0123deadbeefcafe0123deadbeefcafe01234567"


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}"])
def test_an_id_file_that_is_damaged_is_no_id(tmp_path, content):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id.json").write_text(content)
    assert wandb_process.kept_id(tmp_path) is None


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


def test_what_the_config_says_outright_is_obeyed(logged_out, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert [wandb_mode(said) for said in ("off", "online", "offline")] == [
        "disabled",
        "online",
        "offline",
    ]


@pytest.mark.parametrize(
    ("said", "mode"),
    [
        ("online", "online"),
        ("offline", "offline"),
        ("disabled", "disabled"),
        ("run", "online"),
        ("dryrun", "offline"),
        ("", "offline"),
        ("nonsense", "offline"),
    ],
)
def test_auto_does_as_the_environment_says(logged_out, monkeypatch, said, mode):
    monkeypatch.setenv("WANDB_MODE", said)
    assert wandb_mode("auto") == mode


def test_auto_is_online_with_a_key(logged_out, monkeypatch):
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"


@pytest.mark.parametrize(
    ("content", "url", "mode"),
    [
        (b"machine api.wandb.ai\n  login user\n  password k\n", "", "online"),
        (b"machine api.forge.coreweave.com\n  login user\n  password k\n", "", "online"),
        (b"machine example.com\n  login user\n  password k\n", "", "offline"),
        (b"machine w.example.com\n  login user\n  password k\n", "https://w.example.com", "online"),
        (b"machine api.wandb.ai\n  login user\n  password k\n", "https://w.example.com", "offline"),
        (b"machine api.wandb.ai login\n", "", "offline"),
        (b"\xff\xfe\x00", "", "offline"),
        (b"machine api.wandb.ai\n  login user\n  password k\n", "http://[", "offline"),
    ],
)
def test_auto_is_online_with_a_key_in_netrc(tmp_path, logged_out, monkeypatch, content, url, mode):
    (tmp_path / ".netrc").write_bytes(content)
    (tmp_path / ".netrc").chmod(0o644)  # W&B does not mind, either
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert wandb_mode("auto") == mode
    shutil.move(tmp_path / ".netrc", tmp_path / "elsewhere")
    assert wandb_mode("auto") == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "elsewhere"))
    assert wandb_mode("auto") == mode
