"""Decides whether a stage works on cached features: views found, or computed where that pays."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from rtl_dist.config import FeaturesConfig
from rtl_dist.core.files import user_cache_folder
from rtl_dist.core.memory import available_memory
from rtl_dist.core.text import duration, readable_size
from rtl_dist.data.format.split import Split
from rtl_dist.data.images.augment import EvalTransform
from rtl_dist.distributed.runtime import Runtime
from rtl_dist.features.compute import (
    NoCachedFeaturesError,
    compute_in_memory,
    compute_view,
    rounds_of_view,
)
from rtl_dist.features.seal import Seal, user_secret
from rtl_dist.features.store import FeatureStore
from rtl_dist.features.trial import HELD_BY_CACHE, TimeTraining, is_in_doubt, measure
from rtl_dist.features.view import View
from rtl_dist.features.views import ViewPlan, ViewPlanner

LOG = logging.getLogger("rtl_dist")


class FeatureMaker:
    """Makes, or finds, views of splits for one stage. Every method is called by all ranks."""

    def __init__(
        self,
        planner: ViewPlanner,
        features: FeaturesConfig,
        *,
        runtime: Runtime,
        workers: int,
        uses_store: bool,
        decided: bool | None = None,
        time_training: TimeTraining = lambda features: 0.0,
    ) -> None:
        """
        Args:
            uses_store: views are kept and found again; else there is only ``view_to_solve_on``.
            decided: whether the stage trains on views, as an earlier start found; None: not yet.
        """
        self._uses_store, self._decided, self._time_training = uses_store, decided, time_training
        self._trains_on_views = False
        self._planner, self._runtime, self._workers = planner, runtime, workers
        folder = features.cache_dir
        root = user_cache_folder() / "features" if folder is None else Path(folder)
        secret = runtime.from_main(user_secret) if uses_store else None
        self._store = FeatureStore(
            root, int(features.cache_gb * 1e9), None if secret is None else Seal(secret)
        )

    def training_views(
        self, split: Split, numbers: tuple[int, ...], *, samples_to_come: int
    ) -> dict[int, View] | None:
        """The views by number; None where they do not fit or would cost more than they save, or
        where that was decided at an earlier start.

        Args:
            samples_to_come: images that the stage has still to see.

        Raises:
            StopRequested: on every rank, if one was asked to stop; whole views are kept.
            RtlDistError: on every rank, if the loader of one failed.
        """
        plans = [self._planner.training(split, number) for number in numbers]
        views = None
        if self._decided is not False:
            views = self._provide(plans, most_to_compute=samples_to_come)
        self._trains_on_views = views is not None
        if views is None:
            return None
        if _bytes_of(plans) > available_memory() * HELD_BY_CACHE:
            for view in views:
                view.will_be_read_at_random()
        return dict(zip(numbers, views, strict=True))

    def view_to_solve_on(self, split: Split, transform: EvalTransform) -> View:
        """The training images as evaluations see them, a damaged one replaced by another. Where the
        store may not or cannot hold it, rank 0 has it in memory, and the others only what is
        damaged. Raises as ``training_views``."""
        plan, runtime = self._planner.evaluation(split, transform, substitutes=True), self._runtime
        views = self._provide([plan], most_to_compute=split.num_samples)
        if views is not None:
            return views[0]
        rounds = rounds_of_view(plan, runtime)
        with (
            runtime.heartbeat.phase("computing features"),
            runtime.progress(total=rounds, what="features", unit="batch") as bar,
        ):
            LOG.info("computing features of %s images of %s", f"{split.num_samples:,}", split.name)
            return compute_in_memory(plan, runtime=runtime, workers=self._workers, bar=bar)

    def evaluation_view(self, split: Split, transform: EvalTransform) -> View | None:
        """The view that an evaluation of the split has; of large activations only where those of
        training pay. Raises as ``training_views``, and ``DataError`` on every rank if a sample is
        damaged."""
        plan = self._planner.evaluation(split, transform)
        if is_in_doubt(plan) and not self._trains_on_views:
            return None
        views = self._provide([plan], most_to_compute=split.num_samples)
        return None if views is None else views[0]

    def _provide(self, plans: list[ViewPlan], *, most_to_compute: int) -> list[View] | None:
        """The views of one split, those that are not there computed; None where that cannot be or
        does not pay."""
        split = plans[0].split
        if not self._uses_store:
            return None
        try:
            with self._runtime.heartbeat.phase("checking features", open_ended=True):
                missing = [plan for plan in plans if not self._is_there(plan)]
            if plans[0].number is not None and self._decided is None and is_in_doubt(plans[0]):
                self._require_sooner(plans, missing, to_come=most_to_compute)
            if missing:
                keep = {plan.key for plan in plans}
                self._require_worth(missing, most_to_compute=most_to_compute, keep=keep)
                self._compute(missing, keep)
            elif plans[0].number is not None:
                LOG.info("cached features found in %s", self._store.root)
            return self._open(plans)
        except NoCachedFeaturesError as error:
            LOG.info("no cached features of %s: %s", split.name, error)
            return None

    def _is_there(self, plan: ViewPlan) -> bool:
        """Whether the store has a view, as it was written.

        Raises:
            NoCachedFeaturesError: on every rank, if not all of them see it.
        """
        runtime, store = self._runtime, self._store
        if not runtime.from_main(lambda: store.is_clean(plan.key)):
            return False
        if not all(runtime.gather(store.has(plan.key))):
            raise NoCachedFeaturesError(f"not every process sees {store.root}")
        if not all(runtime.gather(store.believes(plan.key, plan.shape, plan.content))):
            if any(runtime.gather(store.is_another_users(plan.key))):
                raise NoCachedFeaturesError(
                    f"{store.root / plan.key} is another user's, who may need it, and not believed;"
                    " set features.cache_dir to a folder of your own"
                )
            LOG.warning(
                "cached features %s are not what they should be; computing them again", plan.key
            )
            runtime.from_main(lambda: store.forget(plan.key))
            return False
        share = {"rank": runtime.rank, "world_size": runtime.world_size}
        if all(runtime.gather(store.is_sound(plan.key, **share))):
            return True
        LOG.warning("cached features %s are damaged; computing them again", plan.key)
        runtime.from_main(lambda: store.forget(plan.key))
        return False

    def _require_worth(
        self, missing: list[ViewPlan], *, most_to_compute: int, keep: set[str]
    ) -> None:
        """
        Raises:
            NoCachedFeaturesError: on every rank, if there are more images to compute than the stage
                has still to see, or there is no room beside the views ``keep``.
        """
        to_compute, num_bytes = _images_of(missing), _bytes_of(missing)
        if to_compute > most_to_compute:
            raise NoCachedFeaturesError(
                f"{most_to_compute:,} images are still to come, fewer than the {to_compute:,}"
                " of the views that are missing"
            )
        why = self._runtime.from_main(lambda: self._store.why_no_room(num_bytes, keep=keep))
        if why:
            raise NoCachedFeaturesError(why)

    def _require_sooner(
        self, plans: list[ViewPlan], missing: list[ViewPlan], *, to_come: int
    ) -> None:
        """
        Raises:
            NoCachedFeaturesError: on every rank, if the stage is done sooner without.
            StopRequested, RtlDistError: see ``measure``.
        """
        if missing:
            keep = {plan.key for plan in plans}
            self._require_worth(missing, most_to_compute=to_come, keep=keep)
        runtime = self._runtime
        with runtime.heartbeat.phase("trying cached features"):
            times = measure(
                plans,
                self._store,
                time_training=self._time_training,
                runtime=runtime,
                workers=self._workers,
            )
        overlap = runtime.device.type == "cuda"
        cached_s = times.cached_s(to_come, to_compute=_images_of(missing), overlap=overlap)
        afresh_s = times.afresh_s(to_come, overlap=overlap)
        LOG.info("features of %s, tried: an image takes %s", plans[0].split.name, times.text())
        if math.isinf(cached_s):
            raise NoCachedFeaturesError(f"{self._store.root} cannot be written by every process")
        if cached_s > afresh_s:
            raise NoCachedFeaturesError(
                f"the stage takes about {duration(cached_s / runtime.world_size)} with"
                f" them and {duration(afresh_s / runtime.world_size)} without"
            )

    def _compute(self, missing: list[ViewPlan], keep: set[str]) -> None:
        """Raises as ``compute_view``."""
        LOG.info(
            "computing features of %s images of %s (%s) into %s",
            f"{_images_of(missing):,}",
            missing[0].split.name,
            readable_size(_bytes_of(missing)),
            self._store.root,
        )
        runtime = self._runtime
        rounds = sum(rounds_of_view(plan, runtime) for plan in missing)
        with (
            runtime.heartbeat.phase("computing features"),
            runtime.progress(total=rounds, what="features", unit="batch") as bar,
        ):
            for plan in missing:
                if self._is_there(plan):
                    continue  # another run has made it meanwhile
                compute_view(
                    plan, self._store, keep=keep, runtime=runtime, workers=self._workers, bar=bar
                )

    def _open(self, plans: list[ViewPlan]) -> list[View]:
        """
        Raises:
            NoCachedFeaturesError: on every rank, if one of them cannot.
        """
        views = []
        try:
            views = [self._store.open(plan.key) for plan in plans]
        except (OSError, ValueError, KeyError) as error:
            LOG.warning("cached features cannot be opened (%s)", error)
        if not all(self._runtime.gather(len(views) == len(plans))):
            raise NoCachedFeaturesError(f"not every process can open {self._store.root}")
        return views


def _images_of(plans: list[ViewPlan]) -> int:
    return sum(plan.shape.num_samples for plan in plans)


def _bytes_of(plans: list[ViewPlan]) -> int:
    return sum(plan.shape.num_bytes for plan in plans)
