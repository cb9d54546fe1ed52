"""The beginning and the end of a run: what ``fit`` needs is opened, results are written."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtl_dist.config import Config, EarlyStop, Stage
from rtl_dist.core.errors import DataError, RtlDistError, StopRequested, UserError
from rtl_dist.core.files import sha256_of, write_json
from rtl_dist.data.format.dataset import (
    DESCRIPTION,
    MULTI_LABEL,
    SINGLE_LABEL,
    Dataset,
    check_split,
    open_dataset,
)
from rtl_dist.data.loading.loader import resolve_workers
from rtl_dist.distributed.runtime import Runtime, configure_logging
from rtl_dist.evaluation.metrics import compute_metrics
from rtl_dist.evaluation.scoring import KeptImages, predict_split
from rtl_dist.model.average import Average
from rtl_dist.model.build import build_model
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.folder import WEIGHTS, load_model
from rtl_dist.model.parts import digest, trainable_parts
from rtl_dist.optim.schedule import StageSpan, stage_spans
from rtl_dist.records.checkpoint import Snapshot, load_newest_checkpoint
from rtl_dist.records.checkpoint_writer import CheckpointWriter
from rtl_dist.records.run_folder import describe_run, read_results, restore, run_identity
from rtl_dist.records.state import TrainState
from rtl_dist.records.tracking import build_tracker
from rtl_dist.training.batches import training_order
from rtl_dist.training.memory import resolve_micro_batch_size
from rtl_dist.training.run import Job

LOG = logging.getLogger("rtl_dist")
_FEW_SAMPLES = 100
_METRICS = {
    SINGLE_LABEL: ("val/top1", "val/top5", "val/macro_f1", "val/loss"),
    MULTI_LABEL: ("val/map", "val/micro_f1", "val/macro_f1", "val/exact_match", "val/loss"),
}


def open_data(config: Config, runtime: Runtime) -> Dataset:
    """Opens ``data.path``, packing ``data.source`` into it first where nothing is there yet.

    Raises:
        DataError: on every rank, if there is no data set or it cannot be packed.
    """
    configure_logging(is_main=runtime.is_main)

    def pack_if_missing() -> None:
        root = Path(config.data.path)
        if config.data.source is None or (root / DESCRIPTION).exists():
            return
        from rtl_dist.prepare.packing.pack import pack

        LOG.info("packing %s into %s", config.data.source, root)
        pack(config.data.source, root, val_fraction=config.data.val_fraction)

    with runtime.heartbeat.phase("packing", open_ended=runtime.is_main):
        runtime.from_main(pack_if_missing)
    data = config.data
    with runtime.heartbeat.phase("opening the data set", open_ended=True):
        return runtime.on_every_rank(
            lambda: open_dataset(data.path, cache_dir=data.cache_dir, cache_gb=data.cache_gb)
        )


def resolve(config: Config, runtime: Runtime, dataset: Dataset) -> Config:
    """The config with every auto that is part of the run's identity made definite.

    Raises:
        UserError: the processes, the metric or the mixing do not fit the data or the batch.
    """
    stages = [
        stage
        if stage.early_stop is None
        else replace(
            stage,
            early_stop=_measured(stage.early_stop, dataset, f"stages.{stage.name}.early_stop"),
        )
        for stage in config.stages
    ]
    config = replace(
        config,
        precision=runtime.precision,
        early_stop=_measured(config.early_stop, dataset, "early_stop"),
        stages=stages,
    )
    if dataset.task == MULTI_LABEL:
        _require_single_label_options_unused(config)
    if config.batch.sync_batchnorm and runtime.device.type != "cuda":
        raise UserError("batch.sync_batchnorm: torch has it for GPUs only; set it to false")
    micro = resolve_micro_batch_size(config, runtime, num_classes=dataset.num_classes)
    if config.batch.sync_batchnorm and micro * runtime.world_size != config.batch.global_:
        raise UserError(
            "batch.sync_batchnorm: takes one microbatch a process, whose layers wait for each"
            f" other; set batch.micro={max(1, config.batch.global_ // runtime.world_size)}"
        )
    return replace(config, batch=replace(config.batch, micro=micro))


def _measured(early_stop: EarlyStop, dataset: Dataset, path: str) -> EarlyStop:
    metric = early_stop.metric
    if metric == "auto":
        metric = "val/map" if dataset.task == MULTI_LABEL else "val/top1"
    if metric not in _METRICS[dataset.task]:
        raise UserError(
            f"{path}.metric: {metric} is not measured on {dataset.task} data; choose"
            f" {', '.join(_METRICS[dataset.task])}"
        )
    return replace(early_stop, metric=metric)


def _require_single_label_options_unused(config: Config) -> None:
    for key in config.mixing_keys():
        raise UserError(f"{key}: needs single-label data; set it to 0")
    if config.data.sampling == "balanced":
        raise UserError("data.sampling: balanced needs single-label data; leave it out")
    if config.optim.logit_adjustment:
        raise UserError("optim.logit_adjustment: needs single-label data; set it to 0")
    if config.optim.loss == "cross_entropy":
        raise UserError("optim.loss: cross_entropy needs single-label data; use bce or focal")


def already_done(config: Config, runtime: Runtime, run: Path, dataset: Dataset) -> str | None:
    """What to say of a run that this very config, resolved, has finished; None of any other."""

    def look() -> str | None:
        results = read_results(run)
        if results.get("status") != "done":
            return None
        snapshot = load_newest_checkpoint(run)
        if snapshot is None or snapshot.identity != run_identity(config, dataset):
            return None
        if not (run / "report.html").exists():
            _draw(run, runtime)  # it was killed meanwhile
        best = results.get("best")
        reached = f" (best {best['metric']} {best['value']:.4f})" if best else ""
        return f"{run} is already done{reached}: nothing to do. See {run}/report.html"

    line: str | None = runtime.from_main(look)
    return line


@contextmanager
def open_job(
    config: Config, runtime: Runtime, run: Path, dataset: Dataset
) -> Iterator[tuple[Job, list[tuple[Stage, StageSpan]], Snapshot | None]]:
    """Everything the stages need, the stages that remain, and the checkpoint to go on from.

    The order of initialisation: the run's own checkpoint, else the weights the config names.

    Args:
        config: resolved by ``resolve``.

    Raises:
        UserError, DataError: on every rank, before anything is trained.
    """
    with runtime.heartbeat.phase("opening the data set", open_ended=True):
        train, val = runtime.on_every_rank(
            lambda: (dataset.split(config.data.train), dataset.split(config.data.val))
        )
        _check_classes(dataset, config.data.train, train.class_counts)
        for split in (train, val):
            runtime.from_main(functools.partial(check_split, dataset, split))
    runtime.on_every_rank(
        lambda: train.files.require_room(training_order(train, config).most_shards_at_once())
    )
    with runtime.heartbeat.phase("loading weights", open_ended=True):
        restored = restore(run, config, dataset, runtime)
        model, origin = _initial_model(config, dataset, restored, dtype=runtime.dtype)
    for stage in config.stages:
        parts = trainable_parts(model, stage)  # a misspelt part is refused now, not after hours
        if config.model.weights == "none" and parts - {"head"} and stage.batchnorm != "train":
            LOG.warning(
                "stage %s trains a network without weights under batchnorm: %s, which holds back"
                " what it can learn; set batchnorm: train",
                stage.name,
                stage.batchnorm,
            )
    if config.batch.sync_batchnorm:
        model.trunk = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.trunk)
    model.to(device=runtime.device, dtype=runtime.dtype, memory_format=torch.channels_last)
    average = Average(model, config.optim.ema) if config.optim.ema else None
    if average and restored is not None:
        average.model.load_state_dict(restored.ema)
    state = restored.state if restored else TrainState()
    if restored is None and _has_metrics(run):
        LOG.warning(
            "%s has metrics of an earlier start but no checkpoint: starting from the beginning,"
            " they are replaced",
            run,
        )
    runtime.from_main(lambda: describe_run(run, config, runtime))
    LOG.info(
        "%s: %s; %d classes, %s training and %s validation images; %d process(es), precision %s",
        config.model.name,
        origin,
        dataset.num_classes,
        f"{train.num_samples:,}",
        f"{val.num_samples:,}",
        runtime.world_size,
        runtime.precision,
    )
    if val.num_samples < _FEW_SAMPLES:
        LOG.info(
            "split %s has %d images: one of them is %.1f points, so read its figures with care",
            val.name,
            val.num_samples,
            100 / val.num_samples,
        )
    tracker = build_tracker(run, config, state, runtime)
    job = Job(
        config=config,
        runtime=runtime,
        run=run,
        dataset=dataset,
        train=train,
        val=val,
        model=model,
        average=average,
        tracker=tracker,
        state=state,
        stage_best=restored.stage_best if restored else {},
        val_images=KeptImages(),
        writer=CheckpointWriter(),
        workers=resolve_workers(config.data.workers, local_world_size=runtime.local_world_size),
    )
    spans = stage_spans(
        [stage.epochs for stage in config.stages],
        [stage.steps for stage in config.stages],
        num_samples=train.num_samples,
        global_batch_size=config.batch.global_,
    )
    remaining = list(zip(config.stages, spans, strict=True))[state.stage :]
    try:
        with runtime.stops.deferred() if runtime.stops else nullcontext():
            try:
                yield job, remaining, restored
            except StopRequested:
                job.wait_for_checkpoint()
                raise
    except RtlDistError as error:
        if runtime.is_main:
            status = "stopped" if isinstance(error, StopRequested) else "failed"
            with suppress(OSError):  # the disk may be what is wrong
                write_json(run / "results.json", _results(job, status) | {"reason": str(error)})
        raise
    finally:
        with runtime.heartbeat.phase("saving", open_ended=runtime.is_main):
            job.writer.join()
        tracker.close()


def _has_metrics(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def _initial_model(
    config: Config, dataset: Dataset, restored: Snapshot | None, *, dtype: torch.dtype
) -> tuple[Classifier, str]:
    """The model as the run begins or goes on, and where its weights are from."""
    if restored is None:
        return build_model(config.model, config.data, classes=dataset.classes, seed=config.seed)
    untrained = replace(config.model, weights="none")
    model, _ = build_model(untrained, config.data, classes=dataset.classes, seed=config.seed)
    model.to(dtype=dtype)  # before loading, which would round the checkpoint's numbers
    model.load_state_dict(restored.model)
    return model, f"going on from step {restored.state.step}"


def finish(job: Job) -> str:
    """Evaluates the best weights on the test split, writes ``results.json``, draws the report.

    Returns:
        one line: what was reached and what to type next.
    """
    best = job.run / "best"
    job.wait_for_checkpoint()
    # rank 0's final write of best/ must be there before the others read it
    weights_sha256 = job.runtime.from_main(lambda: sha256_of(best / WEIGHTS))
    test = _evaluate_test(job, best)
    results = _results(job, "done") | {
        "test": test,
        "frozen_ok": True,  # a frozen weight that moved would have ended the run
        "weights_sha256": digest(job.model.state_dict()),
        "best_weights_sha256": weights_sha256,
    }

    def conclude() -> None:
        job.tracker.flush()
        write_json(job.run / "results.json", results)
        _draw(job.run, job.runtime)

    job.runtime.from_main(conclude)
    return _last_word(job, test) if job.runtime.is_main else ""


def _draw(run: Path, runtime: Runtime) -> None:
    from rtl_dist.report.run import draw_run

    LOG.info("drawing plots and report.html")
    with runtime.heartbeat.phase("drawing", open_ended=True):
        draw_run(run)


def _results(job: Job, status: str) -> dict[str, Any]:
    """What ``results.json`` says of any run, however it ended."""
    state = job.state
    return {
        "status": status,
        "best": None if state.best is None else vars(state.best),
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "skipped_steps": state.skipped_steps,
        "microbatch_halvings": [
            {"from_step": step, "micro": size} for step, size in state.halvings
        ],
        "bad_samples": {"count": state.bad_samples, "names": state.bad_names},
        "dataset_fingerprint": job.dataset.fingerprint,
        "elapsed_s": round(state.elapsed_s, 3),
    }


def _evaluate_test(job: Job, best: Path) -> dict[str, float] | None:
    name = job.config.data.test
    if name is None or name not in job.dataset.split_names:
        return None
    model = load_model(best).model.to(
        device=job.runtime.device, dtype=job.runtime.dtype, memory_format=torch.channels_last
    )
    split = job.runtime.on_every_rank(lambda: job.dataset.split(name))
    job.runtime.from_main(lambda: check_split(job.dataset, split))
    LOG.info("evaluating the best weights on %s", name)
    heartbeat = job.runtime.heartbeat
    with heartbeat.phase(f"evaluating {name}"):
        predictions = predict_split(
            model, job.dataset, split, runtime=job.runtime, workers=job.workers
        )

    def write() -> dict[str, float]:
        from rtl_dist.report.evaluation import write_evaluation

        assert predictions is not None
        metrics = compute_metrics(predictions)
        write_evaluation(
            predictions,
            job.run / "evaluation" / name,
            split=split,
            metrics=metrics,
            title=f"{job.run.name}: {name}",
        )
        return metrics

    with heartbeat.phase("drawing", open_ended=job.runtime.is_main):
        metrics: dict[str, Any] = job.runtime.from_main(write)
    return metrics | {"num_samples": split.num_samples}


def _last_word(job: Job, test: dict[str, float] | None) -> str:
    best, data = job.state.best, job.config.data
    reached = (
        "" if best is None else f"best {best.metric} {best.value:.4f} at epoch {best.epoch:.1f}"
    )
    if test is not None:
        name = "map" if job.dataset.task == MULTI_LABEL else "top1"
        reached += f", {data.test}/{name} {test[name]:.4f} on {test['num_samples']:,} images"
    return (
        f"done: {reached} in {job.state.elapsed_s:.0f} s. See {job.run}/report.html; next:"
        f" rtl-dist evaluate {job.run} --data {data.path} --split {data.val}"
    )


def _check_classes(dataset: Dataset, split: str, counts: tuple[int, ...]) -> None:
    missing = [name for name, n in zip(dataset.classes, counts, strict=True) if n == 0]
    if missing:
        raise DataError(
            f"split {split!r} of {dataset.where} has no image of class {missing[0]!r}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; add some, or pack"
            " without that class"
        )
