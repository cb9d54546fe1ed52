"""What a run says before its first step."""

import json

from tiny_runs import killed_after, make_dataset, train


def test_a_run_says_on_what_it_computes_what_is_little_and_that_it_goes_on(
    tmp_path, monkeypatch, capsys
):
    stage = {"name": "head", "epochs": 3, "trainable": "head", "lr": 1e-2}
    changes = {
        "stages": [stage],
        "batch__global": 64,
        "checkpoint__every": "1 steps",
        "dataset": make_dataset(tmp_path),
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with killed_after(1, monkeypatch):
        train(tmp_path, **changes)
    told = capsys.readouterr().err
    assert "1 process(es) on the CPU (" in told
    assert "thread(s) of" in told
    assert "precision no (float32)" in told
    few = "stage head takes only 3 step(s): 3 epoch(s) of 57 images in batches of 64; lower batch"
    assert few in told
    assert "start 2" not in told
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = train(tmp_path, **changes)
    told = capsys.readouterr().err
    assert "start 2 of this run (requeued by SLURM, 1 so far): it goes on from step 1," in told
    assert json.loads((run / "environment.json").read_text())["start"] == 2
    (evaluated,) = [line for line in told.splitlines() if "epoch 3." in line]
    assert " images/s" in evaluated
