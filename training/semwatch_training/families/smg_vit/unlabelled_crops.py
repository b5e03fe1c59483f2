"""Crops without labels, cut by a repository's own detector as the daemon cuts them: what self-supervision learns from.

From synthetic images the gate is open, as it is when a head is fitted: the encoder must know false alarms too. From a
folder, the daemon's archive for one, the gate works as in the daemon: most of those images have no defect to show.
"""

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Micrograph
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch.line.pipeline import search
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch.system import files
from semwatch_training.data import datasets
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.system.progress_bars import Progress

SIDE_PX = 768
N_TYPES = sum(len(types) for types in DEFECT_TYPES.values())


class Crops(NamedTuple):
    """Crops and where their defects lie."""

    pixels: NDArray[np.uint8]
    """(n, S, S)."""
    soft_masks: NDArray[np.float32]
    """(n, t, t) in [0, 1]."""


def of_synthetic(models: Embedded, n_images: int, *, progress: Progress) -> Crops:
    """Search about n synthetic images, as many of each defect type of the three stages; one of each at least."""
    each = max(1, round(n_images / N_TYPES))
    gate = Recipe().gate.model_copy(update={"threshold": 0.0})
    recipe = Recipe().model_copy(update={"gate": gate})
    return searched(models, recipe, _synthetic_pages(each), each * N_TYPES, progress=progress)


def of_files(models: Embedded, paths: Sequence[Path], *, progress: Progress) -> Crops:
    """Search image files, all their pages, with the detector's own gate.

    Raises:
        ConfigError: the gate opened on none.
        ImageError: a file is not a whole image.
    """
    pages = (page for path in paths for page in decoding.read(path))
    return searched(models, Recipe(), pages, len(paths), progress=progress)


def searched(models: Embedded, recipe: Recipe, pages: Iterable[Micrograph], n: int, *, progress: Progress) -> Crops:
    """Cut out what the detector finds on pages, of which there are about ``n``.

    Raises:
        ConfigError: it finds nothing.
    """
    pixels, soft_masks = [], []
    done = 0
    for done, page in enumerate(pages, start=1):
        for candidate in search(page, recipe, models).candidates:
            pixels.append(candidate.crop)
            soft_masks.append(candidate.soft_mask)
        progress("search", done, max(n, done))
    if not pixels:
        raise ConfigError(f"the detector's gate opened on none of {done} images, so there is no crop; give more images")
    return Crops(np.stack(pixels), np.stack(soft_masks).astype(np.float32))


def drawn(folder: Path, n_images: int, seed: int) -> list[Path]:
    """Image files below a folder: all of them, or ``n_images`` drawn at random.

    Raises:
        ConfigError: the folder is absent or holds no image.
    """
    paths = datasets.folder_images(folder)
    order = np.random.default_rng(seed).permutation(len(paths))[:n_images]
    return [paths[index] for index in sorted(order)]


def fingerprint(paths: Iterable[Path]) -> str:
    """Digits that change with the place, size or time of any of the files."""
    digest = hashlib.sha256()
    for path in paths:
        found = path.stat()
        digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def save(crops: Crops, path: Path) -> None:
    """Keep crops, to be cut once."""
    files.make_folder(path.parent)
    with files.writing(path) as file:
        np.savez(file, pixels=crops.pixels, soft_masks=crops.soft_masks)


def load(path: Path, *, side_px: int, tokens: int) -> Crops:
    """Read what ``save`` wrote: crops (n, side_px, side_px) with masks (n, tokens, tokens).

    Raises:
        ConfigError: the file is absent, holds no crops, or ones of another size.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            crops = Crops(arrays["pixels"], arrays["soft_masks"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no crops ({error}); give what `semwatch-train encoder` kept") from error
    n = len(crops.pixels)
    wanted = (n, side_px, side_px), np.dtype(np.uint8), (n, tokens, tokens), np.dtype(np.float32)
    found = crops.pixels.shape, crops.pixels.dtype, crops.soft_masks.shape, crops.soft_masks.dtype
    if found != wanted:
        raise ConfigError(f"{path} holds crops and masks of {found}; this encoder wants {wanted}")
    return crops


def _synthetic_pages(n_per_type: int) -> Iterator[Micrograph]:
    for stage in STAGES:
        made = datasets.synthetic_set(
            stage, n_normal=0, n_per_type=n_per_type, first_seed=datasets.SEED_ENCODER, side_px=SIDE_PX
        )
        for image in made:
            yield Micrograph(image.pixels, (0, 0, SIDE_PX, SIDE_PX), 0, image.pixel_nm, None)
