"""The process that copies metrics.jsonl to W&B, started and left."""

from __future__ import annotations

import json
import logging
import netrc
import os
import subprocess
import sys
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rtl_dist.config import Config, to_dict
from rtl_dist.core.files import read_object, write_json
from rtl_dist.records.state import TrainState

LOG = logging.getLogger("rtl_dist")

_COPY = Path(__file__).with_name("wandb_copy.py")
LAST_S = 4.0  # that a run waits at its end
TIMES = {"connect_s": 40.0, "finish_s": 60.0}  # of ``wandb_copy``, which outlives the run
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_MODES = {"run": "online", "dryrun": "offline"}  # of old


class WandbProcess:
    """A process that copies the metrics to W&B; see ``wandb_copy``."""

    def __init__(self, run: Path, settings: dict[str, Any]) -> None:
        self._log = run / "wandb" / "copy.log"
        self._log.unlink(missing_ok=True)  # an earlier start's copy may still be writing there
        with open(self._log, "wb") as log:  # not our output: it may outlive this process
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_COPY), json.dumps(settings)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def close(self) -> None:
        """Lets it end, but waits no longer than a few seconds."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:  # it may have ended already
            pipe.write(b"\n")  # a loader's worker may hold the pipe open
        try:
            code = self._process.wait(LAST_S)
        except subprocess.TimeoutExpired:
            threading.Thread(target=self._process.wait, daemon=True).start()
            what = "still busy and left to itself"
        else:
            what = self._last_words() or f"ended with {code}"
            if not code:
                return
        LOG.warning("W&B: %s (see %s); metrics.jsonl has everything", what, self._log)

    def _last_words(self) -> str:
        with suppress(OSError):
            said = self._log.read_text(encoding="utf-8", errors="replace").strip()
            return said.splitlines()[-1] if said else ""
        return ""


def wandb_mode(wanted: str) -> str:
    """auto: what WANDB_MODE says, else online when there is a key, else offline; never a prompt."""
    if wanted != "auto":
        return {"off": "disabled"}.get(wanted, wanted)
    mode = os.environ.get("WANDB_MODE", "")
    mode = _MODES.get(mode, mode)
    if mode in ("online", "offline", "disabled"):
        return mode
    return "online" if _has_wandb_key() else "offline"


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
        # named, as W&B does it: the default file would be refused where others can read it
        keys = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
        found = [keys.authenticators(host) for host in ([server] if server else _HOSTS)]
        return any(entry and entry[2] for entry in found)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False


def start_wandb(run: Path, config: Config, state: TrainState) -> WandbProcess | None:
    """The process, started; None where W&B is off. Raises OSError: it cannot be started."""
    mode = wandb_mode(config.track.wandb)
    if mode == "disabled":
        return None
    state.wandb_id = state.wandb_id or kept_id(run) or uuid.uuid4().hex[:8]
    (run / "wandb").mkdir(exist_ok=True)
    # at once: a run that is killed before its first checkpoint goes on under the same id
    write_json(_id_file(run), {"id": state.wandb_id})
    write_json(run / "wandb" / "config.json", to_dict(config))
    settings = {"folder": str(run), "id": state.wandb_id, "mode": mode} | TIMES
    settings |= {"project": config.track.project, "parent": os.getpid()}
    return WandbProcess(run, settings)


def _id_file(run: Path) -> Path:
    return run / "wandb" / "id.json"


def kept_id(run: Path) -> str | None:
    """The id under which an earlier start of the run went to W&B; None where it did not."""
    kept = read_object(_id_file(run)).get("id")
    return None if kept is None else str(kept)
