"""Images to train on: the synthetic stages, and plain folders of normal images."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch import micrograph
from semwatch.detection import resize
from semwatch.errors import ConfigError
from semwatch_training.synthetic import STAGES, render

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")

# Seeds of the generator by use, far apart, so that no image serves two purposes.
SEED_TRAIN, SEED_HELD_OUT, SEED_HEAD, SEED_EVALUATE = 1_000_000, 2_000_000, 3_000_000, 4_000_000


def synthetic_normals(n: int, *, first_seed: int, size_px: int) -> Iterator[NDArray[np.uint8]]:
    """Yield n normal micrographs (size_px, size_px) uint8, the stages in turn.

    Rendered between 448 and 1024 px a side and resized, so that grain, blur and noise come at the spread of scales that
    resizing a tool's images gives.
    """
    rng = np.random.default_rng(first_seed)
    for index in range(n):
        side = int(rng.choice([448, 512, 768, 1024]))
        image = render(STAGES[index % len(STAGES)], seed=first_seed + index, size_hw=(side, side)).pixels
        yield resize(image, (size_px, size_px))


def folder_images(folder: Path) -> list[Path]:
    """Image files below a folder, sorted.

    Raises:
        ConfigError: the folder is absent or holds no image.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of images")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not found:
        raise ConfigError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


def normal_images(paths: list[Path], *, size_px: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the fields of view of image files, first page each, as the daemon reads them: (size_px, size_px) uint8."""
    for path in paths:
        yield resize(micrograph.read(path)[0].field, (size_px, size_px))
