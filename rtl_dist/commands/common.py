"""The options that several commands have, each written once."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


def parse(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The words of a command, options and others in any order; ends the program (code 2) where they
    do not fit.

    An option that there is not is told first: argparse would miss the one that it was meant for, or
    take its value for another argument.
    """
    words = sys.argv[1:] if words is None else words
    actions = {option: action for action in parser._actions for option in action.option_strings}
    given: set[str] = set()
    for word in words[: words.index("--") if "--" in words else None]:
        name = word.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", name):
            continue
        fitting = [name] if name in actions else [each for each in actions if _begins(each, name)]
        if not fitting:
            parser.error(f"no option {name}{_meant(name, parser)}")
        if fitting[0] in given and actions[fitting[0]].nargs != 0:
            parser.error(f"{fitting[0]} is given twice")
        given.add(fitting[0])
    return parser.parse_intermixed_args(words)


def _begins(option: str, name: str) -> bool:
    return name.startswith("--") and option.startswith(name)


def _meant(name: str, parser: argparse.ArgumentParser) -> str:
    from rtl_dist.config.meant import option_as_override
    from rtl_dist.core.text import did_you_mean

    takes_overrides = any(action.dest == "overrides" for action in parser._actions)
    known = [option for action in parser._actions for option in action.option_strings]
    hint = option_as_override(name) if takes_overrides else ""
    return hint or did_you_mean(name, known) or f"; there are {', '.join(known)}"


def place(text: str) -> str:
    """An argument that is a folder, a file, a URL or, of ``index``, SPLIT=PATTERN: ``~`` at its
    beginning is the home folder, where a shell leaves it alone too (``--out=~/x``)."""
    from rtl_dist.config.places import place_at

    split, _, pattern = text.partition("=")
    if pattern.startswith("~") and split.isidentifier():
        return f"{split}={place(pattern)}"
    try:
        return place_at(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path(text: str) -> Path:
    """As ``place``, of what is on this machine."""
    return Path(place(text))


def add_config(parser: argparse.ArgumentParser) -> None:
    """A config, changes to it, and ``--debug``: what every command that trains begins with."""
    parser.add_argument(
        "--config", required=True, type=place, help="a YAML file; shipped ones are in configs/"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. seed=1 stages.0.lr=3e-4"
    )
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show a traceback for every error")


def add_out(
    parser: argparse.ArgumentParser,
    what: str,
    *,
    metavar: str | None = None,
    required: bool = False,
) -> None:
    parser.add_argument("--out", type=path, metavar=metavar, required=required, help=what)


def add_overwrite(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=what)


def add_workers(
    parser: argparse.ArgumentParser, what: str = "processes (default: the CPUs)"
) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help=what)


def add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("auto", "no", "fp16", "bf16", "fp64"),
        help="default: that of the training",
    )


def add_data(parser: argparse.ArgumentParser, what: str, *, required: bool = False) -> None:
    parser.add_argument("--data", type=place, required=required, help=what)


def add_split(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--split", help=what)


def add_raw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw", action="store_true", help="read the model's scores as they are, not calibrated"
    )


def add_json(parser: argparse.ArgumentParser, what: str = "print the result as JSON") -> None:
    parser.add_argument("--json", action="store_true", help=what)


def add_file_column(parser: argparse.ArgumentParser, tables: str) -> None:
    parser.add_argument(
        "--file-column",
        metavar="NAME",
        help=f"{tables}: the column of the images' paths (default: 'file', or it is found)",
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", type=place, help="remote data: where shards are kept, on a local disk"
    )
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
