"""``rtl-dist chaos``: proof, for a config of one's own, that random kills change nothing."""

from __future__ import annotations

import argparse
import sys

from rtl_dist.commands.common import add_config, add_out, add_overwrite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains a config twice: undisturbed, and killed (SIGKILL) at random moments and started"
        " again each time by the same command. Then weights, optimizer, averages, metrics (but for"
        " times), ledger and results are compared by their hashes. Needs the time of a few"
        " trainings; run.dir is left alone. Exit code 0: all is equal, 1: it is not."
    )
    add_config(parser)
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="how many (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="W",
        help="of each training, started by torchrun if several; then some kills are of one of them"
        " (default: 1)",
    )
    add_out(parser, "a folder for it all (default: RUN.DIR-chaos)")
    add_overwrite(parser, "replace an earlier one in OUT")


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.chaos.experiment import chaos

    return chaos(
        arguments.config,
        arguments.overrides,
        kills=arguments.kills,
        seed=arguments.seed,
        processes=arguments.processes,
        out=arguments.out,
        overwrite=arguments.overwrite,
        show=sys.stdout.write,
    )
