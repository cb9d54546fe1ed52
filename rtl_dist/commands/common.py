"""The options that several commands have, each written once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_config(parser: argparse.ArgumentParser) -> None:
    """A config, changes to it, and ``--debug``: what every command that trains begins with."""
    parser.add_argument("--config", required=True, help="a YAML file; shipped ones are in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. seed=1 stages.0.lr=3e-4"
    )
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")


def add_out(parser: argparse.ArgumentParser, what: str, *, metavar: str | None = None) -> None:
    parser.add_argument("--out", type=Path, metavar=metavar, help=what)


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=what)


def add_workers(
    parser: argparse.ArgumentParser, what: str = "processes (default: the CPUs)"
) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help=what)


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", help="remote data: where shards are kept, on a local disk")
    parser.add_argument("--cache-gb", type=float, metavar="N", help="remote data: at most N GB")
    add_redirects(parser)


def add_redirects(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redirects",
        choices=("origin", "any"),
        default="origin",
        help="remote data: whether redirects to other servers are followed, too (default: origin)",
    )


def add_val_fraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part of train that becomes val, the same share of every class",
    )


def add_allow_missing_classes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-missing-classes",
        action="store_true",
        help="accept a split without any image of some class, or one class only",
    )
