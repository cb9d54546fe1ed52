"""What comes with the package, by the paths that it has in a checkout, wherever one works."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = {("configs",): "configs", ("rtl_dist", "assets"): "assets"}  # folders in the package


def or_shipped(path: str | Path) -> Path:
    """The path; where nothing is there and it is that of a shipped file or folder, this one."""
    given = Path(path)
    for start, folder in _SHIPPED.items():
        if given.parts[: len(start)] == start and not given.exists():
            shipped = _PACKAGE.joinpath(folder, *given.parts[len(start) :])
            if shipped.exists():
                return shipped
    return given
