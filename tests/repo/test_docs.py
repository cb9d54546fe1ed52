"""Pages of the project name files that exist, and a page that lists others lists them all."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)
# A file of this project as a page writes it: from the root, from the package, or beside the page.
FILE = re.compile(r"`([\w./-]+\.(?:py|md|sh|sbatch|toml|c|yaml|yml)|[\w./-]+/)`")
WRITTEN_BY_RUNS = (
    "runs/",
    "config.yaml",
    "photos/",
    "data/photos/",
    "train/",
    "val/",
    "test/",
    "wandb/",
    "example.py",
    "best/",
)
WRITTEN_BY_RUNS += (
    "evaluation/test/",
    "evaluation/<",
    "plots/",
    "heartbeats/",
    "checkpoints/",
    "ledger/",
)


def files_named_in(text: str) -> set[str]:
    return {name for name in FILE.findall(text) if not name.startswith(WRITTEN_BY_RUNS)}


def links_of(text: str) -> set[str]:
    return {link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    places = (ROOT, ROOT / "rtl_dist", ROOT / "configs", page.parent)
    named = files_named_in(text)
    missing = {name for name in named if not any((place / name).exists() for place in places)}
    missing |= {link for link in links_of(text) if not (page.parent / link).exists()}
    assert not missing


def test_every_decision_is_in_the_index():
    index = ROOT / "docs" / "decisions" / "README.md"
    records = {path.name for path in index.parent.glob("*.md")} - {index.name}
    assert links_of(index.read_text(encoding="utf-8")) == records


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "decisions").glob("[a-z]*.md")))
def test_a_decision_says_why_not_the_others(page):
    headings = re.findall(r"^\*\*(.+?)\.\*\*", page.read_text(encoding="utf-8"), re.M)
    assert headings == ["Context", "Decision", "Why not the others", "Consequences"]


def test_a_name_that_is_wrong_is_found():
    found = files_named_in("`core/keys.py`, `docs/gone.md`, `data/`, `runs/x.py`, `--help`")
    assert found == {"core/keys.py", "docs/gone.md", "data/"}
