"""Kills of one small run of three stages, for the tests in ``system/kills``."""

from pathlib import Path

from killed_runs import At, DiskFault, Fault, require_done, require_killed, run_ranks

from rtl_dist.records.checkpoint import load_checkpoint, save_checkpoint
from rtl_dist.training.stage_evaluator import StageEvaluator
from rtl_dist.training.stage_trainer import StageTrainer
from rtl_dist.training.step_boundary import StepBoundary

NUM_STEPS, STAGE_ENDS, SAVED_EVERY, EVALUATED_EVERY = 20, (6, 12), 4, 5
CHANGES = {
    "run__ledger": True,
    "optim": {"ema": 0.9},
    "augment": {"mixup": 0.2},
    "stages__1__lr": 3e-2,
}
STEP = StageTrainer.step
CROSS = StepBoundary.cross
TRAINER = StageTrainer.__init__
EVALUATE = StageEvaluator.metrics
SAVE = save_checkpoint
LOAD = load_checkpoint


def shown(fault: At | DiskFault) -> str:
    """A kill in a few words, as a test's name."""
    if isinstance(fault, DiskFault):
        return f"call {fault.call}"
    item = "" if fault.item is None else f" item {fault.item}"
    return f"{place_of(fault)} {fault.call}{item} rank {fault.rank}"


def place_of(fault: At) -> str:
    """Where it is, whichever call and rank: a kind of kill."""
    return f"{'after' if fault.after else 'at'} {str(fault.place).partition(':')[2]}"


def killed(config: str, run: Path, *faults: Fault, world_size: int = 1, more: str = "") -> None:
    """Starts a run once for each fault, which must happen."""
    for fault in faults:
        overrides = [f"run.dir={run}", *more.split()]
        exits = run_ranks(config, *overrides, world_size=world_size, fault=fault)
        require_killed(exits, fault)


def gone_on(config: str, run: Path, *, world_size: int = 1, more: str = "") -> None:
    """Starts a run again, which must then get to its end."""
    require_done(run_ranks(config, f"run.dir={run}", *more.split(), world_size=world_size))
