"""The main job: ``accelerate launch rtl_dist/train.py --config configs/X.yaml [key=value ...]``.

The same through ``torchrun``, ``srun``, ``python``, and as ``rtl-dist train``. This file is only
the story; each step of it has its own room.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(__file__)):
    # Run as a script, Python puts this folder first on the path, where our modules would shadow
    # others of the same name; the project's root belongs there instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from rtl_dist.commands.common import add_config, parse
from rtl_dist.commands.running import first_imports, leave, run_command
from rtl_dist.config import Config, load_config
from rtl_dist.core.lock import require_unlocked
from rtl_dist.distributed.launchers import may_end_alone
from rtl_dist.distributed.stopping import StopRequests


def train(config: Config) -> str:
    """Runs the job to its end and returns what to tell the user last.

    Raises:
        RtlDistError: with the exit code to leave with; see ``errors``.
    """
    limit = config.run.time_limit
    with StopRequests(time_limit_s=limit.seconds if limit else None) as stops:
        if may_end_alone():
            require_unlocked(Path(config.run.dir))
        with first_imports():
            from rtl_dist.distributed.elastic import taking_part
            from rtl_dist.records.resume import keep_resolved
            from rtl_dist.training import begin, finish, fit, resolve  # noqa: F401 - all, at once

        config = keep_resolved(config)
        with taking_part(config.batch) as trains:
            return run_job(config, stops) if trains else ""


def run_job(config: Config, stops: StopRequests) -> str:
    """The job of a process that takes part in it; returns and raises as ``train``."""
    from rtl_dist.distributed.runtime import Runtime
    from rtl_dist.records.run_folder import WATCHED, owned_run_folder
    from rtl_dist.training.begin import open_data, open_run
    from rtl_dist.training.finish import already_done, finish
    from rtl_dist.training.fit import fit
    from rtl_dist.training.resolve import resolve

    with (
        Runtime(
            config.precision,
            stops,
            patience=WATCHED,
            tf32=config.tf32,
            deterministic=config.deterministic,
        ) as runtime,
        owned_run_folder(config.run, runtime) as folder,
    ):
        dataset = open_data(config, runtime)
        config = resolve(config, runtime, dataset)
        if line := already_done(config, runtime, folder, dataset):
            return line
        with open_run(config, runtime, folder, dataset) as (run, remaining, restored):
            for stage in remaining:
                fit(stage, run, restored)
                restored = None
            return finish(run)


def main(argv: list[str] | None = None) -> int:
    """Parses arguments, trains, and turns errors into exit codes."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train a classifier: one process or many, the same recipe."
    )
    add_config(parser)
    arguments = parse(parser, argv)
    return run_command(
        lambda: train(load_config(arguments.config, arguments.overrides)), debug=arguments.debug
    )


if __name__ == "__main__":
    leave(main())
