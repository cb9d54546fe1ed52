"""``rtl-dist train``: the main job, as by ``rtl_dist/train.py``."""

from __future__ import annotations

import argparse

from rtl_dist.commands.common import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(arguments: argparse.Namespace) -> str:
    from rtl_dist.config import load_config
    from rtl_dist.train import train

    return train(load_config(arguments.config, arguments.overrides))
