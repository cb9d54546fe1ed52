"""``rtl-dist COMMAND``: the arguments of every command; what they do is imported when it is run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from rtl_dist import __version__
from rtl_dist.commands.common import add_debug, first_imports, leave, run_command, train_arguments


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rtl-dist", description="Distributed transfer learning with ResNets."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_find_lr(commands)
    _add_chaos(commands)
    _add_pack(commands)
    _add_index(commands)
    _add_verify(commands)
    _add_evaluate(commands)
    _add_report(commands)
    arguments = parser.parse_args(argv)
    return run_command(lambda: arguments.run(arguments), debug=arguments.debug)


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("train", help="train by a config (the same as rtl_dist/train.py)")
    train_arguments(parser)

    def run(arguments: argparse.Namespace) -> str:
        from rtl_dist.config import load_config
        from rtl_dist.train import train

        return train(load_config(arguments.config, arguments.overrides))

    parser.set_defaults(run=run)


def _add_find_lr(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "find-lr",
        help="look for a stage's learning rate, without training",
        description="The learning-rate range test of one stage: steps at growing rates, then a"
        " tenth of the largest rate at which the smoothed loss is still within 5 % of its lowest."
        " It starts from the config's weights, also for a stage that comes after others:"
        " model.weights=RUN starts from those of a run, and lr: auto in the config tests each stage"
        " where it begins. Figures and picture go to a folder beside run.dir, which is left alone:"
        " its name and -find-lr. Several processes (torchrun -m rtl_dist find-lr ...) find the same"
        " rate.",
    )
    train_arguments(parser)
    parser.add_argument("--stage", metavar="NAME", help="default: the first stage of the config")

    def run(arguments: argparse.Namespace) -> str:
        with first_imports():
            from rtl_dist.commands.find_lr import find_lr
            from rtl_dist.config import load_config

        return find_lr(load_config(arguments.config, arguments.overrides), arguments.stage)

    parser.set_defaults(run=run)


def _add_chaos(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "chaos",
        help="prove for a config that random kills change nothing",
        description="Trains a config twice: undisturbed, and killed (SIGKILL) at random moments and"
        " started again each time by the same command. Then weights, optimizer, averages, metrics"
        " (but for times), ledger and results are compared by their hashes. Needs the time of a few"
        " trainings; run.dir is left alone. Exit code 0: all is equal, 1: it is not.",
    )
    train_arguments(parser)
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
    parser.add_argument("--out", type=Path, help="a folder for it all (default: RUN.DIR-chaos)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier one in OUT")

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

    parser.set_defaults(run=run)


def _add_pack(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "pack",
        help="images to shards",
        description="Packs labelled images into shuffled WebDataset shards with an index.",
    )
    parser.add_argument(
        "source",
        help="a folder of class folders (with or without train/ val/ test/), a CSV or a folder of"
        " train.csv, val.csv, ... ('file' and one label column, or 0/1 columns), 'digits', or"
        " torchvision:NAME",
    )
    parser.add_argument("out", type=Path, help="folder of the data set to make")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part of train that becomes val, the same share of every class",
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="images a shard")
    parser.add_argument(
        "--resize",
        type=int,
        metavar="SHORT_SIDE",
        help="shrink larger images; else bytes are passed through unchanged",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the CPUs)")
    parser.add_argument(
        "--labels",
        metavar="A,B,...",
        help="CSV: the label column(s); class folders: the classes, in this order",
    )
    parser.add_argument(
        "--allow-missing-classes",
        action="store_true",
        help="accept a split without any image of some class",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a data set in OUT")
    add_debug(parser)

    def run(arguments: argparse.Namespace) -> str:
        from rtl_dist.prepare.packing.pack import pack

        report = pack(
            arguments.source,
            arguments.out,
            val_fraction=arguments.val_fraction,
            shard_size=arguments.shard_size,
            resize=arguments.resize,
            workers=arguments.workers,
            labels=arguments.labels.split(",") if arguments.labels else None,
            allow_missing_classes=arguments.allow_missing_classes,
            overwrite=arguments.overwrite,
        )
        return str(report)

    parser.set_defaults(run=run)


def _add_index(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "index",
        help="WebDataset shards made by anyone, where they are",
        description="Makes a data set of WebDataset shards made by anyone; nothing is copied.",
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, folders of them, patterns such as 'shards/train-{000..099}.tar', URLs; split by"
        " their names, or said: train=PATTERN val=PATTERN",
    )
    parser.add_argument("out", type=Path, help="folder of the data set to make, or the shards' own")
    parser.add_argument(
        "--image", metavar="EXT", help="the image member, where samples have several: jpg, left.png"
    )
    parser.add_argument(
        "--label", metavar="EXT", help="the label member (default: cls, json, txt or label)"
    )
    parser.add_argument(
        "--field", metavar="NAME", help="the label in a .json member, as in label or meta.species"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE|A,B,...",
        help="the order of the class names, or the names of the class numbers; a file has one a"
        " line",
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part of train that becomes val, the same share of every class",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the CPUs)")
    parser.add_argument(
        "--allow-missing-classes",
        action="store_true",
        help="accept a split without any image of some class",
    )
    parser.add_argument(
        "--skip-decode", action="store_true", help="do not decode every image to see that it can be"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the description and index in OUT"
    )
    add_debug(parser)

    def run(arguments: argparse.Namespace) -> str:
        from rtl_dist.prepare.indexing.index import index

        report = index(
            arguments.shards,
            arguments.out,
            image=arguments.image,
            label=arguments.label,
            field=arguments.field,
            classes=arguments.classes,
            val_fraction=arguments.val_fraction,
            workers=arguments.workers,
            allow_missing_classes=arguments.allow_missing_classes,
            skip_decode=arguments.skip_decode,
            overwrite=arguments.overwrite,
        )
        return str(report)

    parser.set_defaults(run=run)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "verify",
        help="hash every shard, decode every sample, find duplicates and label conflicts",
        description="Checks a data set, packed or indexed, against its description and tells of"
        " exact duplicates within and across splits, images under two labels, unequal classes and"
        " odd sizes: a summary, and verify.json. Changes nothing in the data set. Exit code 0:"
        " sound, 3: damaged.",
    )
    parser.add_argument("dataset", help="folder or URL of a packed or indexed data set")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the report (default: DATASET/verify.json)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the CPUs)")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="duplicates across splits and label conflicts are errors, too",
    )
    _add_cache(parser)
    add_debug(parser)

    def run(arguments: argparse.Namespace) -> str:
        from rtl_dist.prepare.verifying.verify import verify_and_report

        return verify_and_report(
            arguments.dataset,
            out=arguments.out,
            workers=arguments.workers,
            strict=arguments.strict,
            show=sys.stdout.write,
            cache_dir=arguments.cache_dir,
            cache_gb=arguments.cache_gb,
        )

    parser.set_defaults(run=run)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="exact metrics, confusion matrix, precision-recall, calibration, mistakes",
        description="Evaluates a trained model on a split of a data set: metrics.json,"
        " tables, pictures and report.html in OUT. Several processes (torchrun -m rtl_dist"
        " evaluate ...) give the same figures.",
    )
    parser.add_argument("model", help="a run folder (its best weights), checkpoint or model folder")
    parser.add_argument("--data", required=True, help="folder or URL of a data set")
    parser.add_argument("--split", help="default: test where there is one, else val")
    parser.add_argument("--out", type=Path, help="default: MODEL/evaluation/SPLIT")
    parser.add_argument("--workers", type=int, metavar="N", help="loader processes")
    parser.add_argument(
        "--precision",
        choices=("auto", "no", "fp16", "bf16", "fp64"),
        help="default: that of the training",
    )
    _add_cache(parser)
    add_debug(parser)

    def run(arguments: argparse.Namespace) -> str:
        with first_imports():
            from rtl_dist.commands.evaluate import evaluate

        return evaluate(
            arguments.model,
            arguments.data,
            arguments.split,
            out=arguments.out,
            workers="auto" if arguments.workers is None else arguments.workers,
            precision=arguments.precision,
            cache_dir=arguments.cache_dir,
            cache_gb=arguments.cache_gb,
        )

    parser.set_defaults(run=run)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="(re)draw a run's plots and report.html",
        description="Draws plots/ and report.html of a run from its files, evaluations included.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run folder (run.dir)")
    add_debug(parser)

    def run(arguments: argparse.Namespace) -> str:
        from rtl_dist.report.run import draw_run

        return f"drew {draw_run(arguments.run_folder)}"

    parser.set_defaults(run=run)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", help="remote data: where shards are kept, on a local disk")
    parser.add_argument("--cache-gb", type=float, metavar="N", help="remote data: at most N GB")


def script() -> NoReturn:
    """The program ``rtl-dist``."""
    leave(main())


if __name__ == "__main__":
    script()
