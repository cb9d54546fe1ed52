"""``rtl-dist report``: a run's plots and page, drawn again from its files."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import add_debug, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draws plots/ and report.html of a run from its files, evaluations included."
    )
    parser.add_argument("run_folder", metavar="RUN", type=path, help="a run folder (run.dir)")
    add_debug(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.core.errors import disk_refused
    from rtl_dist.report.run import draw_run

    try:
        return f"drew {draw_run(arguments.run_folder)}"
    except OSError as error:
        raise disk_refused(error, error.filename or arguments.run_folder) from error
