"""What a stage is judged by: the model or its average, on the whole val split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rtl_dist.config import ResolvedStage
from rtl_dist.data.images.augment import training_transform
from rtl_dist.data.loading.loader import make_loader
from rtl_dist.data.loading.microbatches import TrainingMicrobatches
from rtl_dist.data.order.training import training_order
from rtl_dist.evaluation.logits import eval_transform
from rtl_dist.evaluation.scoring import metrics_on_every_rank, score_split
from rtl_dist.features.maker import FeatureMaker
from rtl_dist.features.view import View
from rtl_dist.model.batchnorm import learning_layers
from rtl_dist.model.classifier import Classifier
from rtl_dist.model.divided import Divided, divide
from rtl_dist.model.freezing import digest, set_modes
from rtl_dist.training.run import Run
from rtl_dist.training.stage_network import StageNetwork

_STATISTICS_SAMPLES = 1024  # images that BatchNorm statistics are measured on, at least


class StageEvaluator:
    """Evaluates during one stage; every method is called by all ranks."""

    def __init__(
        self,
        stage: ResolvedStage,
        run: Run,
        network: StageNetwork,
        features: FeatureMaker | None,
    ) -> None:
        """
        Args:
            features: of the network's frozen part; None: there are none to have.
        """
        self._stage, self._run, self._network, self._features = stage, run, network, features
        self._view: View | None = None
        self._looked = False

    @contextmanager
    def model(self) -> Iterator[Classifier]:
        """The model that counts, as it is to be evaluated and kept. Afterwards the trained one is
        in the stage's modes again."""
        run = self._run
        try:
            with self._measured_statistics():
                yield run.evaluated_model
        finally:
            set_modes(run.model, self._stage)

    def metrics(self, model: Classifier) -> dict[str, float]:
        """The val metrics; what is frozen is computed once for the stage. Raises as
        ``score_split``."""
        run = self._run
        divided = self._divided()
        if not self._looked:
            self._view, self._looked = self._frozen_view(model, divided), True
        predictions = score_split(
            model,
            run.dataset,
            run.val,
            runtime=run.runtime,
            workers=run.workers,
            divided=divided,
            view=self._view,
            kept=run.val_images,
            keep_scores=False,
        )
        return metrics_on_every_rank(predictions, run.runtime)

    def _divided(self) -> Divided | None:
        """The model that counts, cut as the stage's is, so that its scores do not depend on whether
        the frozen part's features are at hand."""
        run, network = self._run, self._network
        if network.frozen is None:
            return None
        if run.average is None:
            return Divided(network.frozen, network.trained)
        average, dtype = run.average.model, run.runtime.autocast_dtype
        return divide(average, network.first_trained, dtype=dtype)

    def _frozen_view(self, model: Classifier, divided: Divided | None) -> View | None:
        run, network = self._run, self._network
        if self._features is None or divided is None or divided.frozen is None:
            return None
        if run.average:  # its frozen part is another one, if a stage before trained it
            assert network.frozen is not None
            if digest(divided.frozen.state_dict()) != digest(network.frozen.state_dict()):
                return None
        return self._features.evaluation_view(run.val, eval_transform(model))

    @contextmanager
    def _measured_statistics(self) -> Iterator[None]:
        """Within the block the average's BatchNorm statistics are those that its weights meet."""
        run = self._run
        layers = set(learning_layers(run.model))
        wanted = run.config.optim.ema_batchnorm == "reestimated" and layers
        if run.average is None or not wanted or run.config.data.backend == "stream":
            yield
            return
        positions = self._statistics_positions()
        images = self._training_images(positions)
        with run.average.with_statistics_of(images, len(positions), layers, run.runtime):
            yield

    def _statistics_positions(self) -> range:
        """This rank's share of the first microbatches of the stream, which are the same at any
        number of ranks."""
        run = self._run
        batch = run.config.batch.total
        num_images = math.ceil(min(_STATISTICS_SAMPLES, run.train.num_samples) / batch) * batch
        return range(0, num_images, run.micro_batch_size)[
            run.runtime.rank :: run.runtime.world_size
        ]

    def _training_images(self, positions: range) -> Iterator[torch.Tensor]:
        run, stage, config = self._run, self._stage, self._run.config
        microbatches = TrainingMicrobatches(
            run.train,
            training_transform(stage, channels=config.data.channels),
            order=training_order(run.train, config.data, seed=config.seed),
            size=run.micro_batch_size,
            views=stage.views,
        )
        loader = make_loader(
            microbatches,
            positions,
            workers=run.workers,
            device=run.runtime.device,
            ring_bytes=run.runtime.loader_bytes,
            give_up=run.runtime.is_asked,
        )
        heartbeat = run.runtime.heartbeat
        for one in heartbeat.while_fetching(loader, are_remote=run.train.is_remote):
            yield one.inputs
