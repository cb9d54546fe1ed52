"""The microbatch: the configured one, or the largest that every process's memory takes."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import tiny_config
from torch import nn

from rtl_dist.config import parse_config
from rtl_dist.core.errors import UserError
from rtl_dist.training import memory
from rtl_dist.training.memory import resolve_micro_batch_size


class Ranks:
    """A runtime whose other ranks' verdicts are ``others``, called with the number of the try."""

    def __init__(self, world_size=1, *, device="cpu", others=()):
        self.world_size, self.device, self.dtype = world_size, torch.device(device), torch.float32
        self.accelerator = SimpleNamespace(autocast=nullcontext)
        self._others, self._tries = others, 0

    def gather(self, item):
        self._tries += 1
        return [item, *(other(self._tries - 1) for other in self._others)]


def config_of(micro, *, total=16, **changes):
    batch = {"global": total, "micro": micro}
    return parse_config(tiny_config(Path("data"), Path("run"), batch=batch, **changes))


def test_the_configured_one_where_processes_can_share_it():
    for world_size in (1, 2, 4):
        assert resolve_micro_batch_size(config_of(4), Ranks(world_size), num_classes=3) == 4
    with pytest.raises(
        UserError,
        match=r"4 microbatches \(global 16 / micro 4\) cannot be shared equally by 3 processes; add"
        r" batch.global=18 batch.micro=2 to the command \(.*\), or start 1 or 2 processes",
    ):
        resolve_micro_batch_size(config_of(4), Ranks(3), num_classes=3)
    with pytest.raises(
        UserError, match=r"1 microbatch .* add batch.micro=8 to .*, or start 1 process$"
    ):
        resolve_micro_batch_size(config_of(16), Ranks(2), num_classes=3)


@pytest.mark.parametrize(
    ("total", "world_size", "expected"),
    [(16, 1, 16), (16, 4, 4), (256, 1, 32), (256, 2, 32), (96, 2, 24), (48, 1, 24), (6, 2, 3)],
)
def test_on_a_cpu_it_is_the_largest_divisor_up_to_32(total, world_size, expected):
    config = config_of("auto", total=total)
    assert resolve_micro_batch_size(config, Ranks(world_size), num_classes=3) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_batch_that_processes_cannot_share_is_refused(device):
    with pytest.raises(
        UserError,
        match=r"batch.global: 16 cannot be shared equally by 3 processes; add batch.global=18 to the"
        " command, or start 1 or 2 processes",
    ):
        resolve_micro_batch_size(config_of("auto"), Ranks(3, device=device), num_classes=3)


@pytest.mark.parametrize(
    ("total", "world_size", "expected"),
    [(16, 1, [16, 8, 4, 2, 1]), (18, 2, [9, 3, 1]), (2048, 2, [512, 256, 128, 64, 32])],
)
def test_on_a_gpu_the_divisors_of_a_rank_s_share_are_tried(
    monkeypatch, total, world_size, expected
):
    tried = []
    monkeypatch.setattr(
        memory, "largest_that_fits", lambda config, runtime, sizes, n: tried.append(sizes) or 7
    )
    runtime = Ranks(world_size, device="cuda")
    config = config_of("auto", total=total)
    assert resolve_micro_batch_size(config, runtime, num_classes=3) == 7
    assert tried[0][: len(expected)] == expected


class Hungry(nn.Module):
    """Takes up to ``most`` images, and ``most_back`` in the backward pass."""

    def __init__(self, most: int, most_back: int = 10**9):
        super().__init__()
        self.most, self.most_back = most, most_back
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        assert self.training or len(images) == 1  # BatchNorm cannot learn from one
        assert self.weight.grad is None or self.seen[-1] == self.seen[-2]  # freed between sizes
        if len(images) > self.most:
            raise torch.OutOfMemoryError("too many images")
        scores = images.float().mean((1, 2, 3)) * self.weight
        if len(images) > self.most_back:
            scores.register_hook(self._fail)
        return scores

    def _fail(self, gradient):
        raise torch.OutOfMemoryError("too many activations")


@pytest.fixture
def hungry(monkeypatch):
    def make(*limits):
        model = Hungry(*limits)
        monkeypatch.setattr(memory, "make_classifier", lambda *_, **__: model)
        return model

    return make


SIZES = [16, 8, 4, 2, 1]


@pytest.mark.parametrize(("limits", "expected"), [((99,), 16), ((8,), 8), ((5,), 4), ((9, 2), 2)])
def test_the_first_that_fits_is_taken(hungry, limits, expected):
    model = hungry(*limits)
    assert memory.largest_that_fits(config_of("auto"), Ranks(), SIZES, 3) == expected
    tried = list(dict.fromkeys(shape[0] for shape in model.seen))
    assert tried == SIZES[: SIZES.index(expected) + 1]
    assert len(model.seen) == len(tried) + 1  # what fits is tried for a second step


def test_the_largest_image_of_any_stage_counts(hungry):
    model = hungry(99)
    stages = [
        {"name": "small", "steps": 1, "lr": 0.1, "image_size": 8},
        {"name": "large", "steps": 1, "lr": 0.1, "image_size": 24},
        {"name": "plain", "steps": 1, "lr": 0.1},  # of 16
    ]
    config = config_of("auto", stages=stages, data__channels=1)
    memory.largest_that_fits(config, Ranks(), [4], 3)
    assert set(model.seen) == {(4, 1, 24, 24)}


def test_it_fits_where_it_fits_on_every_rank(hungry):
    hungry(99)
    runtime = Ranks(3, others=[lambda number: SIZES[number] <= 8, lambda number: number >= 2])
    assert memory.largest_that_fits(config_of("auto"), runtime, SIZES, 3) == 4
    hungry(2)
    runtime = Ranks(2, others=[lambda number: True])
    assert memory.largest_that_fits(config_of("auto"), runtime, SIZES, 3) == 2


def test_not_one_image_is_refused(hungry):
    hungry(0)
    with pytest.raises(UserError, match=r"not one image of 16 x 16 fits .* smaller model"):
        memory.largest_that_fits(config_of("auto"), Ranks(), SIZES, 3)


def test_another_error_is_none_of_memory(hungry, monkeypatch):
    model = hungry(99)
    monkeypatch.setattr(model, "forward", lambda images: images.no_such_thing)
    with pytest.raises(AttributeError):
        memory.largest_that_fits(config_of("auto"), Ranks(), SIZES, 3)


@pytest.mark.gpu
def test_on_a_real_gpu_some_of_the_memory_is_left(monkeypatch):
    free, _ = torch.cuda.mem_get_info()
    monkeypatch.setattr(memory, "USABLE", 0.5)

    class Large(Hungry):
        def forward(self, images):
            scores = super().forward(images)
            taken = torch.empty(len(images) * free // 20, dtype=torch.uint8, device="cuda")
            return scores + taken[0] * 0

    monkeypatch.setattr(memory, "make_classifier", lambda *_, **__: Large(99))
    runtime = Ranks(device="cuda")
    assert memory.largest_that_fits(config_of("auto"), runtime, SIZES, 3) == 8
