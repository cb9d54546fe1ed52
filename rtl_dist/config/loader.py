"""YAML and ``a.b.c=value`` overrides to a checked ``Config``; all that is wrong is told at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

from rtl_dist.config.convert import Problem, build, to_dict
from rtl_dist.config.meant import with_stages_named
from rtl_dist.config.overrides import Overrides
from rtl_dist.config.recipe import give_stages, lay_under
from rtl_dist.config.schema import Config
from rtl_dist.config.yaml_text import MOST_CHARACTERS, YamlFault, read_yaml, write_yaml
from rtl_dist.core.errors import UserError
from rtl_dist.core.shipped import or_shipped
from rtl_dist.core.text import brief, did_you_mean

T = TypeVar("T")


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file and applies ``key=value`` overrides to it.

    Raises:
        UserError: no such file, not YAML; or unknown keys, wrong types, impossible values and
            combinations: all of them, where there are several a line each.
    """
    try:
        tree = read_yaml(_text_of(path))
    except FileNotFoundError:
        raise UserError(f"no config file {path}{_shipped_ones(path)}") from None
    except YamlFault as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read config {path}: {reason}") from error
    if tree is None:
        raise UserError(f"{path}: expected sections such as data: and stages:, found nothing")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as data: and stages:, found {brief(tree)}")
    return _overridden(tree, overrides or [], str(path))


def parse_config(
    tree: dict[str, Any], overrides: list[str] | None = None, *, origin: str = "config"
) -> Config:
    """A checked ``Config`` from plain dicts and lists, and ``key=value`` overrides.

    Raises:
        UserError: see ``load_config``.
    """
    return _overridden(copy.deepcopy(tree), overrides or [], origin)


def _overridden(tree: dict[str, Any], overrides: list[str], origin: str) -> Config:
    if tree.get("recipe") == "auto" or "recipe=auto" in overrides:
        give_stages(tree)  # for overrides of their keys
    return _checked(tree, origin, Overrides(tree, overrides))


def parse_section(section: type[T], tree: dict[str, Any], *, origin: str) -> T:
    """One section, such as ``ModelConfig``, from plain dicts and lists.

    Raises:
        UserError: see ``load_config``.
    """
    problems: list[Problem] = []
    built: T = build(section, tree, "", problems)
    if problems:
        raise UserError(_told([problem.sentence for problem in problems], [], origin))
    return built


def to_yaml(config: Config) -> str:
    return write_yaml(to_dict(config))


def read_run_config(run: str | Path) -> Config:
    """The resolved config of a run folder."""
    return load_config(Path(run) / "config.yaml")


def _shipped_ones(path: str | Path) -> str:
    names = sorted(path.stem for path in or_shipped("configs").glob("*.yaml"))
    hint = did_you_mean(Path(path).stem, names, "configs/{}.yaml")
    return hint or f"; shipped ones: {', '.join(f'configs/{name}.yaml' for name in names)}"


def _text_of(path: str | Path) -> str:
    """No more of it than a config can have, whatever it is. A pipe that a shell lays (``<(...)``)
    is read; one with a name may have nobody who writes into it, ever."""
    where = or_shipped(path)
    if Path(where).is_fifo() and not str(where).startswith(("/dev/", "/proc/")):
        raise UserError(f"config {path} is a named pipe: give a file")
    with open(where, encoding="utf-8") as file:
        return file.read(MOST_CHARACTERS + 1)


def _checked(tree: dict[str, Any], origin: str, overrides: Overrides) -> Config:
    found: list[Problem] = []
    lay_under(tree)
    whole, inherited = _inherited(tree)
    config: Config = build(Config, whole, "", found)
    # what a stage has from elsewhere is wrong there, once
    problems = list(dict.fromkeys(_moved(problem, inherited) for problem in found))
    in_file, of_overrides = [], []
    stages = _names_of_stages(tree)
    for problem in problems:
        if (cause := overrides.cause_of(problem.path)) is None:
            in_file.append(with_stages_named(problem.sentence, stages))
        else:
            sentence = with_stages_named(problem.sentence, stages)
            of_overrides.append(f"{cause}: {sentence}")
    of_overrides += [refused.sentence for refused in overrides.refused_beside(problems)]
    if in_file or of_overrides:
        raise UserError(_told(in_file, of_overrides, origin))
    return config


def _names_of_stages(tree: dict[str, Any]) -> list[str]:
    stages = tree.get("stages")
    names = (
        [stage.get("name") for stage in stages or [] if isinstance(stage, dict)]
        if isinstance(stages, list)
        else []
    )
    return [name for name in names if isinstance(name, str) and name.isprintable()]


def _told(in_file: list[str], of_overrides: list[str], origin: str) -> str:
    """One line for one mistake, else one that counts them and one for each."""
    if len(in_file) + len(of_overrides) == 1:
        return f"{origin}: {in_file[0]}" if in_file else of_overrides[0]
    where = f"{origin} and its overrides" if in_file else f"the overrides of {origin}"
    count = len(in_file) + len(of_overrides)
    lines = [f"{count} errors in {where if of_overrides else origin}:", *in_file, *of_overrides]
    return "\n  ".join(lines)


def _inherited(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree in which a stage's own ``augment``, ``early_stop`` and ``optim`` are whole sections:
    what they do not say is as it is for all stages; and the paths of those keys, with where they
    are from."""
    stages = tree.get("stages")
    if not isinstance(stages, list):
        return tree, {}
    whole: list[Any] = []
    inherited: dict[str, str] = {}
    for number, stage in enumerate(stages):
        sections = {}
        for name in ("augment", "early_stop", "optim"):
            own, of_all = isinstance(stage, dict) and stage.get(name), tree.get(name) or {}
            if isinstance(own, dict) and isinstance(of_all, dict):
                origins = {key: f"{name}.{key}" for key in of_all}
                if name == "optim":
                    of_stage = {
                        key: stage[key]
                        for key in ("schedule", "warmup")
                        if stage.get(key) is not None
                    }
                    of_all = {**of_all, **of_stage}
                    origins |= {key: f"stages.{number}.{key}" for key in of_stage}
                sections[name] = {**of_all, **own}
                inherited |= {
                    f"stages.{number}.{name}.{key}": origin
                    for key, origin in origins.items()
                    if key not in own
                }
        whole.append({**stage, **sections} if sections else stage)
    return {**tree, "stages": whole}, inherited


def _moved(problem: Problem, inherited: dict[str, str]) -> Problem:
    """The problem of an inherited key, told of the one that it is from, unless it lies in how that
    goes with a key of the stage's own section."""
    path, section = inherited.get(problem.path), problem.path.rpartition(".")[0]
    own = {each for each in problem.beside if each.startswith(f"{section}.")} - inherited.keys()
    if path is None or own:
        return problem
    return Problem(path, problem.sentence.replace(problem.path, path, 1))
