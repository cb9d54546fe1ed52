"""A run whose folder not all nodes see ends before its first step, in one line with the cure."""

from launched_runs import finish, start_ranks
from tiny_runs import make_dataset, tiny_config, write_config

# Ranks that see different disks under one path: each has a working folder of its own.
APART = (
    "-c",
    "import os, sys; os.makedirs(sys.argv[-1] + os.environ['RANK']);"
    "os.chdir(sys.argv.pop() + os.environ['RANK'])\n"
    "from rtl_dist.records import run_folder; run_folder.PATIENCE_S = 0.1\n"
    "from rtl_dist.train import main; from rtl_dist.commands.running import leave; leave(main())",
)


def test_nodes_that_see_different_disks_are_told_before_the_first_step(tmp_path):
    config = write_config(
        tmp_path / "c.yaml", tiny_config(make_dataset(tmp_path), "run", batch__micro=4)
    )
    ranks = start_ranks(["--config", config, str(tmp_path / "node")], 2, program=APART)
    outputs = [finish(process) for process in ranks]
    assert [code for code, _ in outputs] == [2, 2]
    (line,) = {line for _, text in outputs for line in text.splitlines() if "run.dir:" in line}
    assert f"writes into {tmp_path / 'node0' / 'run'}: set run.dir to a folder on a disk" in line
    assert not (tmp_path / "node1" / "run").exists()
    assert not (tmp_path / "node0" / "run" / "metrics.jsonl").exists()
