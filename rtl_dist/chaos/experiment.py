"""``rtl-dist chaos``: proof, for a config of one's own, that random kills change nothing.

The config is trained once undisturbed, which also tells how long it takes, and once with SIGKILLs
at random moments of that time, each followed by the same command again. Then the two are compared.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from rtl_dist.chaos.trial import FEATURES, LOGS, Trial
from rtl_dist.config import Config, load_config
from rtl_dist.core.errors import RtlDistError, UserError
from rtl_dist.core.files import write_json
from rtl_dist.distributed.launchers import launched_world_size
from rtl_dist.records.hashes import differing, run_hashes, table

REPORT = "chaos.json"
UNDISTURBED, _KILLED = "undisturbed", "killed"
_MOST_RUNS = 6  # to make the kills in, where runs end before all of them came
_EARLIER = 0.6  # times the moments of the run before


def chaos(
    config_path: str,
    overrides: list[str],
    *,
    kills: int,
    seed: int = 0,
    processes: int = 1,
    out: Path | None = None,
    overwrite: bool = False,
    show: Callable[[str], object] = lambda text: None,
) -> str:
    """Trains undisturbed and with kills, into ``out``, shows all hashes and writes ``chaos.json``.

    Args:
        seed: of the moments.
        out: default: beside ``run.dir``, its name and -chaos.
        show: is given the table of kills and hashes.

    Returns:
        one line: that nothing is different.

    Raises:
        UserError: an argument is wrong, or the config's results cannot be repeated.
        RtlDistError: something is different, fewer kills than asked for found a run, or a training
            failed (with its exit code).
    """
    config = load_config(config_path, overrides)
    _check(config, kills=kills, processes=processes)
    folder = _own_folder(out or Path(f"{config.run.dir}-chaos"), overwrite)
    record: dict[str, Any] = {
        "config": config_path,
        "overrides": overrides,
        "seed": seed,
        "processes": processes,
        "kills_wanted": kills,
        "kills": [],
        "hashes": {},
        "different": None,
    }
    write_json(folder / REPORT, record)  # from now on the folder is known to be ours
    show(f"training {config_path} undisturbed, then with {kills} kill(s), into {folder}\n")
    begun_at = time.monotonic()
    try:
        with tqdm(total=kills, unit="kill", miniters=0, disable=None) as bar:
            arguments = ["--config", config_path, *overrides]
            trial = Trial(arguments, folder, processes=processes, random=Random(seed), bar=bar)
            _run_all(trial, kills, record)
        record["different"] = differing(record["hashes"])
    finally:
        record["elapsed_s"] = round(time.monotonic() - begun_at, 3)
        write_json(folder / REPORT, record)
    show("".join(_describe(n, kill) for n, kill in enumerate(record["kills"], 1)))
    show(table(record["hashes"]) + "\n")
    return _verdict(record, folder)


def _run_all(trial: Trial, kills: int, record: dict[str, Any]) -> None:
    record["kills"] = trial.kills
    pace = trial.undisturbed(UNDISTURBED)
    record["pace"] = asdict(pace)
    record["hashes"][UNDISTURBED] = run_hashes(trial.folder / UNDISTURBED)
    for number in range(_MOST_RUNS):
        name = f"{_KILLED}-{number + 1}" if number else _KILLED
        trial.killed(name, pace, kills - len(trial.kills), earlier=_EARLIER**number)
        record["hashes"][name] = run_hashes(trial.folder / name)
        if len(trial.kills) == kills:
            return


def _check(config: Config, *, kills: int, processes: int) -> None:
    for option, value in (("kills", kills), ("processes", processes)):
        if value < 1:
            raise UserError(f"--{option} is {value}: give 1 or more")
    if launched_world_size() > 1:
        raise UserError("start chaos once, without a launcher: --processes N has it start its own")
    if config.data.backend == "stream":
        raise UserError(
            "data.backend: stream trains on another order of samples after every start, so no two"
            " runs are equal; chaos needs data.backend: indexed"
        )


def _own_folder(folder: Path, overwrite: bool) -> Path:
    """The folder, empty but for what is not of chaos where an earlier one may be replaced."""
    is_ours = (folder / REPORT).exists()
    if is_ours and overwrite:
        for name in (UNDISTURBED, _KILLED, f"{_KILLED}-[0-9]", LOGS, FEATURES):
            for path in folder.glob(name):
                shutil.rmtree(path)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        cure = ", or replace it by --overwrite" if is_ours else ""
        raise UserError(f"--out: {folder} is not empty; name another folder{cure}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _describe(number: int, kill: dict[str, Any]) -> str:
    where = kill["phase"] or "work"
    if kill["step"] is not None:
        where += f", last told of step {kill['step']} of stage {kill['stage']}"
    return (
        f"kill {number}: {kill['killed']}, {kill['age_s']:.1f} s after start {kill['start']} of"
        f" {kill['run']}: {where}; saved at step {kill['saved']}\n"
    )


def _verdict(record: dict[str, Any], folder: Path) -> str:
    fired, wanted, different = len(record["kills"]), record["kills_wanted"], record["different"]
    names = list(record["hashes"])
    if different:
        raise RtlDistError(
            f"{', '.join(different)}: different between {' and '.join(names)} after {fired}"
            f" kill(s); compare the folders in {folder}, and please report it"
        )
    if fired < wanted:
        raise RtlDistError(
            f"only {fired} of {wanted} kills found a run alive, whose work takes"
            f" {record['pace']['work_s']:.1f} s; nothing was different, but give fewer --kills or"
            " a config that trains longer"
        )
    equal = len(record["hashes"][UNDISTURBED])
    return f"{fired} kill(s) changed nothing: {equal} hashes are equal. See {folder / REPORT}"
