"""Whether a model can be judged by a data set: its labels are those of the data."""

from __future__ import annotations

from rtl_dist.core.errors import UserError
from rtl_dist.data.format.dataset import Dataset
from rtl_dist.model.folder import LoadedModel


def require_same_classes(loaded: LoadedModel, dataset: Dataset) -> None:
    """
    Raises:
        UserError: the model's labels are not those of the data.
    """
    if loaded.task != dataset.task:
        raise UserError(
            f"{loaded.source} was trained on {loaded.task} data, {dataset.where} is {dataset.task}"
        )
    if loaded.classes != dataset.classes:
        raise UserError(
            f"the head in {loaded.source} is for {len(loaded.classes)} classes"
            f" ({_some(loaded.classes)}), the data in {dataset.where} has {dataset.num_classes}"
            f" ({_some(dataset.classes)}); use data packed with the same classes"
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
