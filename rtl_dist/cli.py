"""``rtl-dist COMMAND``: a table from a command's name to its module.

Only the chosen one is imported. It has ``add_arguments(parser)``, and ``run(arguments)``, which
imports what the command needs and returns what to tell the user last.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NoReturn

from rtl_dist import __version__

# name: (module, its line in the list of commands)
COMMANDS = {
    "train": ("rtl_dist.commands.train", "train by a config (the same as rtl_dist/train.py)"),
    "find-lr": ("rtl_dist.commands.find_lr", "look for a stage's learning rate, without training"),
    "chaos": ("rtl_dist.commands.chaos", "prove for a config that random kills change nothing"),
    "pack": ("rtl_dist.commands.pack", "images to shards"),
    "index": ("rtl_dist.commands.index", "WebDataset shards made by anyone, where they are"),
    "verify": (
        "rtl_dist.commands.verify",
        "hash every shard, decode every sample, find duplicates and label conflicts",
    ),
    "evaluate": (
        "rtl_dist.commands.evaluate",
        "exact metrics, confusion matrix, precision-recall, calibration, mistakes",
    ),
    "predict": ("rtl_dist.commands.predict", "what a model says of images, folders, tars, URLs"),
    "calibrate": (
        "rtl_dist.commands.calibrate",
        "fit a model's probabilities, thresholds and conformal sets to data like yours",
    ),
    "export": (
        "rtl_dist.commands.export",
        "a model as ONNX, pt2, a timm or transformers folder, checked on real images",
    ),
    "report": ("rtl_dist.commands.report", "(re)draw a run's plots and report.html"),
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    # before a command there are only options without a value
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="rtl-dist", description="Distributed transfer learning with ResNets."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, line) in COMMANDS.items():
        commands.add_parser(name, help=line)
    if chosen is None or chosen != words[0]:
        parser.parse_args(words)  # help, the version, or an error
    if chosen not in COMMANDS:
        parser.error(_unknown(str(chosen)))
    return _run(chosen, words[1:])


def _run(command: str, words: list[str]) -> int:
    from rtl_dist.commands.common import parse

    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser(prog=f"rtl-dist {command}")
    module.add_arguments(parser)
    arguments = parse(parser, words)

    from rtl_dist.commands.running import run_command  # --help needs nothing of it

    return run_command(lambda: module.run(arguments), debug=arguments.debug)


def _unknown(command: str) -> str:
    from rtl_dist.core.text import did_you_mean

    hint = did_you_mean(command, COMMANDS) or f"; known: {', '.join(COMMANDS)}"
    return f"no command {command!r}{hint}"


def script() -> NoReturn:
    """The program ``rtl-dist``."""
    try:
        code = main()
    except KeyboardInterrupt:  # as the command's own file was read
        sys.stderr.write("rtl-dist: interrupted; start the same command again\n")
        sys.exit(75)

    from rtl_dist.commands.running import leave

    leave(code)


if __name__ == "__main__":
    script()
