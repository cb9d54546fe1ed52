"""Checkpoints are whole or not there."""

import errno
import logging
import os
import resource
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import rtl_dist.records.checkpoint as room
from rtl_dist.core import whole_folder
from rtl_dist.core.errors import RtlDistError, UserError
from rtl_dist.optim.named_state import optimizer_tensors, restore_optimizer
from rtl_dist.records.checkpoint import (
    Snapshot,
    load_checkpoint_of,
    load_newest_checkpoint,
    save_checkpoint,
)
from rtl_dist.records.state import Best, TrainState


def snapshot(step: int) -> Snapshot:
    best = Best(value=0.5, metric="val/top1", loss=0.1 + 0.2, step=3, epoch=1.5, stage="head")
    return Snapshot(
        state=TrainState(step=step, best=best, since_log=[1, 2**60], elapsed_s=0.1),
        model={"w": torch.full((2, 3), float(step)).to(memory_format=torch.contiguous_format)},
        optimizer={"exp_avg/w": torch.ones(2, 3)},
        ema={},
        stage_best={},
        scaler={"scale": 65536.0},
        identity={"classes": ["a", "b"]},
    )


def test_what_is_saved_comes_back(tmp_path):
    saved = snapshot(7)
    save_checkpoint(tmp_path, saved, keep=2)
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded.state == saved.state
    assert (loaded.scaler, loaded.identity) == (saved.scaler, saved.identity)
    assert torch.equal(loaded.model["w"], saved.model["w"])
    assert torch.equal(loaded.optimizer["exp_avg/w"], saved.optimizer["exp_avg/w"])


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, snapshot(step), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_one_is_passed_over_loudly(tmp_path, caplog, name, damage, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rtl_dist"), "propagate", True)
    save_checkpoint(tmp_path, snapshot(1), keep=2)
    victim = save_checkpoint(tmp_path, snapshot(2), keep=2) / name
    content = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        victim.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    assert load_newest_checkpoint(tmp_path).state.step == 1
    assert "falling back to an older one" in caplog.text
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").unlink()
    with pytest.raises(UserError, match="is whole; delete that folder to start over"):
        load_newest_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_newer_ones_do_not_crowd_out_what_is_saved_next(tmp_path, keep):
    for step in (10, 20, 30):
        folder = save_checkpoint(tmp_path, snapshot(step), keep=3)
        if step > 10:
            (folder / "state.json").unlink()
    assert load_newest_checkpoint(tmp_path).state.step == 10
    save_checkpoint(tmp_path, snapshot(15), keep=keep)
    assert load_newest_checkpoint(tmp_path).state.step == 15
    assert len(list((tmp_path / "checkpoints").iterdir())) == keep


def test_one_of_another_version_is_not_called_damaged(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, snapshot(1), keep=1)
    monkeypatch.setattr(room, "SCHEMA", 2)
    with pytest.raises(UserError, match="is of schema 1, this version reads 2"):
        load_newest_checkpoint(tmp_path)


def test_an_unfinished_one_is_not_one(tmp_path):
    save_checkpoint(tmp_path, snapshot(1), keep=2)
    (tmp_path / "checkpoints" / ".incomplete-step-00000002").mkdir()
    assert load_newest_checkpoint(tmp_path).state.step == 1
    assert load_newest_checkpoint(tmp_path / "nowhere") is None


def test_a_full_disk_leaves_the_older_ones_untouched(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, snapshot(1), keep=1)
    calls = []

    def full(path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(whole_folder, "flush_to_disk", full)
        with pytest.raises(RtlDistError, match="No space left on device; free space"):
            save_checkpoint(tmp_path, snapshot(2), keep=1)
    assert len(calls) == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_newest_checkpoint(tmp_path).state.step == 1


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
        groups = [{"params": net[1].parameters(), "lr": 0.1}, {"params": net[0].parameters()}]
        if kind == "sgd":
            return net, torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        return net, torch.optim.AdamW(groups, lr=0.01)

    def train(net, optimizer, steps):
        for step in steps:
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()

    def names(net):
        return {id(p): name for name, p in net.named_parameters()}

    net, optimizer = make()
    train(net, optimizer, range(6))
    undisturbed = {name: value.clone() for name, value in net.state_dict().items()}

    net, optimizer = make()
    train(net, optimizer, range(3))
    state = Snapshot(state=TrainState(step=3), model=net.state_dict(), ema={}, stage_best={}, scaler={},
                     optimizer=optimizer_tensors(optimizer, names(net)), identity={})  # fmt: skip
    save_checkpoint(tmp_path, state, keep=1)
    loaded = load_newest_checkpoint(tmp_path)
    net, optimizer = make()
    net.load_state_dict(loaded.model)
    restore_optimizer(optimizer, names(net), loaded.optimizer)
    train(net, optimizer, range(3, 6))
    assert all(torch.equal(net.state_dict()[k], undisturbed[k]) for k in undisturbed)
    other, _ = make()
    with pytest.raises(UserError, match="this stage does not train it"):
        restore_optimizer(torch.optim.AdamW([other[0].weight]), names(other), loaded.optimizer)


def test_a_disk_that_fills_while_tensors_are_written(tmp_path):
    """safetensors has an error of its own for it."""
    save_checkpoint(tmp_path, snapshot(1), keep=2)
    large = snapshot(2)
    large.model = {"w": torch.zeros(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(RtlDistError, match=r"cannot write checkpoint .*step-00000002: .*large"):
            save_checkpoint(tmp_path, large, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_newest_checkpoint(tmp_path).state.step == 1


def test_tensors_in_any_memory_layout_go_on_bit_for_bit(tmp_path):
    """Kernels are channels_last in training, but files hold plain rows."""

    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(2))
        net(torch.zeros(1, 3, 6, 6))
        net.to(memory_format=torch.channels_last)
        return net, torch.optim.AdamW(net.parameters(), lr=0.01)

    def train(net, optimizer, steps):
        for step in steps:
            inputs = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(inputs.to(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()

    def names(net):
        return {id(p): name for name, p in net.named_parameters()}

    net, optimizer = make()
    train(net, optimizer, range(3))
    tensors = optimizer_tensors(optimizer, names(net))
    assert not tensors["exp_avg/0.weight"].is_contiguous()
    state = snapshot(3)
    state.model, state.optimizer = net.state_dict(), tensors
    save_checkpoint(tmp_path, state, keep=1)
    train(net, optimizer, range(3, 6))
    loaded = load_newest_checkpoint(tmp_path)
    other, optimizer = make()
    other.load_state_dict(loaded.model)
    restore_optimizer(optimizer, names(other), loaded.optimizer)
    train(other, optimizer, range(3, 6))
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_one_changed_number_is_damage(tmp_path, name):
    """What still reads well is found by the checksum alone."""
    save_checkpoint(tmp_path, snapshot(1), keep=2)
    file = save_checkpoint(tmp_path, snapshot(2), keep=2) / name
    content = file.read_bytes()
    if name == "state.json":
        changed = content.replace(b'"step": 2', b'"step": 9')
    else:
        changed = content[:-1] + bytes([content[-1] ^ 1])
    assert changed != content
    file.write_bytes(changed)
    assert load_newest_checkpoint(tmp_path).state.step == 1


def test_what_another_rank_found_is_waited_for(tmp_path):
    """On a network disk a host may see a new folder late, or a part of it."""
    folder = save_checkpoint(tmp_path, snapshot(4), keep=2)
    hidden = folder.rename(tmp_path / "hidden")
    showing = threading.Timer(0.5, lambda: hidden.rename(folder))
    showing.start()
    assert load_checkpoint_of(tmp_path, 4).state.step == 4
    showing.join()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(RtlDistError, match="all hosts see alike"):
        load_checkpoint_of(tmp_path, 4, patience_s=0.1)


def test_a_folder_of_a_user_s_own_is_no_checkpoint(tmp_path):
    own = tmp_path / "checkpoints" / "step-best"
    own.mkdir(parents=True)
    save_checkpoint(tmp_path, snapshot(4), keep=1)
    save_checkpoint(tmp_path, snapshot(8), keep=1)
    assert load_newest_checkpoint(tmp_path).state.step == 8
    assert own.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_what_is_loaded_does_not_hang_on_files_that_go(tmp_path):
    """A mapped file that another host deletes would end the process (SIGBUS)."""
    folder = save_checkpoint(tmp_path, snapshot(4), keep=1)
    loaded = load_newest_checkpoint(tmp_path)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert loaded.model["w"].eq(4).all()


def test_a_disk_that_cannot_flush_folders(tmp_path, monkeypatch):
    flush = os.fsync

    def cannot(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", cannot)
    save_checkpoint(tmp_path, snapshot(4), keep=1)
    assert load_newest_checkpoint(tmp_path).state.step == 4
