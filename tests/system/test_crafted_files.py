"""Nothing that comes from elsewhere is executed: files made to run code, wherever a run reads one,
end in one line of ours and run nothing."""

import io
import json
import pickle
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from foreign_shards import write_tar
from safetensors.torch import load_file
from small_sets import Canary
from tiny_runs import make_dataset, newest_checkpoint, tiny_config, train, write_config

from rtl_dist.cli import main as cli
from rtl_dist.core.errors import RtlDistError
from rtl_dist.core.files import sha256_of
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.description import DESCRIPTION, fingerprint_of
from rtl_dist.records.checkpoint import load_newest_checkpoint
from rtl_dist.train import main

pytestmark = pytest.mark.usefixtures("undrawn")

STAGES = [{"name": "head", "steps": 4, "trainable": "head", "lr": 1e-2, "views": 1}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Path:
    """A run with two checkpoints."""
    return train(
        tmp_path_factory.mktemp("finished"), dataset, stages=STAGES, checkpoint__every="2 steps"
    )


@pytest.fixture
def canary(tmp_path) -> Path:
    """A path where nothing may ever be: what is executed would put a file there."""
    return tmp_path / "canary"


def bomb(canary: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(Canary(canary), protocol=protocol)


def torch_bomb(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Canary(canary)}, buffer)
    return buffer.getvalue()


def array_bomb(canary: Path, number: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(canary)] * number, dtype=object), allow_pickle=True)
    return buffer.getvalue()


BOMBS = {"pickle": bomb, "torch.save": torch_bomb}


@pytest.fixture
def is_safe(canary, capsys):
    """Runs a command, which must leave with that code and, if it fails, one line that says each of
    these words; and nothing was executed."""

    def check(command: Any, *said: str, code: int) -> str:
        capsys.readouterr()
        assert command() == code
        output = capsys.readouterr()
        assert not canary.exists(), "it was executed"
        lines = output.err.strip().splitlines()
        assert not any("Traceback" in line for line in lines), output.err
        if code:
            assert lines[-1].startswith("rtl-dist: "), output.err
            for words in said:
                assert words in lines[-1], lines[-1]
        return output.err

    return check


def again(run: Path, config: dict[str, Any], *overrides: str) -> Any:
    """The command that goes on with a run."""
    path = write_config(run.parent / f"{run.name}.yaml", config)
    return lambda: main(["--config", path, *overrides])


@pytest.mark.parametrize("how", BOMBS)
def test_the_canary_sings_where_it_is_let(canary, how):
    content = BOMBS[how](canary)
    if how == "pickle":
        pickle.loads(content).close()
    else:
        torch.load(io.BytesIO(content), weights_only=False)["x"].close()
    assert canary.exists()


def test_the_canary_sings_in_an_array(canary):
    for one in np.load(io.BytesIO(array_bomb(canary, 2)), allow_pickle=True):
        one.close()
    assert canary.exists()


# --- a run folder ------------------------------------------------------------------------------


def put(checkpoint: Path, name: str, content: bytes) -> None:
    """Puts a file into a checkpoint, whose manifest is made to match."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = sha256_of(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def unfinished(finished, dataset, tmp_path) -> tuple[Path, dict[str, Any]]:
    """A copy of the run, that has still to be finished, and its config."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "results.json").unlink()
    config = tiny_config(dataset, run, stages=STAGES, checkpoint__every="2 steps")
    return run, config


@pytest.mark.parametrize("how", BOMBS)
@pytest.mark.parametrize("name", ["model", "optimizer", "ema", "stage_best"])
def test_a_checkpoint_with_a_pickle_in_it_is_damaged(unfinished, canary, is_safe, name, how):
    run, config = unfinished
    put(newest_checkpoint(run), f"{name}.safetensors", BOMBS[how](canary))
    errors = is_safe(again(run, config), code=0)
    assert "is damaged" in errors
    assert "falling back to an older one" in errors
    for folder in (run / "checkpoints").iterdir():
        put(folder, f"{name}.safetensors", BOMBS[how](canary))
    (run / "results.json").unlink()
    is_safe(again(run, config), "no checkpoint in", "is whole; delete that folder", code=2)


@pytest.mark.parametrize(
    "content",
    [
        b"!!python/object/apply:os.system ['touch %s']\n",
        b'{"schema": 1, "state": "!!python/object/apply:os.system [\'touch %s\']"}',
        b"__import__('os').system('touch %s')\n",
    ],
    ids=["yaml", "json", "python"],
)
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_checkpoint_s_json_is_only_json(unfinished, canary, is_safe, name, content):
    run, config = unfinished
    content = content.replace(b"%s", str(canary).encode())
    if name == "manifest.json":
        (newest_checkpoint(run) / name).write_bytes(content)
    else:
        put(newest_checkpoint(run), name, content)
    assert "falling back to an older one" in is_safe(again(run, config), code=0)


def test_a_pickle_in_place_of_a_checkpoint_s_json(unfinished, canary, is_safe):
    run, config = unfinished
    for name in ("state.json", "manifest.json"):
        (newest_checkpoint(run) / name).write_bytes(bomb(canary, 0))
    assert "falling back to an older one" in is_safe(again(run, config), code=0)


@pytest.mark.parametrize(
    "path",
    ["../../../canary", "{canary}", "../../best/model.safetensors", "state.json/../../x"],
)
def test_a_manifest_that_names_files_elsewhere_gets_none(unfinished, canary, is_safe, path):
    run, config = unfinished
    newest = newest_checkpoint(run)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest[path.format(canary=canary)] = "0" * 64
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert "falling back to an older one" in is_safe(again(run, config), code=0)


YAML_TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system",
    "!!python/object/apply:builtins.open ['{canary}', 'w']",
]


@pytest.mark.parametrize("tag", YAML_TAGS)
def test_a_run_folder_s_config_runs_nothing(unfinished, canary, is_safe, tag):
    run, config = unfinished
    resolved = run / "config.yaml"
    text = resolved.read_text().replace("seed: 5", f"seed: {tag.format(canary=canary)}")
    assert "!!python" in text
    resolved.write_text(text)
    is_safe(again(run, config), "config.yaml is not valid YAML", code=2)
    is_safe(
        lambda: cli(["evaluate", str(newest_checkpoint(run)), "--data", str(run)]),
        "config.yaml is not valid YAML",
        code=2,
    )


@pytest.mark.parametrize("tag", YAML_TAGS)
def test_a_config_and_its_overrides_run_nothing(tmp_path, dataset, canary, is_safe, tag):
    config = tiny_config(dataset, tmp_path / "run", stages=STAGES)
    path = write_config(tmp_path / "c.yaml", config)
    tag = tag.format(canary=canary)
    is_safe(lambda: main(["--config", path, f"seed={tag}"]), "not valid YAML", code=2)
    text = Path(path).read_text().replace("seed: 5", f"seed: {tag}")
    Path(path).write_text(text)
    is_safe(lambda: main(["--config", path]), "is not valid YAML", code=2)


@pytest.mark.parametrize("tag", YAML_TAGS[:1])
def test_results_and_metrics_of_a_stranger_run_nothing(unfinished, canary, is_safe, tag):
    run, config = unfinished
    for name in ("results.json", "environment.json"):
        (run / name).write_text(f"status: {tag.format(canary=canary)}\n")
    is_safe(again(run, config), code=0)
    assert json.loads((run / "results.json").read_text())["status"] == "done"


def test_cached_features_with_a_pickle_in_them_are_computed_again(
    tmp_path, dataset, canary, is_safe
):
    features = tmp_path / "features"
    changes = {"stages": [STAGES[0] | {"steps": 8}], "features__cache_dir": str(features)}
    train(tmp_path, dataset, "first", **changes)
    views = list(features.iterdir())
    assert len(views) == 2  # of train and val
    for view in views:
        content = array_bomb(canary, 57)
        (view / "used.npy").write_bytes(content)
        description = json.loads((view / "description.json").read_text())
        description["used_crc32"] = zlib.crc32(content)
        (view / "description.json").write_text(json.dumps(description))
    run = tmp_path / "second"
    errors = is_safe(again(run, tiny_config(dataset, run, **changes)), code=0)
    assert "cached features" in errors
    same = [load_file(newest_checkpoint(tmp_path / n) / "model.safetensors")
            for n in ("first", "second")]  # fmt: skip
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", BOMBS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin", ".safetensors", ""])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_with_code_in_them_are_refused(tmp_path, dataset, canary, is_safe, suffix, how):
    weights = tmp_path / f"evil{suffix}"
    weights.write_bytes(BOMBS[how](canary))
    config = tiny_config(dataset, tmp_path / "run", stages=STAGES)
    config["model"]["weights"] = str(weights)
    is_safe(again(tmp_path / "run", config), "cannot be read as plain tensors", code=2)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_folder_with_a_pickle_in_it_is_refused(
    tmp_path, finished, dataset, canary, is_safe, name
):
    best = Path(shutil.copytree(finished / "best", tmp_path / "best"))
    (best / name).write_bytes(bomb(canary, 0))
    is_safe(lambda: cli(["evaluate", str(best), "--data", str(dataset)]), str(best), code=2)


def test_a_checkpoint_folder_with_a_pickle_in_it_is_refused(
    tmp_path, unfinished, dataset, canary, is_safe
):
    run, _ = unfinished
    checkpoint = newest_checkpoint(run)
    put(checkpoint, "model.safetensors", bomb(canary))
    is_safe(
        lambda: cli(["evaluate", str(checkpoint), "--data", str(dataset)]), str(checkpoint), code=2
    )


# --- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_index_of_objects_is_refused(tmp_path, dataset, canary, is_safe, split):
    """With every checksum as it should be."""
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    path = data / "index" / f"{split}.npy"
    path.write_bytes(array_bomb(canary, 57 if split == "train" else 21))
    description = json.loads((data / DESCRIPTION).read_text())
    description["splits"][split]["index_sha256"] = sha256_of(path)
    description["fingerprint"] = fingerprint_of(description)
    (data / DESCRIPTION).write_text(json.dumps(description))
    run = tmp_path / "run"
    config = tiny_config(data, run, stages=STAGES)
    is_safe(again(run, config), "cannot read the index", f"{split}.npy", code=3)
    is_safe(lambda: cli(["verify", str(data), "--workers", "1"]), "is damaged (1 finding", code=3)


def test_a_description_that_is_a_pickle_is_refused(tmp_path, dataset, canary, is_safe):
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    (data / DESCRIPTION).write_bytes(bomb(canary, 0))
    config = tiny_config(data, tmp_path / "run", stages=STAGES)
    is_safe(again(tmp_path / "run", config), "cannot read", DESCRIPTION, code=3)


def pictures(dataset: Path, count: int) -> list[bytes]:
    files = sorted((dataset.parent / "images" / "train").rglob("*.png"))
    return [file.read_bytes() for file in files[:count]]


PICKLED = ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz"]


@pytest.fixture
def evil_shard(tmp_path, dataset, canary) -> Path:
    """Images with labels, and beside each of them members that some readers unpickle; and members
    whose names lead out of wherever they were unpacked to."""
    members = {}
    for number, picture in enumerate(pictures(dataset, 6)):
        members[f"{number:03d}.png"] = picture
        members[f"{number:03d}.cls"] = str(number % 2).encode()
        for extension in (*PICKLED, "pickle.gz"):
            evil = array_bomb(canary, 1) if extension == "npy" else bomb(canary)
            members[f"{number:03d}.{extension}"] = evil
    members["../../canary.txt"] = members["/canary.txt"] = b"out of the folder"
    members["../canary"] = bomb(canary)
    return write_tar(tmp_path / "shards" / "train-000.tar", members.items())


def test_indexing_and_training_on_evil_shards_run_nothing(tmp_path, evil_shard, canary, is_safe):
    out = tmp_path / "indexed"
    val = shutil.copy(evil_shard, tmp_path / "shards" / "val-000.tar")
    sources = [f"train={evil_shard}", f"val={val}", str(out), "--workers", "1"]
    is_safe(lambda: cli(["index", *sources]), code=0)
    is_safe(lambda: cli(["verify", str(out), "--workers", "1"]), code=0)
    run = tmp_path / "run"
    config = tiny_config(out, run, stages=STAGES)
    config["batch"] = {"global": 4, "micro": 2}
    is_safe(again(run, config), code=0)
    assert not list(tmp_path.rglob("canary*"))


@pytest.mark.parametrize("extension", PICKLED)
def test_a_pickled_member_is_never_taken_as_a_label(
    tmp_path, evil_shard, canary, is_safe, extension
):
    sources = [f"train={evil_shard}", str(tmp_path / "indexed"), "--label", extension]
    is_safe(lambda: cli(["index", *sources]), "never opened", code=2)


def test_links_in_a_shard_lead_nowhere(tmp_path, dataset, canary, is_safe):
    """A symbolic link in a sample's place, to a file that must not be read as an image."""
    shard = tmp_path / "shards" / "train-000.tar"
    write_tar(shard, [(f"{n:03d}.png", one) for n, one in enumerate(pictures(dataset, 4))])
    with tarfile.open(shard, "a") as tar:
        for number in range(4):
            label = tarfile.TarInfo(f"{number:03d}.cls")
            label.type, label.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(label)
    out = tmp_path / "indexed"
    code = cli(["index", f"train={shard}", str(out), "--workers", "1"])
    assert code == 3
    assert not (out / DESCRIPTION).exists()


# --- nothing is let through by accident --------------------------------------------------------


def test_each_file_of_these_tests_is_looked_at(finished, dataset, canary):
    """What is damaged above is read when it is whole, or refusing it would prove nothing."""
    snapshot = load_newest_checkpoint(finished)
    assert snapshot is not None
    assert snapshot.state.step == 4
    (finished / "config.yaml").read_text().index("seed: 5")
    assert yaml.safe_load((finished / "config.yaml").read_text())["seed"] == 5
    assert not canary.exists()
    with pytest.raises(RtlDistError):
        open_dataset(dataset / "nowhere")
