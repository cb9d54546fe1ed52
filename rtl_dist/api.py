"""rtl_dist in Python: the same code as the commands, in a process that stays the caller's.

``from rtl_dist import load, train, evaluate, predict, pack, open_dataset``. What goes wrong is
raised as the exceptions of ``core/errors.py``, whose messages say the cure; nothing here ends the
process. A job (``train``, ``evaluate``, ``predict`` into a file) leaves signal handlers, logging,
seeds and threads as it found them; one runs at a time in a process, in any thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast, overload

from rtl_dist.config import Config, Precision, load_config, parse_config, to_dict
from rtl_dist.core.errors import UserError
from rtl_dist.core.urls import Redirects
from rtl_dist.data.format.dataset import Dataset, open_dataset
from rtl_dist.data.format.split import DatasetPlace
from rtl_dist.prepare.packing.pack import PackReport, pack
from rtl_dist.train import train as train_by

if TYPE_CHECKING:  # all else comes when a function is called: to import one costs no torch
    from rtl_dist.inference.given import ImageLike
    from rtl_dist.inference.model import Model
    from rtl_dist.inference.prediction import Prediction
    from rtl_dist.inference.predictor import Flips
    from rtl_dist.report.finished import Evaluation, Run

__all__ = [
    "Config",
    "Dataset",
    "PackReport",
    "evaluate",
    "load",
    "open_dataset",
    "pack",
    "predict",
    "train",
]

PathLike = str | os.PathLike[str]


class PredictOptions(TypedDict, total=False):
    """Options of ``predict``; without ``out`` there are ``threshold``, ``tta`` and ``raw``."""

    split: str | None
    """Inputs are data sets: this split of them."""
    top: int | None
    """Classes that are told with their probabilities."""
    threshold: float | None
    """Multi-label: from which probability on a label is given; None: the model's own."""
    tta: Flips | None
    """``hflip``: the mean over each image and its mirror image."""
    raw: bool
    """Whether the model's calibration is left out."""
    explain: PathLike | None
    """A folder for a heatmap of each input."""
    grid: PathLike | None
    """A PNG of the first 64 inputs with their labels and probabilities."""
    allow_errors: int
    """Inputs that may be unreadable without an error being raised."""
    workers: Literal["auto"] | int
    """Processes that read and decode."""
    precision: Precision | None
    """None: that of the training."""
    file_column: str | None
    """Of tables; None: it is found."""
    overwrite: bool
    """Whether OUT is replaced whatever it is, and what was begun is begun anew."""
    cache_dir: str | None
    """Of remote data sets; see ``Cache``."""
    cache_gb: float | None
    """Of remote data sets; see ``Cache``."""
    redirects: Redirects
    """Whether they are followed to other servers, too."""


def load(model: PathLike, *, raw: bool = False, tta: Flips | None = None) -> Model:
    """A trained model, ready to predict, on this machine's GPU if it has one.

    Args:
        model: a run folder (its best weights), a checkpoint folder, a model folder, or an exported
            file.
        raw: whether the calibration that it comes with is left out.
        tta: ``hflip``: the mean of an image's probabilities and those of its mirror image.

    Raises:
        UserError: it is none of these, or is damaged.
    """
    from rtl_dist.inference.model import Model

    return Model(os.fspath(model), raw=raw, tta=tta)


def train(
    config: PathLike | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Run:
    """Trains by a config, as ``rtl-dist train`` does; shows on stderr how far it is.

    It goes on where an earlier start of the same run was stopped or killed, and returns at once
    where the run is done. Ctrl-C saves first, and raises StopRequested; a second one interrupts at
    once (KeyboardInterrupt): the same call goes on from either.

    Args:
        config: a YAML file, such as ``configs/transfer.yaml``, its content as a dict, or a Config.
        overrides: ``{"run.dir": "runs/x", "stages.0.lr": 3e-4}``, or a list of ``key=value``.

    Returns:
        the run: its metrics as columns, its plots, its best weights.

    Raises:
        UserError: the config is wrong, or fits neither the data nor the run that is there.
        DataError: the data set is missing or damaged.
        StopRequested: it was asked to stop, and saved itself.
        RtlDistError: anything else that is not the caller's to mend in Python.
    """
    from rtl_dist.distributed.guest import as_guest
    from rtl_dist.report.finished import Run

    checked = _config(config, overrides)
    with as_guest():
        train_by(checked)
    return Run(checked.run.dir)


def evaluate(
    model: PathLike | Run | Model,
    data: PathLike | Dataset,
    split: str | None = None,
    *,
    out: PathLike | None = None,
    workers: Literal["auto"] | int = "auto",
    precision: Precision | None = None,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    redirects: Redirects = "origin",
    raw: bool = False,
) -> Evaluation:
    """Scores every sample of a split once, as ``rtl-dist evaluate`` does, and writes tables,
    pictures and a page.

    Args:
        model: a folder, or what ``train`` or ``load`` gave (scored anew from its files, ``raw`` if
            it was loaded so).
        data: a data set's folder or URL, or what ``open_dataset`` gave.
        split: None takes test where there is one, else val.
        out: None takes ``evaluation/<split>`` in the model's folder, or in one of a file's name.
        workers: loader processes.
        precision: None: that of the training.
        cache_dir, cache_gb, redirects: of remote data; see ``Cache``. Those that ``open_dataset``
            was given hold where no others are.
        raw: whether the model's calibration is left out.

    Raises:
        UserError: no such model, or its head is for other classes than the data's.
        DataError: no such data or split, or a damaged sample.
        StopRequested: it was interrupted.
    """
    from rtl_dist.distributed.guest import as_guest
    from rtl_dist.inference.model import Model
    from rtl_dist.report.finished import Evaluation
    from rtl_dist.report.model_evaluation import evaluate as evaluate_into
    from rtl_dist.report.model_evaluation import usual_out

    where = _place_of(model)
    if isinstance(model, Model):
        raw = raw or model.raw
        if model.tta is not None:
            raise UserError(
                f"model: it was loaded with tta={model.tta}, and an evaluation looks at each image"
                " once; load it without, or predict"
            )
    kept = data.place if isinstance(data, Dataset) else DatasetPlace(where=os.fspath(data))
    place = DatasetPlace(
        where=kept.where,
        cache_dir=cache_dir or kept.cache_dir,
        cache_gb=cache_gb or kept.cache_gb,
        redirects=kept.redirects if redirects == "origin" else redirects,
    )
    of_cache = {name: getattr(place, name) for name in ("cache_dir", "cache_gb", "redirects")}
    split = split or open_dataset(place.where, **of_cache).judging_split
    folder = usual_out(Path(where), split) if out is None else Path(out)
    with as_guest():
        evaluate_into(
            where,
            place.where,
            split,
            out=folder,
            workers=workers,
            precision=precision,
            raw=raw,
            **of_cache,
        )
    return Evaluation(folder)


@overload
def predict(
    model: PathLike | Run | Model,
    inputs: PathLike | Iterable[PathLike],
    out: PathLike,
    **options: Unpack[PredictOptions],
) -> Path: ...
@overload
def predict(  # type: ignore[overload-overlap]  # a path is a sequence of texts
    model: PathLike | Run | Model,
    inputs: ImageLike,
    out: None = ...,
    **options: Unpack[PredictOptions],
) -> Prediction: ...
@overload
def predict(  # type: ignore[overload-overlap]  # the first that fits is meant
    model: PathLike | Run | Model,
    inputs: Sequence[ImageLike],
    out: None = ...,
    **options: Unpack[PredictOptions],
) -> list[Prediction]: ...
@overload
def predict(
    model: PathLike | Run | Model,
    inputs: Iterable[ImageLike],
    out: None = ...,
    **options: Unpack[PredictOptions],
) -> Iterator[Prediction]: ...
def predict(
    model: PathLike | Run | Model,
    inputs: ImageLike | Iterable[ImageLike],
    out: PathLike | None = None,
    **options: Unpack[PredictOptions],
) -> Any:
    """What a model says of images: here, or into a file.

    With ``out`` this is ``rtl-dist predict``: inputs are files, folders, patterns, tables, tars,
    URLs, or with ``split`` data sets, of any number; worker processes read them, and what was
    stopped goes on by the same call. Without it it is ``load(model).predict(inputs)``.

    Args:
        model: a folder or exported file, or what ``train`` or ``load`` gave.
        inputs: one or several.
        out: a .csv, .jsonl or .parquet file.
        options: see ``PredictOptions``.

    Returns:
        with ``out`` its path, else what ``Model.predict`` returns.

    Raises:
        UserError: no such model, input or option.
        DataError: more inputs than ``allow_errors`` cannot be read; ``out`` is written none the
            less.
        StopRequested: it was interrupted.
    """
    from rtl_dist.distributed.guest import as_guest
    from rtl_dist.inference.given import is_one_image
    from rtl_dist.inference.model import Model
    from rtl_dist.inference.predict import predict as predict_into_file
    from rtl_dist.inference.request import Request

    known = PredictOptions.__annotations__ if out is not None else ("threshold", "tta", "raw")
    if unknown := sorted(options.keys() - set(known)):
        where = " without out=" if out is None else ""
        raise UserError(f"{unknown[0]}: no such option{where}; there are {', '.join(known)}")
    if out is None:
        threshold = options.pop("threshold", None)
        if options and isinstance(model, Model):
            raise UserError(f"{', '.join(options)}: the model is loaded already; give it to load")
        loaded = model if isinstance(model, Model) else load(_place_of(model), **_of_load(options))
        return loaded.predict(cast(Any, inputs), threshold=threshold)
    words: list[Any] = [inputs] if is_one_image(inputs) else list(cast(Any, inputs))
    if strange := [word for word in words if not isinstance(word, str | os.PathLike)]:
        raise UserError(
            f"out: a {type(strange[0]).__name__} has no name to stand in a file; give paths, or"
            " leave out= out"
        )
    if isinstance(model, Model):  # of what it is read anew from, it is this that was asked for
        options.setdefault("raw", model.raw)
        options.setdefault("tta", model.tta)
    explain, picture = options.pop("explain", None), options.pop("grid", None)
    request = Request(
        model=_place_of(model),
        inputs=[os.fspath(word) for word in words],
        out=Path(out),
        explain=None if explain is None else Path(explain),
        grid=None if picture is None else Path(picture),
        **cast(Any, options),
    )
    with as_guest():
        predict_into_file(request)
    return Path(out)


def _of_load(options: PredictOptions) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in ("raw", "tta")}


def _place_of(model: PathLike | Run | Model) -> str:
    from rtl_dist.inference.model import Model
    from rtl_dist.report.finished import Run

    if isinstance(model, Run):
        return str(model.folder)
    return str(model.source) if isinstance(model, Model) else os.fspath(model)


def _config(
    config: PathLike | Mapping[str, Any] | Config, overrides: Mapping[str, Any] | Sequence[str]
) -> Config:
    if isinstance(overrides, str):
        raise UserError(f"overrides: {overrides!r} is a text; give a list of key=value, or a dict")
    words = (
        [f"{key}={_written(value)}" for key, value in overrides.items()]
        if isinstance(overrides, Mapping)
        else list(overrides)
    )
    if isinstance(config, str | os.PathLike):
        return load_config(os.fspath(config), words)
    tree = to_dict(config) if isinstance(config, Config) else _plain(config)
    if not isinstance(tree, dict):
        raise UserError(f"config: a {type(config).__name__} is none; give a file's path, or a dict")
    return parse_config(tree, words)


def _written(value: Any) -> str:
    """A value as an override has it: texts as they are, all else as YAML."""
    value = _plain(value)
    return value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> Any:
    """As YAML would have given it: paths are texts, tuples lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
