"""Every command that a page, a config, a launch file or a batch script prints can be typed: what it
names is there, its options and overrides are, and the processes it starts can share the batch.

A page that gets a new command needs nothing here: commands are found in the text.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from rtl_dist.cli import COMMANDS
from rtl_dist.commands.common import parse
from rtl_dist.config import Config, load_config
from rtl_dist.core.errors import UserError
from rtl_dist.core.tasks import MULTI_LABEL, SINGLE_LABEL
from rtl_dist.distributed.elastic import largest_share, num_microbatches
from rtl_dist.distributed.ranks import Ranks
from rtl_dist.training import memory
from rtl_dist.training.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "rtl_dist").rglob("*.md"),
    *(ROOT / ".github").rglob("*.md"),
]
SCRIPTS = [*(ROOT / "configs").glob("*"), *(ROOT / "launch").glob("*"), *(ROOT / "slurm").glob("*")]
SHIPPED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml"))
ANY_CONFIG = ("C", "configs/X.yaml", "...")  # as pages write it
PLACEHOLDERS = ("[key=value", "...]")
WORLD_SIZES = (1, 2, 4, 8, 16)
TRAINS = ("train", "chaos", "find-lr")  # those that take a config
WORDS_OF_A_COMMAND = re.compile(
    r"(?<![\w/`.-])(?:[A-Z_]+=\S+ )*"
    r"(?:pip install uv && )?(?:uv run )?"
    r"(?:accelerate launch|torchrun|python -m rtl_dist|python rtl_dist/train\.py|sbatch|"
    r"launch/elastic\.sh|rtl-dist) [^`\n]+"
)


# --- the commands that are printed ---


@dataclass(frozen=True)
class Printed:
    """A command. is_whole: it stands by itself, to be copied; one within a sentence may be cut."""

    where: str
    text: str
    is_whole: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"[:110]


def joined_lines(text: str, mark: str) -> str:
    """A line that ends in a backslash goes on in the next."""
    return re.sub(rf"\s*\\\n{mark}\s*", " ", text)


def printed_in_page(path: Path) -> Iterator[tuple[str, bool]]:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = list(itertools.chain(*(joined_lines(block, "").splitlines() for block in blocks)))
    for pieces, is_whole in ((lines, True), (spans, False)):
        for piece in pieces:
            for found in WORDS_OF_A_COMMAND.findall(" ".join(piece.split())):
                yield found, is_whole


def printed_in_script(path: Path) -> Iterator[tuple[str, bool]]:
    """Lines of a comment that are set in, as commands are."""
    for line in joined_lines(path.read_text(encoding="utf-8"), "#").splitlines():
        if found := re.match(r"# {3,}(.*)", line):
            yield from ((text, True) for text in WORDS_OF_A_COMMAND.findall(found[1]))
    for usage in re.findall(r'usage: (.*)"', path.read_text(encoding="utf-8")):
        yield usage, True


def all_printed() -> list[Printed]:
    found = [
        Printed(str(path.relative_to(ROOT)), text.strip(), is_whole)
        for read, paths in ((printed_in_page, PAGES), (printed_in_script, SCRIPTS))
        for path in sorted(paths)
        for text, is_whole in read(path)
    ]
    return list(dict.fromkeys(found))


# --- what each of them starts ---


@dataclass(frozen=True)
class Start:
    """config: as printed. overrides: behind it. world_sizes: that the command itself says.
    is_elastic: the processes that cannot share the batch stand by."""

    config: str
    overrides: tuple[str, ...]
    world_sizes: tuple[int, ...]
    is_elastic: bool = False

    @property
    def configs(self) -> list[str]:
        return SHIPPED if self.config in ANY_CONFIG else [self.config]


def words_of(text: str) -> list[str]:
    """Without what stands before and behind a command, and placeholders."""
    words = shlex.split(text, comments=True)
    for cut in ("&&", "|", ">"):
        if cut in words and words.index(cut) > 3:
            words = words[: words.index(cut)]
    return [word for word in words if word not in PLACEHOLDERS]


def option(words: list[str], *names: str) -> str | None:
    for number, word in enumerate(words):
        name, is_joined, value = word.partition("=")
        if name in names:
            return value if is_joined else words[number + 1]
    return None


def overrides_behind(words: list[str], config: str) -> tuple[str, ...]:
    behind = words[words.index(config) + 1 :]
    return tuple(word for word in behind if re.match(r"[a-z][\w.]*=", word))


def start_of(text: str) -> Start | None:
    """What a command trains; None: it trains nothing."""
    words = words_of(text)
    script = next((w for w in words if w.endswith((".sbatch", "elastic.sh"))), None)
    config = words[words.index(script) + 1] if script else option(words, "--config")
    if config is None:
        return None
    ranks: set[int] = set()
    if script and script.endswith(".sbatch"):
        assert (ROOT / script).exists(), script
        ranks = set(ranks_of_job(words, script))
    launch_file = option(words, "--config_file")
    if launch_file is not None:
        ranks.add(yaml.safe_load((ROOT / launch_file).read_text())["num_processes"])
    for names in (("--nproc_per_node", "--nproc-per-node"), ("--num_processes",), ("--processes",)):
        if count := option(words, *names):
            ranks = {int(count)}
    return Start(
        config,
        overrides_behind(words, config),
        tuple(sorted(ranks)),
        is_elastic=bool(script and script.endswith("elastic.sh")),
    )


def ranks_of_job(words: list[str], script: str) -> Iterator[int]:
    """One for each GPU of each node; of a range of nodes those that preemptible.sbatch uses."""
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", (ROOT / script).read_text(), re.M))
    nodes = option(words, "--nodes") or asked["nodes"]
    gpus = int(option(words, "--gpus-per-node") or 1)
    most = int(nodes.split("-")[-1])
    counts = [2**n for n in range(most.bit_length())] if "-" in nodes else [most]
    return (count * gpus for count in counts)


PRINTED = all_printed()
STARTS = [(printed, start) for printed in PRINTED if (start := start_of(printed.text))]


# --- whether they can share the batch ---


class Alone(Ranks):
    """This rank's part of a job of ``world_size``, without the others."""

    def __init__(self, world_size: int, device: str) -> None:
        super().__init__(rank=0, world_size=1, stops=None)
        self.world_size, self.device = world_size, torch.device(device)
        self.precision, self.dtype = "no", torch.float32


def resolved(config: Config, world_size: int, *, device: str = "cpu", images: int = 100) -> Config:
    """As a job of so many processes resolves it before it reads an image."""
    task = MULTI_LABEL if "miml" in config.data.path else SINGLE_LABEL
    split = SimpleNamespace(num_samples=images)
    dataset = SimpleNamespace(task=task, num_classes=3, split=lambda name: split)
    return resolve(config, Alone(world_size, device), dataset)


@pytest.fixture(autouse=True)
def roomy_gpu(monkeypatch):
    """Every microbatch fits the memory of a GPU."""
    monkeypatch.setattr(memory, "largest_that_fits", lambda config, runtime, sizes, n: sizes[0])


def load(path: str, overrides: tuple[str, ...] = ()) -> Config:
    assert (ROOT / path).exists(), path
    return load_config(str(ROOT / path), list(overrides))


def test_commands_are_found_where_they_are_printed():
    texts = {printed.where: "" for printed in PRINTED}
    for printed in PRINTED:
        texts[printed.where] += f"{printed.text}\n"
    for path in SCRIPTS:
        if path.name not in ("train_job.sh", "sweep.txt"):  # one is sourced, one is read
            name = str(path.relative_to(ROOT))
            assert name in texts, f"the header of {name} prints no command"
    assert "pip install uv && uv run accelerate launch rtl_dist/train.py" in texts["README.md"]
    assert "sbatch slurm/one_node.sbatch C" in texts["README.md"]
    assert "rtl-dist chaos --config configs/quickstart.yaml" in texts["docs/reliability.md"]
    starts = {printed.where: start for printed, start in STARTS}
    assert starts["slurm/preemptible.sbatch"].world_sizes == (4, 8, 16)
    assert starts["launch/multi_node.yaml"].world_sizes == (16,)


@pytest.mark.parametrize(("printed", "start"), STARTS, ids=str)
def test_the_processes_of_a_command_can_share_its_batch(printed, start):
    for path, images in itertools.product(start.configs, (100, 20_000)):
        config = load(path, start.overrides)
        for world_size, device in itertools.product(
            {*start.world_sizes, 1, 2, 4, 8}, ("cpu", "cuda")
        ):
            if start.is_elastic:
                assert largest_share(num_microbatches(config.batch), world_size) == world_size
            batch = resolved(config, world_size, device=device, images=images).batch
            assert batch.total % (world_size * batch.micro) == 0
            require_to_learn(config, batch.micro)


@pytest.mark.parametrize("world_size", [*WORLD_SIZES, 3, 64])
@pytest.mark.parametrize("path", SHIPPED)
def test_a_shipped_config_is_shared_or_says_what_to_type(path, world_size):
    config, overrides = load(path), what_to_type(load(path), world_size)
    assert not overrides or world_size not in (1, 2, 4, 8)
    batch = resolved(load(path, overrides), world_size).batch
    assert batch.total % (world_size * batch.micro) == 0
    require_to_learn(config, batch.micro)


def what_to_type(config: Config, world_size: int) -> tuple[str, ...]:
    """The overrides that a refusal names; none where nothing is refused."""
    said = ""
    try:
        resolved(config, world_size)
    except UserError as error:
        said = re.search(r"add ((?:batch\.\w+=\d+ ?)+) ?to the command", str(error))[1]
    return tuple(said.split())


def require_to_learn(config: Config, micro: int) -> None:
    """BatchNorm cannot from one image."""
    assert micro > 1 or all(stage.batchnorm == "frozen" for stage in config.stages)


# --- whether their options are there ---


def ours() -> Iterator[tuple[Printed, str, list[str]]]:
    """The words behind each command of ``rtl-dist``."""
    for printed in PRINTED:
        words = words_of(printed.text)
        programs = [n for n, word in enumerate(words) if word in ("rtl-dist", "rtl_dist")]
        if programs and len(words) > programs[0] + 2:  # more than its name is said
            yield printed, words[programs[0] + 1], words[programs[0] + 2 :]


@pytest.mark.parametrize(("printed", "name", "words"), list(ours()), ids=str)
def test_a_command_of_ours_takes_its_options(printed, name, words):
    if name == "COMMAND":
        return
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    known = parser._option_string_actions
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known.keys()
    if not (printed.is_whole or name in TRAINS):
        return
    said = parse(parser, words)
    if name in TRAINS and said.config not in ANY_CONFIG:
        load(said.config, tuple(said.overrides))


def test_what_cannot_be_shared_is_found():
    start = start_of(
        "torchrun --nproc_per_node 8 rtl_dist/train.py --config configs/quickstart.yaml a.b=1"
    )
    assert start == Start("configs/quickstart.yaml", ("a.b=1",), (8,))
    config = load("configs/quickstart.yaml", ("batch.micro=16",))
    with pytest.raises(UserError, match=r"2 microbatches .* add batch\.micro=4 to the command"):
        resolved(config, 8)
