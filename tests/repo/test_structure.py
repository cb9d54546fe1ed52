"""The shape of the package, kept by tests: imports run one way, and some things have one place."""

import ast
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "rtl_dist"
TOUR = PACKAGE.parent / "docs" / "architecture.md"

# Each wing may import from itself and from those below it, which come after it in this list.
WINGS = [
    "__main__",
    "cli",
    "api",
    "train",
    "commands",
    "training",
    "report",
    "inference",
    "evaluation",
    "features",
    "optim",
    "chaos",
    "records",
    "prepare",
    "model",
    "data",
    "distributed",
    "config",
    "core",
]
ROOMS_OF_THE_ROOT = ("__main__", "cli", "api", "train")
HEIGHT = {wing: height for height, wing in enumerate(WINGS)}
HEIGHT["train"] = HEIGHT["commands"]  # a command too, which launchers look for in the root:
BETWEEN_TRAIN_AND_COMMANDS = {  # so these, and only these, use each other's place
    ("train", "rtl_dist.commands.common"),
    ("train", "rtl_dist.commands.running"),
    ("commands", "rtl_dist.train"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def first_line_of(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def wing_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which the entry cannot"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py":
        return
    wing = wing_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "rtl_dist" and len(parts) > 1 and parts[1] != "__version__":
            below = HEIGHT[parts[1]] >= HEIGHT[wing]
            assert below, f"{wing} imports {name} from above it"
            if {wing, parts[1]} == {"train", "commands"}:
                module = ".".join(parts[: 3 if parts[1] == "commands" else 2])
                assert (wing, module) in BETWEEN_TRAIN_AND_COMMANDS


def test_no_files_import_each_other():
    """Not even inside functions: what is needed both ways is handed over by whoever opens both."""
    # the package's own file is its door to the outside, through which nothing inside goes
    files = {name_of(path): path for path in FILES if path != PACKAGE / "__init__.py"}
    uses = {name: imports_of(path) & files.keys() for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for used in uses[name] - {name}:
                visit(used, (*way, name))
            done.add(name)

    for name in uses:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_inside_goes_through_the_door_to_the_outside(path):
    """``from rtl_dist import load`` is for users: inside it would be an arrow upward."""
    door = {"rtl_dist.__version__", *(name_of(p) for p in FILES)}
    names = {name for name in imports_of(path) if re.fullmatch(r"rtl_dist\.\w+", name)}
    assert names <= door


@pytest.mark.parametrize(("one", "other"), [("packing", "indexing"), ("indexing", "packing")])
def test_pack_and_index_share_only_what_lies_beside_both(one, other):
    for path in (PACKAGE / "prepare" / one).glob("*.py"):
        assert not any(f"prepare.{other}" in name for name in imports_of(path)), path


def test_there_are_at_most_fifteen_wings_and_none_without_a_place():
    wings = {wing_of(path) for path in FILES} - {"__init__"}
    assert wings == set(WINGS)
    assert len(wings - set(ROOMS_OF_THE_ROOT)) <= 15


def test_wandb_has_one_place():
    users = {
        path.relative_to(PACKAGE)
        for path in FILES
        if "wandb" in {name.split(".")[0] for name in imports_of(path)}
    }
    assert users == {Path("records/wandb_copy.py")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_timm_is_imported_where_it_is_needed(path):
    """It imports W&B and hundreds of modules; runs of other networks start without it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_once = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in at_once:
        names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        assert "timm" not in {name.split(".")[0] for name in names}


def test_no_two_test_files_have_one_name():
    """pytest would not collect the second."""
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert not [name for name, count in Counter(names).items() if count > 1]


def test_modules_are_imported_by_name_at_the_two_doors():
    """Elsewhere it would hide an arrow from the tests above."""
    users = {
        path.relative_to(PACKAGE)
        for path in FILES
        if "importlib.import_module" in path.read_text() or "__import__" in path.read_text()
    }
    assert users == {Path("cli.py"), Path("__init__.py")}


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


def test_the_tour_tells_of_every_wing_in_its_own_words():
    """``docs/architecture.md`` has each wing, top to bottom, with the line of its docstring."""
    rows = re.findall(r"^\| `([a-z_]+)/` \| (.+?) \|$", TOUR.read_text(encoding="utf-8"), re.M)
    wings = [wing for wing in WINGS if wing not in ROOMS_OF_THE_ROOT]
    assert rows == [(wing, first_line_of(PACKAGE / wing / "__init__.py")) for wing in wings]


def test_the_tour_tells_of_every_room_of_a_wing_in_its_own_words():
    rows = re.findall(r"^\| `([a-z_]+/[a-z_]+)/` \| (.+?) \|$", TOUR.read_text("utf-8"), re.M)
    rooms = {
        path.parent.relative_to(PACKAGE).as_posix(): first_line_of(path)
        for path in PACKAGE.glob("*/*/__init__.py")
    }
    assert dict(rows) == rooms
    assert len(rows) == len(rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_it_is(path):
    assert first_line_of(path)
