"""Checkpoints are whole or not there."""

import errno
import logging

import pytest
import torch
from torch import nn

import rtl_dist.checkpoint as room
from rtl_dist.checkpoint import (
    Snapshot,
    load_newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from rtl_dist.errors import RtlDistError, UserError
from rtl_dist.state import Best, TrainState


def snapshot(step: int) -> Snapshot:
    best = Best(value=0.5, metric="val/top1", loss=0.1 + 0.2, step=3, epoch=1.5, stage="head")
    return Snapshot(
        state=TrainState(step=step, best=best, since_log=[1, 2**60], elapsed_s=0.1),
        model={"w": torch.full((2, 3), float(step)).to(memory_format=torch.contiguous_format)},
        optimizer={"exp_avg/w": torch.ones(2, 3)},
        ema={},
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
        patch.setattr(room, "flush_to_disk", full)
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
    state = Snapshot(state=TrainState(step=3), model=net.state_dict(), ema={}, scaler={},
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
