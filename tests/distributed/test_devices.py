"""On which device a process computes, and what is said of a GPU that cannot be used. What torch
says is torch 2.15's; no GPU is needed."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from killed_runs import Fault, replace_everywhere, run_ranks
from tiny_runs import make_dataset, tiny_config, write_config

from rtl_dist.core.errors import RtlDistError, UserError
from rtl_dist.distributed import devices, hardware, precision
from rtl_dist.distributed.devices import (
    gpu_place,
    local_gpu,
    uses_gpu,
    why_it_failed,
    why_not_one_each,
)
from rtl_dist.distributed.hardware import described
from rtl_dist.distributed.precision import precision_as_trained, resolve_precision
from rtl_dist.distributed.runtime import Runtime

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU"
    " driver by downloading and installing a new version from the URL:"
    " http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to install"
    " a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_KERNEL = (
    "CUDA error: no kernel image is available for execution on the device\nSearch for"
    " `cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/cuda/ for more information."
)
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might be"


def raising(error):
    def act(*_, **__):
        raise error

    return act


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One whose GPUs torch sees, or does not."""
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.2")

    def has(*, count=1, name="NVIDIA A100", capability=(8, 0), computes=None, file=True):
        """computes: raised by a kernel. count: that torch sees."""
        if file:
            (tmp_path / "nvidia0").touch()
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(cuda, "device_count", lambda: count)
        monkeypatch.setattr(cuda, "get_device_name", lambda _=None: name)
        monkeypatch.setattr(cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(cuda, "device", lambda _: nullcontext())
        has_bf16 = capability >= (8, 0)
        monkeypatch.setattr(
            cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
        )  # fmt: skip
        monkeypatch.setattr(cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
        ones = torch.ones
        works = lambda *a, device=None, **k: ones(*a, **k)  # noqa: E731
        monkeypatch.setattr(torch, "ones", works if computes is None else raising(computes))

    return has


# --- a GPU that is there and cannot be used ---


def test_a_driver_that_is_too_old_is_refused_with_the_cure(machine, monkeypatch):
    machine(count=0)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(TOO_OLD)))
    with pytest.raises(UserError) as caught:
        uses_gpu({})
    told = str(caught.value)
    assert "nvidia0) and it cannot be used: The NVIDIA driver on your system is too old" in told
    assert "(found version 12040); update it, or install a torch that is built for an older" in told
    assert told.endswith("set CUDA_VISIBLE_DEVICES=-1")
    assert "\n" not in told


def test_a_torch_without_cuda_beside_a_gpu_is_refused(machine, monkeypatch):
    machine(count=0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"built without CUDA; install a build with it"):
        uses_gpu({})


def test_a_number_that_no_gpu_has_is_named(machine, monkeypatch):
    machine(count=0)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError("No CUDA GPUs are available")))
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES='7' names none of them"):
        uses_gpu({"CUDA_VISIBLE_DEVICES": "7"})


@pytest.mark.parametrize(
    ("name", "capability", "cure"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), "up to 2.14, built for CUDA 12.6"),
        ("Tesla P100-PCIE-16GB", (6, 0), "up to 2.14, built for CUDA 12.6"),
        ("NVIDIA R200", (13, 0), "install a newer torch"),
    ],
)
def test_a_card_without_kernels_is_refused_by_its_name(machine, name, capability, cure):
    machine(name=name, capability=capability, computes=torch.AcceleratorError(NO_KERNEL))
    with pytest.raises(UserError) as caught:
        uses_gpu({})
    told = str(caught.value)
    at = f"{capability[0]}.{capability[1]}"
    assert f"GPU 0 ({name}, compute capability {at}) cannot be used: no kernel image is" in told
    assert "has kernels for compute capability 7.5, 9.0, 12.0; install" in told
    assert cure in told
    assert "\n" not in told


def test_a_gpu_that_others_have_is_refused(machine):
    machine(computes=torch.AcceleratorError(BUSY))
    with pytest.raises(UserError, match=r"cannot be used: CUDA-capable device\(s\) is/are busy or"):
        uses_gpu({})
    machine(computes=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."))
    with pytest.raises(UserError, match=r"no memory left for this process: others have it"):
        uses_gpu({})


def test_no_gpu_hidden_ones_and_those_of_others_are_no_fault(machine, monkeypatch):
    machine(count=0, file=False)
    assert not uses_gpu({})
    machine(count=0)
    for hidden in ("", "-1", "-1,-1", "NoDevFiles"):  # launch/cpu.yaml says -1,-1
        assert not uses_gpu({"CUDA_VISIBLE_DEVICES": hidden})
    monkeypatch.setattr(os, "open", raising(PermissionError()))  # as a scheduler's cgroup has it
    assert not uses_gpu({})


@pytest.mark.parametrize("value", ["True", "true", "1", "yes"])  # accelerate writes True
def test_accelerate_s_cpu_is_taken_before_a_gpu(machine, value):
    machine(computes=AssertionError("it is not touched"))
    assert not uses_gpu({"ACCELERATE_USE_CPU": value})
    with pytest.raises(UserError, match="it is not touched"):
        uses_gpu({"ACCELERATE_USE_CPU": "False"})


def test_a_run_on_cpus_beside_a_gpu_takes_its_precision_from_them(machine, monkeypatch):
    machine(capability=(7, 5))  # auto would be fp16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with Runtime("auto") as runtime:
        assert runtime.device.type == "cpu"
        assert runtime.precision in ("bf16", "no")
        assert runtime.accelerator.scaler is None


def test_a_start_with_an_unusable_gpu_ends_with_one_line(machine, monkeypatch, tmp_path, capfd):
    from rtl_dist.train import main

    machine(count=0)
    monkeypatch.setattr(torch.cuda, "init", raising(RuntimeError(TOO_OLD)))
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "d", tmp_path / "run"))
    assert main(["--config", config]) == 2
    told = capfd.readouterr().err
    assert told.startswith("rtl-dist: there is a GPU here (")
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_fails_while_it_computes_is_told_and_a_fault_of_ours_is_not(
    machine, monkeypatch
):
    machine(capability=(9, 0), name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    more = "\nCUDA kernel errors might be asynchronously reported at some other API call"
    failed = torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{more}")
    told = why_it_failed(failed)
    assert "GPU 3 (NVIDIA H100, compute capability 9.0) of " in told
    assert "failed: uncorrectable ECC error encountered; the kernel's log may say why" in told
    assert "\n" not in told
    assert (
        why_it_failed(torch.AcceleratorError(f"CUDA error: device-side assert triggered{more}"))
        is None
    )
    assert why_it_failed(RuntimeError("CUDA error: unknown error")) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(RtlDistError, match="uncorrectable ECC error encountered"), Runtime("no"):
        raise failed


# --- one GPU a process ---


@pytest.mark.parametrize(
    ("rank", "visible", "own"), [(0, 1, 0), (3, 1, 0), (3, 8, 3), (5, 4, 1), (0, 0, 0)]
)
def test_each_takes_the_gpu_of_its_number_or_the_only_one(monkeypatch, rank, visible, own):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert local_gpu({"LOCAL_RANK": str(rank)}) == own


def test_two_ranks_of_one_gpu_are_found_and_others_are_not(monkeypatch):
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    one, other = ("node1", "00:1b:00"), ("node1", "00:1c:00")
    elsewhere = ("node2", "00:1b:00")
    assert why_not_one_each([one, other, elsewhere, None, None]) is None
    told = why_not_one_each([other, one, elsewhere, one])
    assert "ranks 1 and 3 have the same GPU of node1 (at 00:1b:00): start 2 process(es)" in told
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert why_not_one_each([one, one]) is None


class OneGpu(Fault):
    """All see the same."""

    def install(self, mark):
        replace_everywhere(gpu_place, lambda _: lambda device: ("node1", "00:1b:00"))


def test_two_processes_on_one_gpu_are_refused_before_nccl_is(tmp_path):
    config = write_config(
        tmp_path / "c.yaml", tiny_config(make_dataset(tmp_path), tmp_path / "run")
    )
    exits = run_ranks(config, world_size=2, fault=OneGpu(rank=None))
    assert [one.code for one in exits] == [2, 2], exits
    for one in exits:
        assert "ranks 0 and 1 have the same GPU of node1" in one.last_line
    assert not (tmp_path / "run").exists()


def test_ddp_is_told_no_device_number(monkeypatch):
    """accelerate hands on that of the rank, 1 here, where the network is on the only GPU, 0."""
    given = []

    class Wrapped(torch.nn.Module):
        def __init__(self, network, *, device_ids="none", output_device="none", **_):
            super().__init__()
            given.append((device_ids, output_device))

    with Runtime("no") as runtime:
        monkeypatch.setattr(type(runtime.accelerator), "multi_device", True)
        runtime.accelerator.state.local_process_index = 1  # forgotten when it is closed
        monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapped)
        runtime.wrap(torch.nn.Linear(2, 2))
        runtime.accelerator.prepare_model(torch.nn.Linear(2, 2))
    assert given == [(None, None), ([1], 1)]
    assert "ACCELERATE_BYPASS_DEVICE_MAP" not in os.environ


@pytest.mark.gpu
def test_a_rank_of_another_number_trains_on_the_only_gpu_that_it_sees(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config = write_config(
        tmp_path / "c.yaml", tiny_config(make_dataset(tmp_path), tmp_path / "run")
    )
    env = {"LOCAL_RANK": "1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": "29533", "CUDA_VISIBLE_DEVICES": "0"}  # fmt: skip
    (one,) = run_ranks(config, env=env)
    assert one.code == 0, one.output
    assert "on 1 GPU" in one.output


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_used_and_has_a_place():
    assert uses_gpu({})
    host, place = gpu_place(torch.device("cuda", 0))
    assert host
    assert place.count(":") == 2


# --- precision ---


@pytest.mark.parametrize("wanted", ["auto", "no", "fp16", "fp64"])
def test_a_t4_computes_in_what_it_has(machine, wanted):
    machine(name="Tesla T4", capability=(7, 5))
    expected = "fp16" if wanted == "auto" else wanted
    assert resolve_precision(wanted, on_gpu=True) == expected


def test_bf16_that_is_emulated_is_refused_wherever_it_comes_from(machine, monkeypatch):
    machine(name="Tesla T4", capability=(7, 5))
    with pytest.raises(
        UserError, match=r"bf16 is emulated, and slow, on Tesla T4; set precision=f"
    ):
        resolve_precision("bf16", on_gpu=True)
    machine(capability=(8, 0))
    assert resolve_precision("bf16", on_gpu=True) == "bf16"


@pytest.mark.parametrize(
    ("trained", "count", "capability", "expected"),
    [
        ("bf16", 1, (7, 5), "auto"), ("bf16", 1, (8, 0), "bf16"), ("bf16", 0, None, "bf16"),
        ("fp16", 1, (7, 5), "fp16"), ("fp16", 0, None, "auto"), ("no", 1, (7, 5), "no"),
    ],
)  # fmt: skip
def test_an_evaluation_is_in_the_precision_of_the_training_where_it_can(
    machine, trained, count, capability, expected
):
    machine(count=count, capability=capability or (0, 0), file=False)
    assert precision_as_trained(trained) == expected


def test_tf32_is_said_and_can_be_kept_out(machine, monkeypatch):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    machine(count=0, file=False)
    gpu = torch.device("cuda", 0)
    try:
        for tf32, seen in ((True, "no"), (False, "no, without TF32")):
            torch.backends.cuda.matmul.allow_tf32 = True  # as NVIDIA's containers have it
            with Runtime("no", tf32=tf32) as runtime:
                assert runtime.precision_in_words == seen  # older features are found by the first
                assert torch.backends.cudnn.allow_tf32 is tf32
                assert torch.backends.cuda.matmul.allow_tf32 is False
            machine(capability=(8, 0), file=False)
            said = described(gpu, "no", local_world_size=1)
            assert ("(float32, convolutions in TF32" in said) is tf32
            machine(capability=(7, 5), file=False)
            assert "TF32" not in described(gpu, "no", local_world_size=1)
            machine(count=0, file=False)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("cpus", "job", "said"), [(1, "7", True), (3, "7", True), (4, "7", False), (1, None, False)]
)
def test_few_cores_beside_gpus_are_said_where_more_can_be_asked_for(
    machine, monkeypatch, cpus, job, said
):
    machine(count=4, name="NVIDIA L4", capability=(8, 9))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    gpu = SimpleNamespace(type="cuda")
    told = hardware.shortfall(gpu, local_world_size=4, cpus=cpus)
    assert [f"{cpus} CPU(s)" in line and "--cpus-per-task=32" in line for line in told] == (
        [True] if said else []
    )


def test_kernels_are_deterministic_unless_the_fastest_are_asked_for(machine):
    machine(count=0, file=False)
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    gpu = torch.device("cuda", 0)
    try:
        with Runtime("no") as runtime:
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
            assert runtime.precision_in_words == "no"  # older features are found by it
        with Runtime("no", deterministic=False) as runtime:
            assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
            assert runtime.precision_in_words == "no, by the fastest kernels"
        machine(capability=(8, 0), file=False)
        assert "the fastest kernels (deterministic: false)" in described(
            gpu, "no", local_world_size=1
        )
        cudnn.benchmark = False
        assert "kernels" not in described(gpu, "no", local_world_size=1)
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def test_the_first_line_names_the_gpus(machine):
    machine(count=4, name="NVIDIA L4", capability=(8, 9))
    gpu = SimpleNamespace(type="cuda")
    assert described(gpu, "bf16", local_world_size=4).startswith(
        "4 of 4 GPUs (NVIDIA L4), precision"
    )
    machine(count=1, name="NVIDIA L4", capability=(8, 9))
    assert described(gpu, "bf16", local_world_size=4).startswith("1 GPU each (NVIDIA L4)")
    assert described(gpu, "bf16", local_world_size=1).startswith("1 GPU (NVIDIA L4)")
    assert hardware.shortfall(gpu, local_world_size=4, cpus=1) == []
    assert precision.computes_in_tf32(torch.device("cpu")) is False
