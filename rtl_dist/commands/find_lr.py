"""``rtl-dist find-lr``: the learning-rate range test of one stage, without training."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The learning-rate range test of one stage: steps at growing rates, and the largest one at"
        " which the smoothed loss is still within 5 % of its lowest. It starts from"
        " the config's weights, with the head solved where the config solves it first; for a stage"
        " after others that take steps, model.weights=RUN starts from those of a run. Figures"
        " and picture go to a folder beside run.dir, which is left alone: its name and -find-lr."
        " Several processes (torchrun -m rtl_dist find-lr ...) measure the same."
    )
    add_config(parser)
    parser.add_argument("--stage", metavar="NAME", help="default: the first stage that takes steps")


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.commands.running import first_imports

    with first_imports():
        from rtl_dist.config import load_config
        from rtl_dist.training.find_lr import find_lr

    return find_lr(load_config(arguments.config, arguments.overrides), arguments.stage)
