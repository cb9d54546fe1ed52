"""Killed at any place, any number of times, and started again by the same command, a run ends with
the bytes of one that was never disturbed.

What runs by default is a share of a grid. The whole of it, some 900 kills (30 minutes):
``pytest -m exhaustive tests/test_kill_matrix.py``
"""

import shutil
from itertools import count
from pathlib import Path

import pytest
from killed_runs import (
    HALF,
    KILL,
    DiskFault,
    Fault,
    Kill,
    Signal,
    Together,
    require_done,
    require_killed,
    require_shim,
    run_ranks,
)
from safetensors.torch import load_file
from tiny_runs import (
    make_dataset,
    metric_rows,
    newest_checkpoint,
    require_equal_runs,
    tiny_config,
    write_config,
)

pytestmark = pytest.mark.launch

NUM_STEPS, STAGE_ENDS, SAVED_EVERY = 20, (6, 12), 4
CHANGES = {
    "run__ledger": True,
    "optim": {"ema": 0.9},
    "augment": {"mixup": 0.2},
    "stages__1__lr": 3e-2,
}
STEP = "rtl_dist.training.stage_trainer:StageTrainer.step"
CROSS = "rtl_dist.training.step_boundary:StepBoundary.cross"
TRAINER = "rtl_dist.training.stage_trainer:StageTrainer.__init__"
EVALUATE = "rtl_dist.training.step_boundary:StepBoundary.evaluate_if_due"
SAVE = "rtl_dist.records.checkpoint:save_checkpoint"
LOAD = "rtl_dist.records.checkpoint:load_checkpoint"


def shown(fault: Fault) -> str:
    """A kill in a few words, as a test's name."""
    if isinstance(fault, DiskFault):
        return f"call {fault.call}"
    name = fault.place.partition(":")[2].removeprefix("StepBoundary.").removeprefix("StageTrainer.")
    item = "" if fault.item is None else f" item {fault.item}"
    return f"{'after' if fault.after else 'at'} {name} {fault.call}{item} rank {fault.rank}"


def share_of(faults: list[Fault], chosen: list[Fault]) -> list:
    """The chosen ones as parameters that run by default, the others where all are asked for."""
    assert all(fault in faults for fault in chosen)
    rest = [pytest.param(one, marks=pytest.mark.exhaustive) for one in faults if one not in chosen]
    return [*chosen, *rest]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """With three batches of validation images."""
    return make_dataset(tmp_path_factory.mktemp("data"), val=150)


@pytest.fixture(scope="module")
def config(dataset, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "c.yaml", tiny_config(dataset, folder / "nowhere", **CHANGES))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> dict[int, Path]:
    """The run by number of processes."""
    runs = {}
    for world_size in (1, 2):
        runs[world_size] = tmp_path_factory.mktemp("undisturbed") / "run"
        require_done(run_ranks(config, f"run.dir={runs[world_size]}", world_size=world_size))
    return runs


def killed(config: str, run: Path, *faults: Fault, world_size: int = 1, more: str = "") -> None:
    """Starts a run once for each fault, which must happen."""
    for fault in faults:
        overrides = [f"run.dir={run}", *more.split()]
        exits = run_ranks(config, *overrides, world_size=world_size, fault=fault)
        require_killed(exits, fault)


def gone_on(config: str, run: Path, *, world_size: int = 1, more: str = "") -> None:
    """Starts a run again, which must then get to its end."""
    require_done(run_ranks(config, f"run.dir={run}", *more.split(), world_size=world_size))


# --- at every step -----------------------------------------------------------------------------


def test_one_of_three_ranks_killed(tmp_path, config):
    """With three ranks the order of a sum matters, and DDP's first step adds in one of its own."""
    undisturbed, run, share = tmp_path / "undisturbed", tmp_path / "run", "batch.global=12"
    gone_on(config, undisturbed, world_size=3, more=share)
    killed(config, run, Kill(place=STEP, call=9, rank=1), world_size=3, more=share)
    gone_on(config, run, world_size=3, more=share)
    require_equal_runs(undisturbed, run)


@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_killed_at_any_step(tmp_path, config, undisturbed, step):
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=step))
    assert not (run / "results.json").exists()
    if step > 2 * SAVED_EVERY:
        saved = int(newest_checkpoint(run).name.removeprefix("step-"))
        # one that was being written when the kill came counts for nothing
        assert step - 1 - 2 * SAVED_EVERY < saved < step
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


OF_TWO = [
    Kill(place=STEP, call=step, rank=rank, after=after)
    for step in range(1, NUM_STEPS + 1)
    for rank in (0, 1)
    for after in (False, True)
]


@pytest.mark.parametrize(
    "fault",
    share_of(
        OF_TWO,
        [
            Kill(place=STEP, call=call, rank=rank, after=after)
            for rank, after, calls in ((0, False, (1, 7, 15)), (1, True, (4, 12, 20)))
            for call in calls
        ],
    ),
    ids=shown,
)
def test_one_of_two_ranks_killed_at_any_step(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


def test_killed_three_times_in_one_epoch(tmp_path, config, undisturbed):
    """Steps 8 to 10 are of the third epoch; each start goes on from the checkpoint of step 6, or
    from that of step 4 where that was still being written."""
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=8), *[Kill(place=STEP, call=3)] * 2)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


def test_killed_with_workers_that_load(tmp_path, config, undisturbed):
    """Which end with it, and hold nothing that the next start needs."""
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=9), more="data.workers=2")
    gone_on(config, run, more="data.workers=1")
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize("call", [2, 3, 4])
def test_killed_while_it_stops(tmp_path, config, undisturbed, call):
    """As a scheduler does that has waited long enough."""
    run = tmp_path / "run"
    stop = Signal(place=CROSS, call=7)
    killed_in_save = DiskFault(prefix=f"{run}/checkpoints/.incomplete-step-00000007", call=7 * call)
    require_shim()
    killed(config, run, Together(faults=(stop, killed_in_save)))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


# --- where a stage ends and the next begins --------------------------------------------------------

AT_A_STAGE_END = [
    Kill(place=place, call=call, rank=rank, after=after)
    for rank in (0, 1)
    for place, call, after in (
        (CROSS, STAGE_ENDS[0], False),  # the last step is taken
        (EVALUATE, STAGE_ENDS[0] + 1, False),  # and its checkpoint asked for (once it is called
        (EVALUATE, STAGE_ENDS[0] + 1, True),  # before the first step)
        (CROSS, STAGE_ENDS[0], True),
        ("rtl_dist.records.state:TrainState.begin_next_stage", 1, False),
        ("rtl_dist.records.state:TrainState.begin_next_stage", 1, True),
        (TRAINER, 2, False),
        ("rtl_dist.model.freezing:freeze_for", 2, True),
        (TRAINER, 2, True),
        (CROSS, STAGE_ENDS[1], False),
        (CROSS, STAGE_ENDS[1], True),
        (TRAINER, 3, True),
        ("rtl_dist.training.finish:finish", 1, False),
    )
]


@pytest.mark.parametrize("fault", [one for one in AT_A_STAGE_END if one.rank == 0], ids=shown)
def test_killed_between_two_stages(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize(
    "fault", share_of(AT_A_STAGE_END, [AT_A_STAGE_END[1], AT_A_STAGE_END[-6]]), ids=shown
)
def test_one_of_two_ranks_killed_between_two_stages(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [3, 6, 9])
def test_killed_as_a_checkpoint_is_written(tmp_path, config, undisturbed, call, after):
    """These are of the ends of the three stages."""
    run = tmp_path / "run"
    killed(config, run, Kill(place=SAVE, call=call, after=after))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_the_first_of_two_ranks_killed_as_a_checkpoint_is_written(
    tmp_path, config, undisturbed, after
):
    run = tmp_path / "run"
    killed(config, run, Kill(place=SAVE, call=3, after=after), world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


# --- in stages that find their rate, go back to their best weights and end early ------------------


@pytest.fixture(scope="module")
def eventful(dataset, tmp_path_factory) -> tuple[str, Path]:
    """A config, and its run undisturbed."""
    stages = [
        {"name": "found", "steps": 5, "trainable": "head", "lr": "auto", "views": 2},
        {"name": "wild", "steps": 40, "trainable": ["layer3", "head"], "lr": 0.3,
         "early_stop": {"patience": 2}},
        {"name": "still", "steps": 40, "trainable": "all", "lr": 1e-9, "until": "plateau",
         "early_stop": {"patience": 1}},
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("eventful")
    changes = {"stages": stages, "optim": {"ema": 0.5}, "run__ledger": True}
    changes |= {"eval__every": "2 steps", "checkpoint__every": "3 steps"}
    content = tiny_config(dataset, folder / "nowhere", **changes)
    config, run = write_config(folder / "c.yaml", content), folder / "run"
    exits = run_ranks(config, f"run.dir={run}")
    require_done(exits)
    assert exits[0].output.count("ends early") == 2
    assert exits[0].output.count("back to its best") == 2
    return config, run


@pytest.mark.parametrize(
    "faults",
    [
        [Kill(place=STEP, call=30)],  # while it looks for the rate
        [Kill(place="rtl_dist.training.lr_finder:find_learning_rate", after=True)],
        [Kill(place=CROSS, call=1, after=True), Kill(place=CROSS, call=5, after=True)],
        [Kill(place="rtl_dist.training.run:Run.keep_as_stage_best", call=2, after=True)],
        [Kill(place="rtl_dist.training.run:Run.go_back_to_stage_best")],
        [Kill(place="rtl_dist.training.run:Run.go_back_to_stage_best", after=True)],
        [Kill(place="rtl_dist.training.run:Run.go_back_to_stage_best", call=2)],
        [Kill(place="rtl_dist.training.finish:finish")],
    ],
    ids=lambda faults: ", ".join(shown(fault) for fault in faults),
)
def test_killed_in_stages_that_judge_for_themselves(tmp_path, eventful, faults):
    config, undisturbed = eventful
    run = tmp_path / "run"
    killed(config, run, *faults)
    gone_on(config, run)
    require_equal_runs(undisturbed, run)
    found = [(one / "lr_finder" / "found.json").read_bytes() for one in (undisturbed, run)]
    assert found[0] == found[1]


# --- in an evaluation --------------------------------------------------------------------------

IN_AN_EVALUATION = [
    Kill(place=f"rtl_dist.evaluation.scoring:{blocks}", call=call, item=item, rank=rank)
    for rank, items in ((0, (1, 2)), (1, (1,)))  # of three blocks of images rank 1 has the second
    for blocks in ("_from_view", "_from_images")  # in stages that are partly frozen; in the last
    for call in (1, 2)
    for item in items
]


@pytest.mark.parametrize("fault", [one for one in IN_AN_EVALUATION if one.rank == 0], ids=shown)
def test_killed_in_an_evaluation(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize(
    "fault", share_of(IN_AN_EVALUATION, [IN_AN_EVALUATION[0], IN_AN_EVALUATION[-1]]), ids=shown
)
def test_one_of_two_ranks_killed_in_an_evaluation(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


# --- at every change of a file -----------------------------------------------------------------

SHARES = 40


def test_killed_at_any_change_of_the_run_folder(tmp_path, config, undisturbed):
    """Between two changes of files nothing on the disk tells one moment from another."""
    require_shim()
    for call in (3, 15, 60, 101, 170, 252, 321, 402):
        assert killed_at_change(tmp_path / str(call), config, undisturbed[1], call)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(SHARES))
def test_killed_at_every_change_of_the_run_folder(tmp_path, config, undisturbed, share):
    require_shim()
    for call in count(1 + share, SHARES):
        run = tmp_path / str(call)
        if not killed_at_change(run, config, undisturbed[1], call):
            break
        shutil.rmtree(run)
    assert call > SHARES  # a run makes far more changes


def killed_at_change(run: Path, config: str, undisturbed: Path, call: int) -> bool:
    """Whether a run makes so many changes; it is then killed at this one, and goes on."""
    run.mkdir()
    fault = DiskFault(prefix=f"{run}/", call=call, action=HALF if call % 2 else KILL)
    exits = run_ranks(config, f"run.dir={run}", fault=fault)
    if not exits[0].fired:
        require_done(exits)
        require_equal_runs(undisturbed, run)
        return False
    require_killed(exits, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed, run)
    return True


@pytest.mark.parametrize("call", share_of(list(range(1, 33)), [2, 4, 6, 12, 13, 18]))
def test_killed_while_the_best_weights_are_written(tmp_path, config, undisturbed, call):
    """Each of the first two times takes 16 calls."""
    require_shim()
    run = tmp_path / "run"
    killed(config, run, DiskFault(prefix=str(run / "best"), call=call, action=HALF))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("best", 12),  # in the middle of a file
        ("best", 14),
        (".config.yaml.", 3),
        (".results.json.", 3),
        ("checkpoints/.incomplete-step-00000012", 9),
        ("checkpoints/.gone-step-00000015", 3),  # when the last one was saved
    ],
)
def test_what_a_kill_left_behind_goes_when_the_run_goes_on(
    tmp_path, config, undisturbed, name, call
):
    """Large files that nobody knows of would fill the disk, some with each kill."""
    require_shim()
    run = tmp_path / "run"
    killed(config, run, DiskFault(prefix=f"{run}/{name}", call=call, action=HALF))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)
    assert files_of(run) == files_of(undisturbed[1])


def files_of(run: Path) -> set[str]:
    """All but the heartbeats, whose number is the processes'."""
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith("heartbeats/")}


# --- while features are computed ---------------------------------------------------------------


@pytest.fixture(scope="module")
def on_features(dataset, tmp_path_factory) -> tuple[str, Path]:
    """A config whose first two stages train on cached features, and its run undisturbed."""
    folder = tmp_path_factory.mktemp("on_features")
    changes = {"stages__0__views": 1, "stages__1__views": 1, "optim": {"ema": 0.9}}
    content = tiny_config(dataset, folder / "nowhere", **changes)
    config, run = write_config(folder / "c.yaml", content), folder / "run"
    exits = run_ranks(config, f"run.dir={run}", f"features.cache_dir={folder / 'features'}")
    require_done(exits)
    assert exits[0].output.count("on cached features from below") == 2
    return config, run


@pytest.mark.parametrize("call", share_of(list(range(1, 60)), [1, 4, 19, 22, 27, 29, 55]))
def test_killed_while_features_are_computed(tmp_path, on_features, call):
    """One view takes some 29 calls: to reserve room, to write the blocks and to publish them."""
    require_shim()
    config, undisturbed = on_features
    run, features = tmp_path / "run", tmp_path / "features"
    more = f"features.cache_dir={features}"
    killed(config, run, DiskFault(prefix=f"{features}/", call=call, action=HALF), more=more)
    gone_on(config, run, more=more)
    require_equal_runs(undisturbed, run)
    require_whole_views(features)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_killed_while_features_are_computed(tmp_path, on_features, rank):
    config, _ = on_features
    run, features = tmp_path / "run", tmp_path / "features"
    more = f"features.cache_dir={features}"
    fault = Kill(place="rtl_dist.features.view_files:write_block", call=3, rank=rank)
    killed(config, run, fault, world_size=2, more=more)
    assert not [path for path in features.iterdir() if not path.name.startswith(".")]
    gone_on(config, run, world_size=2, more=more)
    require_whole_views(features)
    gone_on(config, tmp_path / "undisturbed", world_size=2, more=more)  # and finds them all
    require_equal_runs(tmp_path / "undisturbed", run)


def require_whole_views(features: Path) -> None:
    from rtl_dist.features.store import FeatureStore

    store = FeatureStore(features, 10**9)
    views = [path.name for path in features.iterdir() if not path.name.startswith(".")]
    assert len(views) == 4  # of train and val, in two stages
    assert all(store.is_sound(view, rank=0, world_size=1) for view in views)


# --- while going on ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_once(config, tmp_path_factory) -> Path:
    """A run that was killed in its second stage."""
    run = tmp_path_factory.mktemp("killed_once") / "run"
    killed(config, run, Kill(place=STEP, call=10))
    return run


@pytest.mark.parametrize(
    "fault",
    [
        Kill(place=LOAD),
        Kill(place=LOAD, after=True),
        Kill(place="rtl_dist.records.environment:describe_run", after=True),
        Kill(place="rtl_dist.records.tracking:Tracker.__init__", after=True),
        Kill(place="rtl_dist.optim.named_state:restore_optimizer", after=True),
        Kill(place="rtl_dist.records.ledger:Ledger.__init__", after=True),
        Kill(place=STEP),
    ],
    ids=shown,
)
def test_killed_while_going_on(tmp_path, config, undisturbed, killed_once, fault):
    """Twice at the same place, and the third time it gets through."""
    run = Path(shutil.copytree(killed_once, tmp_path / "run"))
    killed(config, run, fault, fault)
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


@pytest.mark.parametrize(
    "fault",
    [Kill(place=LOAD, rank=1), Kill(place=LOAD, after=True)],
    ids=shown,
)
def test_one_of_two_ranks_killed_while_going_on(tmp_path, config, undisturbed, fault):
    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=10), fault, world_size=2)
    gone_on(config, run, world_size=2)
    require_equal_runs(undisturbed[2], run)


GOING_ON_CHANGES = 17  # until the first step is taken


@pytest.mark.parametrize("call", share_of(list(range(1, GOING_ON_CHANGES)), [2, 5, 14, 15]))
def test_killed_at_any_change_while_going_on(tmp_path, config, undisturbed, killed_once, call):
    require_shim()
    run = Path(shutil.copytree(killed_once, tmp_path / "run"))
    killed(config, run, DiskFault(prefix=f"{run}/", call=call, action=HALF))
    gone_on(config, run)
    require_equal_runs(undisturbed[1], run)


# --- at the very end ---------------------------------------------------------------------------


def test_killed_after_the_test_split_was_evaluated(tmp_path, config):
    runs = [tmp_path / name for name in ("undisturbed", "killed")]
    gone_on(config, runs[0], more="data.test=test")
    written = Kill(place="rtl_dist.report.evaluation:write_evaluation", after=True)
    killed(config, runs[1], written, more="data.test=test")
    assert not (runs[1] / "results.json").exists()
    gone_on(config, runs[1], more="data.test=test")
    require_equal_runs(*runs)
    metrics = [(run / "evaluation" / "test" / "metrics.json").read_bytes() for run in runs]
    assert metrics[0] == metrics[1]


def test_killed_before_the_report_is_drawn(tmp_path, config, undisturbed):
    """Training is done then, but not all that the command does."""
    run, fault = tmp_path / "run", Kill(place="rtl_dist.report.run:draw_run")
    require_killed(run_ranks(config, f"run.dir={run}", fault=fault, draws=True), fault)
    require_done(run_ranks(config, f"run.dir={run}", draws=True))
    require_equal_runs(undisturbed[1], run)
    assert (run / "report.html").exists()
    assert list((run / "plots").glob("*.png"))


# --- on another number of processes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "killed_at", "afterwards"),
    [(2, 9, 1), (4, 14, 2), (1, 8, 4)],
    ids=["2 to 1", "4 to 2", "1 to 4"],
)
def test_killed_and_gone_on_with_another_number_of_processes(
    tmp_path, config, before, killed_at, afterwards, alone_in_float64
):
    run = tmp_path / "run"
    fault = Kill(place=STEP, call=killed_at, rank=before - 1)
    killed(config, run, fault, world_size=before, more="precision=fp64")
    gone_on(config, run, world_size=afterwards, more="precision=fp64")
    samples = [one / "ledger" / "samples.jsonl" for one in (run, alone_in_float64)]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    for name in ("model", "ema", "optimizer"):
        found, wanted = (
            load_file(newest_checkpoint(one) / f"{name}.safetensors")
            for one in (run, alone_in_float64)
        )
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            assert float((value.double() - wanted[key].double()).abs().max()) < 1e-10, key
    for row, expected in zip(metric_rows(run), metric_rows(alone_in_float64), strict=True):
        assert row.pop("stage") == expected.pop("stage")
        assert row == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def alone_in_float64(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("float64") / "run"
    gone_on(config, run, more="precision=fp64")
    return run


# --- the harness itself ------------------------------------------------------------------------


def test_a_kill_that_never_comes_is_told(tmp_path, config):
    with pytest.raises(AssertionError, match="never happened"):
        killed(config, tmp_path / "run", Kill(place=STEP, call=NUM_STEPS + 1))


def test_a_run_that_does_not_go_on_exactly_is_told(tmp_path, config, undisturbed):
    """Its average is a tenth of a percent off."""
    from rtl_dist.records.checkpoint import load_newest_checkpoint, save_checkpoint

    run = tmp_path / "run"
    killed(config, run, Kill(place=STEP, call=15))
    snapshot = load_newest_checkpoint(run)
    snapshot.ema = {k: v * 1.001 if v.is_floating_point() else v for k, v in snapshot.ema.items()}
    shutil.rmtree(run / "checkpoints")
    save_checkpoint(run, snapshot, keep=2)
    gone_on(config, run)
    with pytest.raises(AssertionError, match=r"ema\.safetensors"):
        require_equal_runs(undisturbed[1], run)
