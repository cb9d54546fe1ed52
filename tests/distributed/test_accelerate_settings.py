"""What accelerate's launcher hands on changes no run: the config decides, or a line refuses."""

import pytest
import torch
from tiny_runs import make_dataset, require_equal_runs, tiny_config, train, write_config

from rtl_dist.distributed import runtime
from rtl_dist.train import main

SGD = {
    "stages": [{"name": "all", "steps": 2, "lr": 0.1, "batchnorm": "train"}],
    "optim": {"name": "sgd", "clip_grad_norm": None},
    "compile": False,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("undrawn", "threads_as_before")
def test_the_same_config_gives_the_same_bytes_whatever_the_launcher_s_file_says(
    dataset, tmp_path, monkeypatch, capfd
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plain = train(tmp_path, dataset, "plain", **SGD)
    capfd.readouterr()
    for name, value in {
        "DYNAMO_BACKEND": "EAGER",
        "DYNAMO_MODE": "default",
        "GRADIENT_ACCUMULATION_STEPS": "4",
        "GRADIENT_CLIPPING": "0.001",
        "MIXED_PRECISION": "bf16",
        "DOWNCAST_BF16": "true",
        "FP8_BACKEND": "MSAMP",
        "DEBUG_MODE": "nonsense",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    launched = train(tmp_path, dataset, "launched", **SGD)
    require_equal_runs(plain, launched)
    told = capfd.readouterr().err
    assert "dynamo_backend: EAGER (the config's compile decides)" in told
    assert "gradient_accumulation_steps: 4 (the config's batch.micro decides)" in told


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config"),
        ("ACCELERATE_TORCH_DEVICE", "meta", "CUDA_VISIBLE_DEVICES"),
        ("ACCELERATE_USE_CPU", "perhaps", "the launcher's environment cannot be used"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', not a whole number"),
        ("LOCAL_RANK", "x", "the launcher's environment cannot be used"),
    ],
)
def test_what_cannot_be_overruled_is_refused_in_a_line(
    dataset, tmp_path, monkeypatch, capfd, name, value, said
):
    monkeypatch.setenv(name, value)
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run", **SGD))
    assert main(["--config", config]) == 2
    err = capfd.readouterr().err
    assert name in err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("value", ["1", "auto", "0"])
def test_an_accumulation_that_is_no_number_of_ours_is_left_alone(
    dataset, tmp_path, monkeypatch, value
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    train(tmp_path, dataset, **{**SGD, "stages": [{"name": "a", "steps": 1, "lr": 0.1}]})


@pytest.mark.usefixtures("threads_as_before")
@pytest.mark.parametrize(("by_accelerate", "threads"), [(True, 2), (False, 1)])
def test_one_thread_is_the_user_s_choice_but_not_accelerate_s(monkeypatch, by_accelerate, threads):
    monkeypatch.setattr(runtime, "own_cpus", lambda: frozenset({3, 5}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if by_accelerate:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    torch.set_num_threads(1)
    with runtime.Runtime("no"):
        assert torch.get_num_threads() == threads
