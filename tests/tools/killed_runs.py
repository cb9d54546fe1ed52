"""Training runs in processes of their own that are killed or meet a fault, without waiting for
imports: a server imports what a run needs once, and each rank of a run is a fork of it.

The server runs under ``fault_shim.c`` where a C compiler is found, so that a fault can also lie in
a call of the C library. Every fault leaves a mark when it happens; see ``Exit.fired``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import gc
import inspect
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PRELOADED = (
    "pytest",
    "torch.distributed",
    "torchvision.transforms.v2",
    "timm",
    "tiny_runs",
    "rtl_dist.training.fit",
    "rtl_dist.training.begin",
    "rtl_dist.report.run",
    "rtl_dist.report.evaluation",
    "accelerate.optimizer",
    "torch._dynamo",  # torch imports it when the first optimizer is made
)
START_S, RUN_S = 120.0, 120.0  # at most for the server's imports; for a run
GRACE_S = 20.0  # in which the other ranks of a run must end once one has


# --- faults -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong in one rank of a run, or, with ``rank=None``, in every one."""

    rank: int | None = 0

    def install(self, mark: int) -> None:
        """Called in the rank's process; ``mark`` is the descriptor of the file that tells of it."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class At(Fault):
    """Something that happens at a place in the code.

    place: the function or method; it is kept as ``module:function`` or ``module:Class.method``.
    call: which call of it, from 1. after: when it returned, else before it runs. item: of a
    generator, before it yields this one, from 1.
    """

    place: Callable[..., Any] | str
    call: int = 1
    after: bool = False
    item: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", name_of(self.place))

    def happen(self) -> None:
        raise NotImplementedError

    def install(self, mark: int) -> None:
        calls = 0

        def act() -> None:
            os.write(mark, f"{self}\n".encode())
            self.happen()

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def acting(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                is_it = calls == self.call
                if is_it and self.item is not None:
                    return _acting_at(self.item, original(*args, **kwargs), act)
                if is_it and not self.after:
                    act()
                result = original(*args, **kwargs)
                if is_it and self.after:
                    act()
                return result

            return functools.wraps(original)(acting)

        replace_everywhere(self.place, wrap)


@dataclass(frozen=True, kw_only=True)
class Kill(At):
    """SIGKILL."""

    def happen(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def _acting_at(number: int, items: Iterator[Any], act: Callable[[], None]) -> Iterator[Any]:
    for count, item in enumerate(items, 1):
        if count == number:
            act()
        yield item


@dataclass(frozen=True, kw_only=True)
class Signal(At):
    """A signal that asks the rank to stop."""

    number: int = signal.SIGTERM

    def happen(self) -> None:
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True, kw_only=True)
class Together(Fault):
    """Several faults of one rank."""

    faults: tuple[Fault, ...]

    def install(self, mark: int) -> None:
        for fault in self.faults:
            fault.install(mark)


COUNT, KILL, HALF, FAIL, FAIL_ON, FULL = range(6)  # of fault_shim.c


@dataclass(frozen=True, kw_only=True)
class DiskFault(Fault):
    """What ``fault_shim.c`` does at the ``call``th call that changes a path that begins with
    ``prefix``, other than the heartbeats, which come when they come."""

    prefix: str
    call: int
    but_not: str = "/heartbeats/"
    action: int = KILL
    error: int = errno.ENOSPC

    def install(self, mark: int) -> None:
        arm(self.prefix, self.call, self.action, self.error, but_not=self.but_not, mark=mark)


def arm(
    prefix: str | Path,
    call: int,
    action: int,
    error: int = 0,
    *,
    but_not: str = "",
    mark: int = -1,
    trace: int = -1,
) -> None:
    """Arms the shim in this process; an empty prefix disarms it. See ``fault_shim.c``."""
    real = os.path.realpath(prefix) + "/" * str(prefix).endswith("/") if str(prefix) else ""
    paths = (real.encode(), but_not.encode())
    ctypes.CDLL(None).fault_arm(*paths, ctypes.c_long(call), action, error, mark, trace)


def name_of(place: Callable[..., Any] | str) -> str:
    """A function's module and its name there, by which another process finds its own."""
    return place if isinstance(place, str) else f"{place.__module__}:{place.__qualname__}"


def replace_everywhere(
    place: Callable[..., Any] | str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Puts ``wrap(original)`` in a function's place, also where it was imported by name."""
    module, _, path = name_of(place).partition(":")
    owner: Any = import_module(module)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    original = inspect.getattr_static(owner, name)
    if isinstance(original, staticmethod | classmethod | property):
        raise TypeError(f"{place} is no plain function")
    wrapped = wrap(original)
    setattr(owner, name, wrapped)
    if not classes:
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").startswith("rtl_dist"):
                for alias, value in list(vars(other).items()):
                    if value is original:
                        setattr(other, alias, wrapped)


# --- what tests call --------------------------------------------------------------------------


@dataclass(frozen=True)
class Exit:
    """How a process ended. code: its exit code, or minus the signal's number. output: of stdout and
    stderr. fired: whether its fault happened."""

    code: int
    output: str
    fired: bool

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


def run_ranks(config: str, *overrides: str, **how: Any) -> list[Exit]:
    """Training, as ``run_command`` runs it."""
    return run_command(["train", "--config", config, *overrides], **how)


def run_command(
    arguments: list[str],
    *,
    world_size: int = 1,
    fault: Fault | None = None,
    env: dict[str, str] | None = None,
    end_stalled: bool = False,
    draws: bool = False,
) -> list[Exit]:
    """``rtl-dist`` in ``world_size`` processes that were told what torchrun would tell them.

    Once one rank has failed the others must end by themselves within ``GRACE_S``, none may run
    longer than ``RUN_S``, and what they started must end with them: else all are killed and
    AssertionError says which hang.

    end_stalled: the rank with the fault is killed then, as a launcher would do it. draws: with the
    report at its end.
    """
    shared = dict(env or {})
    if world_size > 1:
        shared |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            its = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            its_fault = fault if fault is not None and fault.rank in (rank, None) else None
            job = functools.partial(_run, arguments, its_fault, draws)
            ranks.append(server().start(job, Path(folder, str(rank)), shared | its))
        stalled = ranks[fault.rank] if fault is not None and end_stalled else None
        _wait_for_all(ranks, stalled)
        _wait_for_orphans([rank.folder / "mark" for rank in ranks])
        return [rank.exit() for rank in ranks]


def require_killed(exits: list[Exit], fault: Fault) -> None:
    """The fault happened and killed its rank; the others left with 1 and a line that says why."""
    victim = exits[fault.rank]
    assert victim.fired, f"{fault} never happened: {victim.code}\n{victim.output}"
    assert victim.code == -signal.SIGKILL, f"{victim.code}\n{victim.output}"
    for rank, other in enumerate(exits):
        if rank != fault.rank:
            assert other.code == 1, f"rank {rank} left with {other.code}:\n{other.output}"
            assert "another process of this job ended" in other.last_line, other.output


def require_done(exits: list[Exit]) -> None:
    assert [one.code for one in exits] == [0] * len(exits), "\n---\n".join(
        one.output for one in exits
    )


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What a module's function returns in a fork of the server; AssertionError with its output if
    it raises."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result")
        child = server().start(functools.partial(_call, function, args, result), Path(folder, "0"))
        _wait_for_all([child])
        outcome = child.exit()
        assert outcome.code == 0, f"{function.__name__} failed ({outcome.code}):\n{outcome.output}"
        return pickle.loads(result.read_bytes())


def require_shim() -> None:
    """Skips the test where the shim cannot be built."""
    import pytest

    if server().why_no_shim:
        pytest.skip(server().why_no_shim)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_all(children: list[_Child], stalled: _Child | None = None) -> None:
    """See ``run_ranks``."""
    deadline, is_short = time.monotonic() + RUN_S, False
    while running := [child for child in children if child.code is None]:
        if not is_short and any(child.code for child in children):
            deadline, is_short = min(deadline, time.monotonic() + GRACE_S), True
            if stalled is not None and stalled.code is None:
                os.kill(stalled.pid, signal.SIGKILL)
        if not server().wait(deadline - time.monotonic()):
            hanging = [children.index(child) for child in running]
            for child in running:
                os.kill(child.pid, signal.SIGKILL)
            while any(child.code is None for child in children):
                server().wait(GRACE_S)
            outputs = [f"{child.code}\n{child.exit().output}" for child in children]
            raise AssertionError(f"processes {hanging} hang:\n" + "\n---\n".join(outputs))


def _wait_for_orphans(marks: list[Path]) -> None:
    """Until no loader worker holds a mark open any more, which it has from its rank."""
    names = {os.path.realpath(mark) for mark in marks}
    deadline = time.monotonic() + GRACE_S
    while holders := _holders(names):
        if time.monotonic() > deadline:
            for pid in holders:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes {holders} outlive their rank")
        select.select([], [], [], 0.1)


def _holders(names: set[str]) -> list[int]:
    """Processes that have one of these files open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(link) in names for link in (folder / "fd").iterdir()):
                found.append(int(folder.name))
    return found


# --- in the child -----------------------------------------------------------------------------


def _run(arguments: list[str], fault: Fault | None, draws: bool, mark: int) -> int:
    from rtl_dist.cli import main
    from rtl_dist.report.run import draw_run

    if not draws:
        replace_everywhere(draw_run, lambda _: lambda *_: None)
    if fault is not None:
        fault.install(mark)
    sys.argv = ["rtl-dist", *arguments]
    return main(arguments)


def _call(function: Callable[..., Any], args: tuple[Any, ...], result: Path, mark: int) -> int:
    result.write_bytes(pickle.dumps(function(*args)))
    return 0


# --- the server -------------------------------------------------------------------------------


@dataclass
class _Child:
    pid: int
    folder: Path
    code: int | None = None

    def exit(self) -> Exit:
        assert self.code is not None
        output = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
        return Exit(self.code, output, (self.folder / "mark").stat().st_size > 0)


class _Server:
    """The process that forks; see ``_serve`` for its side."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="rtl_dist-server-")
        self.why_no_shim, shim = "", os.path.join(self._folder, "fault_shim.so")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None or sys.platform != "linux":
            self.why_no_shim = "needs a C compiler on Linux, to build fault_shim.c"
        else:
            command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", shim]
            command += [str(HERE / "fault_shim.c"), "-ldl"]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if built.returncode:
                self.why_no_shim = f"fault_shim.c cannot be built: {built.stderr[-300:]}"
        env = dict(os.environ) | ({} if self.why_no_shim else {"LD_PRELOAD": shim})
        env["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import killed_runs; killed_runs._serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        self._children: dict[int, _Child] = {}
        assert self._hear(START_S) == ("ready", 0, 0)
        atexit.register(self.close)

    def start(
        self, job: Callable[[int], int], folder: Path, env: dict[str, str] | None = None
    ) -> _Child:
        """Starts ``job(mark)`` in a fork whose output and mark go into the folder."""
        folder.mkdir()
        content = pickle.dumps((job, str(folder), env or {}))
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("<q", len(content)) + content)
        self._process.stdin.flush()
        while (told := self._hear(START_S)) and told[0] != "started":
            self._note_end(told)
        assert told is not None, "the server died"
        child = self._children[told[1]] = _Child(told[1], folder)
        return child

    def wait(self, timeout_s: float) -> bool:
        """Until some child has ended; False if none did."""
        told = self._hear(max(0.0, timeout_s))
        if told is not None:
            self._note_end(told)
        return told is not None

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _note_end(self, told: tuple[str, int, int]) -> None:
        assert told[0] == "ended"
        self._children.pop(told[1]).code = told[2]

    def _hear(self, timeout_s: float) -> tuple[str, int, int] | None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        if not select.select([descriptor], [], [], timeout_s)[0]:
            return None
        word, pid, code = struct.unpack("<8sqq", os.read(descriptor, 24))
        return word.rstrip(b"\0").decode(), pid, code


@functools.cache
def server() -> _Server:
    """This process's, started when it is first needed."""
    return _Server()


def _serve() -> None:
    """Forks a process for each job that comes through stdin, tells through stdout of each that
    started and ended, and ends with all of them when stdin does."""
    os.environ.pop("LD_PRELOAD", None)  # not for the programs that a run starts
    for name in PRELOADED:
        import_module(name)
    gc.freeze()  # as a run does after its imports; and what is not looked at stays shared
    jobs, told = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    wake, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waking)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    def tell(word: str, pid: int = 0, code: int = 0) -> None:
        os.write(told, struct.pack("<8sqq", word.encode(), pid, code))

    tell("ready")
    running: set[int] = set()
    while True:
        ready, _, _ = select.select([jobs, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                running.discard(ended[0])
                tell("ended", ended[0], os.waitstatus_to_exitcode(ended[1]))
        if jobs in ready:
            size = os.read(jobs, 8)
            if not size:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            content = b""
            while len(content) < struct.unpack("<q", size)[0]:
                content += os.read(jobs, struct.unpack("<q", size)[0] - len(content))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (jobs, told, wake, waking):
                    os.close(descriptor)
                _work(content)
            running.add(pid)
            tell("started", pid)


def _work(content: bytes) -> None:
    """Does a job and leaves as a Python program does, but for taking down the interpreter, which
    would take longer than a short run."""
    job, folder, env = pickle.loads(content)
    output = os.open(os.path.join(folder, "output"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    mark = os.open(os.path.join(folder, "mark"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.environ.update(env)
    try:
        code = job(mark)
    except Exception:  # noqa: BLE001 - told to whoever started it
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
