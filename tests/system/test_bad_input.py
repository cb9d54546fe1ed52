"""A user's mistake ends with one line that names what is wrong and the cure, and its exit code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sealed_sets import broken_png, put, reseal
from tiny_runs import damage, make_dataset, tiny_config, write_config, write_images

from rtl_dist.cli import main as cli
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.description import DESCRIPTION, fingerprint_of
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.train import main


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def copy(tmp_path: Path, dataset: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("rtl-dist: ")
    return lines[-1]


def refused(tmp_path: Path, data: Path, *overrides: str, code: int, **changes: object) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "c.yaml", tiny_config(data, run, **changes))
    assert main(["--config", config, *overrides]) == code
    assert not (run / "checkpoints").exists()


def test_unknown_key(tmp_path, dataset, capsys):
    refused(tmp_path, dataset, "optim.wieght_decay=0", code=2)
    assert "optim.wieght_decay; did you mean weight_decay?" in one_line(capsys)


def test_wrong_type(tmp_path, dataset, capsys):
    refused(tmp_path, dataset, "stages.0.lr=fast", code=2)
    assert "stages.0.lr: expected a number, found 'fast'" in one_line(capsys)


def test_no_data_set(tmp_path, capsys):
    refused(tmp_path, tmp_path / "nowhere", code=3)
    assert "rtl-dist pack SOURCE" in one_line(capsys)


def test_unknown_split(tmp_path, dataset, capsys):
    refused(tmp_path, dataset, "data.val=valid", code=3)
    assert "no split 'valid'; it has: train, val, test" in one_line(capsys)


def test_truncated_shard(tmp_path, copy, capsys):
    shard = copy / open_dataset(copy).split("train").shards[0].path
    shard.write_bytes(shard.read_bytes()[:-600])
    refused(tmp_path, copy, code=3)
    assert f"shard {shard} was truncated" in one_line(capsys)


def test_missing_shard(tmp_path, copy, capsys):
    shard = copy / open_dataset(copy).split("val").shards[0].path
    shard.unlink()
    refused(tmp_path, copy, code=3)
    assert f"shard {shard} cannot be opened" in one_line(capsys)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_png_that_would_end_its_decoder_in_a_data_set_that_says_we_packed_it(
    tmp_path, copy, capsys, workers
):
    content = SampleReader(open_dataset(copy).split("train")).read(7)
    put(copy, 7, broken_png(content))
    reseal(copy)
    stages = [{"name": "all", "epochs": 1, "trainable": "all", "lr": 1e-3}]
    changes = {"stages": stages, "data__workers": workers, "eval": {"every": "9 epochs"}}
    refused(tmp_path, copy, code=3, checkpoint={"every": "9 epochs"}, **changes)
    line = one_line(capsys)
    assert "sample 7 of split 'train' (key " in line
    assert "cannot be decoded: the PNG's data" in line
    config = tiny_config(copy, tmp_path / "replaced", data__bad_samples=1, **changes)
    assert main(["--config", write_config(tmp_path / "c.yaml", config)]) == 0
    results = json.loads((tmp_path / "replaced" / "results.json").read_text())
    assert results["bad_samples"]["count"] == 1


def test_damaged_sample_in_the_middle_of_training(tmp_path, copy, capsys):
    damage(copy, "train", 0)
    stages = [{"name": "all", "epochs": 2, "trainable": "all", "lr": 1e-3}]
    refused(tmp_path, copy, code=3, stages=stages, checkpoint={"every": "9 epochs"})
    line = one_line(capsys)
    assert "sample 0 of split 'train' (key " in line
    assert "fails its checksum" in line


def test_damaged_sample_in_evaluation_is_never_skipped(tmp_path, copy, capsys):
    damage(copy, "val", 2)
    config = write_config(tmp_path / "c.yaml", tiny_config(copy, tmp_path / "run"))
    assert main(["--config", config]) == 3
    assert "cannot evaluate exactly: sample 2 of split 'val'" in one_line(capsys)


def rewrite(dataset: Path, change) -> None:
    """Edits the description as somebody would who also corrects the fingerprint."""
    path = dataset / DESCRIPTION
    description = json.loads(path.read_text())
    change(description)
    description["fingerprint"] = fingerprint_of(description)
    path.write_text(json.dumps(description))


def test_label_out_of_range(tmp_path, copy, capsys):
    def drop_class(description):
        description["classes"].pop()
        for split in description["splits"].values():
            last = split["class_counts"].pop()
            split["class_counts"][-1] += last

    rewrite(copy, drop_class)
    refused(tmp_path, copy, code=3)
    line = one_line(capsys)
    assert "label out of range: sample " in line
    assert "of split 'train'" in line


def test_altered_index(tmp_path, copy, capsys):
    path = copy / "index" / "train.npy"
    index = np.load(path)
    index["label"][5] = (index["label"][5] + 1) % 3
    np.save(path, index)
    refused(tmp_path, copy, code=3)
    assert "train.npy was altered since packing" in one_line(capsys)


def test_edited_description(tmp_path, copy, capsys):
    path = copy / DESCRIPTION
    path.write_text(path.read_text().replace('"red"', '"rot"'))
    refused(tmp_path, copy, code=3)
    assert "does not match its own fingerprint" in one_line(capsys)


def test_class_missing_from_a_split(tmp_path, capsys):
    images = write_images(tmp_path / "images", {"train": 3, "val": 2})
    shutil.rmtree(images / "val" / "red")
    assert cli(["pack", str(images), str(tmp_path / "out")]) == 3
    line = one_line(capsys)
    assert "red" in line
    assert "val" in line
    assert "--allow-missing-classes" in line


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli(["pack", str(tmp_path / "empty"), str(tmp_path / "out")]) == 3
    assert str(tmp_path / "empty") in one_line(capsys)


def test_truncated_picture_is_left_out_by_name(tmp_path, capsys):
    images = write_images(tmp_path / "images", {"train": 3, "val": 2})
    victim = images / "train" / "red" / "001.png"
    victim.write_bytes(victim.read_bytes()[:-30])
    assert cli(["pack", str(images), str(tmp_path / "out")]) == 0
    assert "train/red/001.png" in capsys.readouterr().out
    assert open_dataset(tmp_path / "out").split("train").num_samples == 8


def test_a_launcher_that_left_this_process_alone(tmp_path, dataset, capsys, monkeypatch):
    """Two processes that each believe they are alone would both train and both write."""
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 1, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate.state.PartialState, "__init__", _alone)
    refused(tmp_path, dataset, code=2)
    line = one_line(capsys)
    assert "WORLD_SIZE is 2" in line
    assert "launch/" in line


def _alone(self, *args, **kwargs):
    """An Accelerate that finds no process group, as versions without cpu=True did."""
    import torch
    from accelerate.utils import DistributedType

    self.__dict__ = self._shared_state
    self.device, self.backend, self.debug = torch.device("cpu"), None, False
    self.distributed_type, self.fork_launched = DistributedType.NO, False
    self.num_processes, self.process_index, self.local_process_index = 1, 0, 0
    self._cpu = True


def test_head_of_another_size_at_evaluation(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 1, "trainable": "head", "lr": 1e-2}]
    config = tiny_config(dataset, tmp_path / "run", stages=stages)
    assert main(["--config", write_config(tmp_path / "c.yaml", config)]) == 0
    images = dataset.parent / "images"
    two = tmp_path / "two"
    assert cli(["pack", str(images), str(two), "--labels", "red,blue"]) == 0
    capsys.readouterr()
    assert cli(["evaluate", str(tmp_path / "run"), "--data", str(two), "--split", "val"]) == 2
    assert "is for 3 classes (blue, green, red), the data in" in one_line(capsys)


def test_head_of_another_size_to_keep(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 1, "trainable": "head", "lr": 1e-2}]
    config = tiny_config(dataset, tmp_path / "first", stages=stages)
    assert main(["--config", write_config(tmp_path / "first.yaml", config)]) == 0
    best = tmp_path / "first" / "best" / "model.safetensors"
    state = load_file(best)
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:2], state["fc.bias"][:2]
    save_file({k: v.copy() for k, v in state.items()}, best)
    capsys.readouterr()
    refused(tmp_path, dataset, f"model.weights={tmp_path / 'first'}", "model.head=keep", code=2)
    assert "is for 2 classes and the data has 3" in one_line(capsys)


def test_weights_of_another_architecture(tmp_path, dataset, capsys):
    stages = [{"name": "head", "steps": 1, "trainable": "head", "lr": 1e-2}]
    config = tiny_config(dataset, tmp_path / "first", stages=stages)
    assert main(["--config", write_config(tmp_path / "first.yaml", config)]) == 0
    capsys.readouterr()
    overrides = (f"model.weights={tmp_path / 'first'}", "model.name=test_resnet")
    refused(tmp_path, dataset, *overrides, code=2, stages=stages)
    line = one_line(capsys)
    assert "missing: conv1.0.weight" in line
    assert "set model.name to the architecture" in line


def test_not_a_model(tmp_path, dataset, capsys):
    assert cli(["evaluate", str(tmp_path), "--data", str(dataset)]) == 2
    assert "is not a model" in one_line(capsys)


def test_debug_shows_the_traceback(tmp_path, dataset, capsys):
    config = write_config(tmp_path / "c.yaml", tiny_config(dataset, tmp_path / "run"))
    assert main(["--config", config, "sede=1", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
