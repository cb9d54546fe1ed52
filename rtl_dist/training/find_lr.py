"""A learning-rate range test as a job of its own, in a folder of its own, without training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rtl_dist.config import Config, ResolvedStage
from rtl_dist.core.errors import OutOfMemory, UserError
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.distributed.stopping import StopRequests
from rtl_dist.records.checkpoint import has_checkpoint
from rtl_dist.records.lr_finder import FOLDER
from rtl_dist.records.run_folder import WATCHED, owned_run_folder
from rtl_dist.report.lr_finder import draw_range_test, read_range_test
from rtl_dist.training.begin import open_data, open_run
from rtl_dist.training.lr_finder import measure_rates
from rtl_dist.training.resolve import resolve
from rtl_dist.training.run import Run
from rtl_dist.training.solving import solve_head
from rtl_dist.training.stage_trainer import StageTrainer

LOG = logging.getLogger("rtl_dist")


def find_lr(config: Config, stage_name: str | None) -> str:
    """Tests one stage from the config's weights, in a folder beside ``run.dir``.

    Args:
        stage_name: None takes the first that takes steps.

    Works on one process or, under a launcher, on many, with the same answer to rounding.

    Returns:
        on rank 0 one line: what was found; elsewhere "".

    Raises:
        RtlDistError: with the exit code to leave with; see ``errors``.
    """
    number = _number_of(stage_name, config)
    config = _beside_the_run(config)
    with (
        StopRequests() as stops,
        Runtime(
            config.precision,
            stops,
            patience=WATCHED,
            tf32=config.tf32,
            deterministic=config.deterministic,
        ) as runtime,
        _folder(config, runtime) as folder,
    ):
        dataset = open_data(config, runtime)
        config = resolve(config, runtime, dataset)
        with open_run(config, runtime, folder, dataset) as (run, stages, _):
            stage, before = stages[number], stages[:number]
            if stepped := [earlier.name for earlier in before if earlier.takes_steps]:
                LOG.info(
                    "stage %s is tested with the config's weights, not after stage %s; give"
                    " model.weights=RUN to test what a run has then",
                    stage.name,
                    stepped[-1],
                )
            else:
                for earlier in before:
                    _solve(earlier, run)
            is_solved = stage.solve or (bool(before) and not stepped)
            try:
                found = measure_rates(stage, run)
            except OutOfMemory as error:
                raise UserError(
                    f"{error}: set batch.micro={max(1, run.micro_batch_size // 2)}, or use a"
                    " smaller model or data.image_size"
                ) from error

            def draw() -> str:
                test = read_range_test(folder / FOLDER / f"{stage.name}.json")
                assert test is not None
                return str(draw_range_test(test, folder))

            picture: str = runtime.from_main(draw)
    if not runtime.is_main:
        return ""
    told = f"stage {stage.name}: as the rate grows, the loss holds up to {found:.2g}, see {picture}"
    if is_solved:
        told += "; from a solved head that is no advice (docs/training.md)"
    return told


def _solve(stage: ResolvedStage, run: Run) -> None:
    """A stage that takes no steps, as a training does it."""
    trainer = StageTrainer(stage, run)
    try:
        solve_head(stage, run, trainer)
    finally:
        trainer.close()
    run.state.begin_next_stage()


def _number_of(name: str | None, config: Config) -> int:
    names = [stage.name for stage in config.stages]
    stepped = [stage.name for stage in config.stages if stage.takes_steps]
    if not stepped:
        raise UserError(
            "--stage: no stage of the config takes steps, so there is no learning rate; give"
            f" one of {', '.join(names)} epochs or steps"
        )
    if name is None:
        return names.index(stepped[0])
    if name not in names:
        raise UserError(f"--stage: the config has no stage {name!r}; it has {', '.join(names)}")
    if name not in stepped:
        raise UserError(
            f"--stage: stage {name} is solved and takes no steps, so it has no learning rate to"
            f" find; those that take some: {', '.join(stepped)}"
        )
    return names.index(name)


def _beside_the_run(config: Config) -> Config:
    """The config with a run folder that a later training does not take for its own."""
    run = replace(config.run, dir=f"{Path(config.run.dir)}-find-lr", resume="auto", ledger=False)
    return replace(config, run=run, track=replace(config.track, wandb="off"))


@contextmanager
def _folder(config: Config, runtime: Runtime) -> Iterator[Path]:
    """The test's folder, owned, without the results of a test that failed there before."""
    with owned_run_folder(config.run, runtime) as run:

        def clear() -> None:
            if has_checkpoint(run):
                raise UserError(f"{run} holds a training run; choose another run.dir")
            (run / "results.json").unlink(missing_ok=True)

        runtime.from_main(clear)
        yield run
