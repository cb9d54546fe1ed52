"""The shape of the package, kept by tests: imports run one way, and some things have one place."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rtl_dist"
README = PACKAGE.parent / "README.md"

# Each room may import from its own layer and from those above it in this list.
LAYERS = [
    [
        "errors",
        "files",
        "schedule",
        "durations",
        "state",
        "urls",
        "launched",
        "lock",
        "stopping",
        "wandb_copy",
    ],
    ["heartbeat"],
    ["config", "ranks"],
    ["elastic"],
    ["data", "metrics", "feature_store"],
    ["model", "runtime"],
    ["totals", "optim", "losses", "skipping", "mixing", "ema", "checkpoint", "tracking", "ledger"],
    ["checkpoint_writer"],
    ["features", "compilation", "memory"],
    ["batches", "evaluation", "run_folder"],
    ["job"],
    ["stage_trainer"],
    ["stage_evaluator", "lr_finder"],
    ["boundary"],
    ["engine", "report"],
    ["attempt", "run_hashes"],
    ["evaluate_model", "run", "commands", "trial"],
    ["train", "find_lr", "chaos"],
    ["cli", "__main__"],
]
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which the entry cannot"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py":
        return
    layer = LAYER_OF[room_of(path)]
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "rtl_dist" and len(parts) > 1:
            assert LAYER_OF[parts[1]] <= layer, f"{room_of(path)} imports {name} from above it"


def test_every_room_has_a_layer_and_none_is_left_over():
    assert {room_of(path) for path in FILES} - {"__init__"} <= LAYER_OF.keys()


def test_wandb_has_one_place():
    users = {room_of(path) for path in FILES if "wandb" in imports_of(path)}
    assert users == {"wandb_copy"}


def test_no_module_hides_another_of_the_same_name():
    """``accelerate launch rtl_dist/train.py`` puts this folder first on the path."""
    taken = set(sys.stdlib_module_names) | packages_distributions().keys()
    names = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()
    }
    assert not {name for name in names if name in taken and not name.startswith("__")}


def test_the_entry_puts_the_project_on_the_path_instead_of_its_own_folder():
    code = "import sys, runpy; sys.path[0] = {folder!r}; sys.argv = ['train.py', '--help'];" \
           "\ntry: runpy.run_path({file!r}, run_name='__main__')\nexcept SystemExit: pass\n" \
           "print(sys.path[0])"  # fmt: skip
    code = code.format(folder=str(PACKAGE), file=str(PACKAGE / "train.py"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(PACKAGE.parent)


def test_help_is_quick_because_it_does_not_import_torch():
    code = "import sys; from rtl_dist.cli import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_readme_tells_of_every_file():
    text = README.read_text(encoding="utf-8")
    for path in FILES:
        relative = path.relative_to(PACKAGE)
        if path.name != "__init__.py":
            assert f"`{relative}`" in text or (
                f"`{relative.parent}/`" in text and f"`{path.name}`" in text
            ), f"README.md does not say what {relative} is"
