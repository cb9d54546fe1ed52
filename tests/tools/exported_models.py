"""Models to be exported, made without training, and exports of them."""

from networks import classifier, moved_statistics
from tiny_runs import CLASSES

from rtl_dist.cli import main
from rtl_dist.config import ModelConfig
from rtl_dist.core.tasks import SINGLE_LABEL
from rtl_dist.data.format.dataset import open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.model.calibration import Calibration
from rtl_dist.model.folder import LoadedModel, write_loaded

FITTED = Calibration(temperature=1.7, num_samples=21, split="val")


def loaded_model(
    folder, name="test_resnet", *, channels=3, task=SINGLE_LABEL, calibration=FITTED, **options
):
    return LoadedModel(
        model=moved_statistics(classifier(name, channels=channels, **options)).eval(),
        classes=CLASSES,
        task=task,
        dataset_fingerprint="made up",
        precision="no",
        source=folder,
        network=ModelConfig(name=name, weights="none", **options),
        calibration=calibration,
    )


def model_folder(folder, *given, **options):
    folder.mkdir()
    write_loaded(folder, loaded_model(folder, *given, **options))
    return folder


def export(model, out, format, *words):
    words = ["export", model, "--format", format, "--out", out, *words]
    return main([str(word) for word in words])


def images_of(dataset):
    split = open_dataset(dataset).split("val")
    reader = SampleReader(split)
    return [reader.read(sample) for sample in range(split.num_samples)]
