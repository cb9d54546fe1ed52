"""What a stage saves: checkpoints, and the best weights as a model folder."""

from __future__ import annotations

from rtl_dist.model.classifier import Classifier
from rtl_dist.model.folder import write_model_folder
from rtl_dist.records.checkpoint import Snapshot
from rtl_dist.records.identity import run_identity
from rtl_dist.training.run import Run
from rtl_dist.training.stage_trainer import StageTrainer


def save(run: Run, trainer: StageTrainer, *, evaluation_is_due: bool) -> None:
    """Has a checkpoint of this very moment written, beside the steps that follow; all ranks call
    it.

    Args:
        evaluation_is_due: at this step; a run that goes on from here evaluates first.

    Raises:
        RtlDistError: the checkpoint before could not be written, or the weights are no numbers.
        RuntimeError: what is frozen moved, or the ranks disagree.
    """
    state = run.state
    trainer.fold_totals()
    trainer.network.require_sound()
    state.last_checkpoint = state.step
    state.eval_was_due = evaluation_is_due

    def flush() -> None:
        """Makes durable what the checkpoint refers to."""
        run.tracker.flush()
        if trainer.ledger:
            trainer.ledger.flush()

    def write() -> None:
        state.metrics_bytes = run.tracker.num_bytes
        optimizer = trainer.optimizer.state()
        snapshot = Snapshot(
            state=state,
            model=run.model.state_dict(),
            optimizer=optimizer.tensors,
            ema=run.average.model.state_dict() if run.average else {},
            stage_best=run.stage_best,
            scaler=optimizer.scaler,
            identity=run_identity(run.config, run.dataset),
        )
        keep = run.config.checkpoint.keep
        run.writer.write(run.folder, snapshot, keep=keep, before=flush)

    # the checkpoint before may still be on its way to a slow disk
    with run.runtime.heartbeat.phase("saving", open_ended=run.runtime.is_main):
        run.runtime.from_main(write)


def save_best(run: Run, model: Classifier) -> None:
    """Writes ``best/``, once the checkpoint that a run would go on from is on the disk; all ranks
    call it."""

    def write() -> None:
        with run.runtime.heartbeat.phase("saving", open_ended=True):
            run.writer.wait()
            config, best = run.config, run.folder / "best"
            write_model_folder(best, model, config.model, run.dataset, precision=config.precision)

    run.runtime.from_main(write)
