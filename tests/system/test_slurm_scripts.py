"""The batch scripts: whole, free of anything that belongs to one cluster, and clear in what they
refuse. What they do in a cluster is in ``test_slurm.py``.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from rtl_dist.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "slurm"
BATCH_SCRIPTS = sorted(SLURM.glob("*.sbatch"))
SCRIPTS = [*BATCH_SCRIPTS, SLURM / "train_job.sh"]
CONFIG = "configs/quickstart.yaml"


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


def test_there_is_one_for_each_kind_of_job():
    names = [path.name for path in BATCH_SCRIPTS]
    assert names == ["multi_node.sbatch", "one_node.sbatch", "preemptible.sbatch", "sweep.sbatch"]


@pytest.mark.parametrize("script", BATCH_SCRIPTS, ids=lambda path: path.name)
def test_it_asks_for_a_warning_and_to_be_requeued(script):
    asked = directives(script)
    assert asked["signal"] == "B:USR1@120"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"
    assert not asked["output"].startswith("/")  # beside the project, where every node can write
    assert not {"partition", "account", "qos", "gres", "gpus-per-node", "nodelist"} & asked.keys()
    assert f"slurm/{script.name} configs/" in script.read_text()


def test_a_range_of_nodes_is_asked_for_without_a_number_of_tasks():
    # with one, SLURM gives the fewest nodes of the range
    asked = directives(SLURM / "preemptible.sbatch")
    assert asked["nodes"] == "1-4"
    assert not {"ntasks", "ntasks-per-node"} & asked.keys()


@pytest.mark.parametrize("script", BATCH_SCRIPTS[:3], ids=lambda path: path.name)
def test_the_cores_that_are_asked_for_grow_with_the_gpus(script):
    header = script.read_text().replace("\\\n#", " ")
    asked = re.findall(r"^# +sbatch .*--gpus-per-node=(\d+)(.*)", header, re.MULTILINE)
    assert asked
    for gpus, rest in asked:
        assert f"--cpus-per-task={8 * int(gpus)} " in rest


# --- what they refuse ---


def refusal(script: str, *arguments: str, task: int | None = 0) -> str:
    """What a script says that leaves with 2 before it starts anything."""
    env = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "1"}
    if task is not None:
        env["SLURM_ARRAY_TASK_ID"] = str(task)
    result = subprocess.run(
        ["bash", str(SLURM / script), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert not result.stdout
    return result.stderr


@pytest.mark.parametrize("script", ["one_node", "multi_node", "preemptible"])
def test_a_job_without_a_config_is_told_how(script):
    told = refusal(f"{script}.sbatch")
    assert "usage: sbatch slurm/one_node.sbatch configs/X.yaml" in told


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        (0, [], "usage: sbatch --array=0-5 slurm/sweep.sbatch"),
        (0, ["{lines}"], "add run.dir=FOLDER"),
        (0, ["{lines}", "seed=1", "run.dir="], "add run.dir=FOLDER"),
        (0, ["{lines}.gone", "run.dir=runs/a"], "there is no file {lines}.gone"),
        (None, ["{lines}", "run.dir=runs/a"], "sbatch --array=0-5 slurm/sweep.sbatch"),
        (3, ["{lines}", "run.dir=runs/a"], "holds 3 line(s) of overrides, none for task 3"),
        (2, ["{lines}", "run.dir=runs/a"], 'quotes do not match in: "eval.every=2 steps'),
    ],
)
def test_a_sweep_refuses_in_one_line(task, arguments, said, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text('# a comment\n\nseed=1\n  # another\n   \nseed=2\n"eval.every=2 steps\n')
    arguments = [argument.format(lines=lines) for argument in arguments]
    told = refusal("sweep.sbatch", *([CONFIG] if arguments else []), *arguments, task=task)
    assert told.startswith("sweep.sbatch: ")
    assert told.count("\n") == 1
    assert said.format(lines=lines) in told


def test_the_lines_of_the_example_suit_the_config_it_names():
    text = (SLURM / "sweep.txt").read_text()
    assert CONFIG in text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert f"--array=0-{len(lines) - 1}" in text
    configs = [load_config(str(ROOT / CONFIG), shlex.split(line)) for line in lines]
    assert len({repr(config) for config in configs}) == len(lines)


# --- what the tasks are told ---

SRUN = """#!/bin/bash
passes=${SLURM_EXPORT_ENV:-ALL}
while [[ $1 == -* ]]; do
    case $1 in --export=*) passes=${1#--export=} ;; esac
    shift
done
[ "$passes" = ALL ] && exec "$@"
exec env -i PATH=/usr/bin:/bin "$@"
"""


def test_after_export_none_the_processes_have_the_environment_of_the_job(tmp_path):
    """As srun documents it: SLURM_EXPORT_ENV=NONE, which sbatch --export=NONE sets, hands nothing
    on, unless srun is told otherwise."""
    programs = {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\necho 'SlurmdTimeout = 300 sec'\n",
        "python": '#!/bin/sh\necho "$OMP_NUM_THREADS threads: $*"\n',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "activate").write_text(f"export PATH={tmp_path}:$PATH\n")
    env = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "1",
           "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "2",
           "SLURM_EXPORT_ENV": "NONE", "RTL_DIST_ACTIVATE": str(tmp_path / "activate")}  # fmt: skip
    script = str(SLURM / "one_node.sbatch")
    result = subprocess.run(
        ["bash", script, CONFIG], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"4 threads: rtl_dist/train.py --config {CONFIG}\n"
