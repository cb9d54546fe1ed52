"""Small images and folders of them, for the tests of the packer."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def image_bytes(seed: int, size: tuple[int, int] = (12, 10), kind: str = "JPEG") -> bytes:
    """A (width, height) picture that is another for every seed."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def class_folders(root: Path, counts: dict[str, int], kind: str = "JPEG", seed: int = 0) -> Path:
    """``counts`` maps a folder, ``ants`` or ``train/ants``, to how many images it gets."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            seed += 1
            (root / folder / f"{i:03d}.{kind.lower()}").write_bytes(image_bytes(seed, kind=kind))
    return root


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a packed data set: relative path to bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
