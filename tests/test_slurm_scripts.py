"""The batch scripts: whole, and free of anything that belongs to one cluster."""

import re
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[1] / "slurm"
SCRIPTS = sorted(path for path in SLURM.iterdir() if path.is_file())
BATCH_SCRIPTS = [path for path in SCRIPTS if path.suffix == ".sbatch"]


def directives(script: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", script.read_text(), re.MULTILINE)
    return dict(found)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_names_nothing_of_one_machine(script):
    text = script.read_text()
    assert not re.search(r"/(home|root|work|tmp|scratch|opt|mnt)\b", text)
    assert not re.search(r"\b\d{1,3}(\.\d{1,3}){3}\b|\bib0\b|\beth0\b|_IFNAME", text)
    assert not re.search(r"\bmodule (load|purge)\b|\bconda activate\b", text)


def test_there_is_one_for_one_node_and_one_for_several():
    assert [path.name for path in BATCH_SCRIPTS] == ["multi_node.sbatch", "one_node.sbatch"]


@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda path: path.name)
def test_it_asks_for_a_warning_and_to_be_requeued(script):
    asked = directives(script)
    assert asked["signal"] == "B:USR1@120"
    assert "requeue" in asked
    assert not asked["output"].startswith("/")  # beside the project, where every node can write
    assert not {"partition", "account", "qos", "gres", "gpus-per-node", "nodelist"} & asked.keys()
    assert f"slurm/{script.name} configs/" in script.read_text()


def test_a_job_without_a_config_is_told_how():
    result = subprocess.run(
        ["bash", str(SLURM / "one_node.sbatch")],
        env={"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(SLURM.parent)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 2
    assert "usage: sbatch slurm/one_node.sbatch configs/X.yaml" in result.stderr
