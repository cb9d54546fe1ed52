"""Several ranks that need a GPU: what a CPU cannot show of them."""

import pytest
import torch
from killed_runs import Kill, run_ranks
from tiny_runs import make_dataset, tiny_config, write_config

from rtl_dist.training.step_boundary import StepBoundary

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path / "c.yaml", tiny_config(make_dataset(tmp_path), tmp_path / "run"))


def test_two_ranks_of_one_gpu_are_refused(config):
    if torch.cuda.device_count() > 1:
        pytest.skip("each would have its own")
    for one in run_ranks(config, world_size=2):
        assert one.code == 2, one.output
        assert "ranks 0 and 1 have the same GPU of " in one.last_line


def test_who_lost_a_peer_leaves_at_once(config):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    kill = Kill(place=StepBoundary.cross, call=3, rank=0)
    exits = run_ranks(config, "data.workers=2", world_size=2, fault=kill)
    assert exits[1].code == 1, exits[1].output
    assert "another process of this job ended" in exits[1].output


def test_bf16_is_as_the_hardware_has_it(config):
    has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    (one,) = run_ranks(config, "precision=bf16")
    assert one.code == (0 if has_it else 2), one.output


def test_float32_says_whether_it_is_tf32(config, tmp_path):
    (one,) = run_ranks(config, "precision=no")
    since_ampere = torch.cuda.get_device_capability() >= (8, 0)
    assert ("convolutions in TF32" in one.output) is since_ampere
    (one,) = run_ranks(config, "precision=no", "tf32=false", f"run.dir={tmp_path / 'exact'}")
    assert "convolutions in TF32" not in one.output


def test_a_run_told_to_use_cpus_leaves_the_gpu_alone(config):
    (one,) = run_ranks(config, "precision=auto", env={"ACCELERATE_USE_CPU": "True"})
    assert one.code == 0, one.output
    assert "on the CPU (" in one.output
