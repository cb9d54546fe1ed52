"""Where a model comes from: the weights that it began with, their licence, and its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rtl_dist.config import Config, read_run_config, to_dict

_SECTIONS = ("seed", "model", "stages", "optim", "augment", "batch", "precision")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Of a model, as far as its run says it."""

    weights: str
    """That it began with, for people."""
    licence: str
    """Of these; as their publisher names it, or that nobody said."""
    base: str
    """Their repository on the Hugging Face hub; empty: there is none, or it is unknown."""
    training: str
    """YAML: the sections of the run's config that shape a model, without its paths; empty where
    the run is not there."""


def origin_of(model_path: str) -> Origin:
    """Of a run folder's model, or one of the folders in it."""
    config = _config_of(Path(model_path))
    if config is None:
        return Origin(
            weights="unknown: this was exported without the folder of its run",
            licence="unknown",
            base="",
            training="",
        )
    weights, licence, base = _weights_of(config)
    return Origin(weights=weights, licence=licence, base=base, training=_training_of(config))


def _config_of(given: Path) -> Config | None:
    folders = (given, given.parent, given.parent.parent)
    run = next((each for each in folders if (each / "config.yaml").is_file()), None)
    return None if run is None else read_run_config(run)


def _weights_of(config: Config) -> tuple[str, str, str]:
    name, weights = config.model.name, config.model.weights
    if weights == "none":
        return f"none: {name} began with random weights", "of nobody else", ""
    if weights != "pretrained":
        said = f"a file or folder of one's own, {Path(weights).name}"
        return said, "unknown: ask whoever made them", ""
    if name.startswith("torchvision:"):
        return f"torchvision's default weights of {name.partition(':')[2]}", "unknown", ""
    import timm

    published = timm.get_pretrained_cfg(name)
    if published is None:
        return f"timm's pretrained weights of {name}", "unknown", ""
    tagged = f"{published.architecture}.{published.tag}" if published.tag else name
    base = published.hf_hub_id or ""
    base = base if base.count("/") == 1 and not base.endswith("/") else f"timm/{tagged}"
    licence = published.license or "unknown: timm names none"
    return f"timm's pretrained weights {tagged}", licence, base


def _set_in(section: Any) -> Any:
    """Without the keys that are null, as they are where nobody sets them."""
    if isinstance(section, dict):
        return {key: _set_in(value) for key, value in section.items() if value is not None}
    return [_set_in(each) for each in section] if isinstance(section, list) else section


def _training_of(config: Config) -> str:
    sections: dict[str, Any] = {k: v for k, v in to_dict(config).items() if k in _SECTIONS}
    if sections["model"]["weights"] not in ("none", "pretrained"):
        sections["model"]["weights"] = Path(sections["model"]["weights"]).name
    sections = {name: _set_in(section) for name, section in sections.items()}
    data = {k: getattr(config.data, k) for k in ("image_size", "crop_pct", "channels")}
    return str(yaml.safe_dump(sections | {"data": data}, sort_keys=False, allow_unicode=True))
