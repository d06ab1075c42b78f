"""Images on disk in the layouts that users bring, and the same examples of hypothesis on each run."""

import zipfile

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

settings.register_profile("reproducible", derandomize=True, database=None, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture
def write_images():
    """write_images(root, {class: images}, split): a folder of PNG files per class."""
    return _write_images


@pytest.fixture
def write_zip():
    """write_zip(root, split): the same images in Swin's zip format."""
    return _write_zip


@pytest.fixture(scope="session")
def images_writer():
    """`write_images` for fixtures that last longer than a test."""
    return _write_images


@pytest.fixture(scope="session")
def zip_writer():
    """`write_zip` for fixtures that last longer than a test."""
    return _write_zip


def _write_images(root, per_class, split="train", size=(12, 10)):
    rng = np.random.default_rng(len(split))
    for name, count in per_class.items():
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


def _write_zip(root, split, compression=zipfile.ZIP_STORED, prefix=""):
    classes = sorted(folder.name for folder in (root / split).iterdir())
    lines = []
    with zipfile.ZipFile(root / f"{split}.zip", "w", compression) as archive:
        for path in sorted((root / split).rglob("*.png")):
            name = path.relative_to(root / split).as_posix()
            archive.write(path, prefix + name)
            lines.append(f"{name}\t{classes.index(path.parent.name)}")
    (root / f"{split}_map.txt").write_text("\n".join(lines) + "\n")
