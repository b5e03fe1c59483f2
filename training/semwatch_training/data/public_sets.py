"""Public defect data sets as their authors packed them, with the splits that published figures are for."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.data.datasets import DataSet, Sample, checked

MTD_CLASSES = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
MTD_NORMAL = "Free"
MTD_SPLIT = "mtd_train_filenames.txt"
MTD_TILE_GAP = 120
"""Measured on neighbours: up to 120 apart they look alike (median correlation .74 and more), beyond not (.16)."""
SD_CLASSES = {"In": "inclusion", "Pa": "patches", "Sc": "scratches"}
SD_FOLDERS = ("Source Images", "Ground truth")


def read_mtd(folder: Path) -> DataSet:
    """Read Magnetic-Tile-Defects with its published split: the listed normal images train, all others test.

    Labels are the folders' names, Free is defect-free. Four masks of Uneven are empty as published. No file repeats
    another's pixels, but the split parts photographs of one tile: 190 of the 191 normal test images show a tile that
    is trained on under other light, and only 53 of the 392 defects lie as near to one (see ``mtd_tiles``).

    Raises:
        ConfigError: a class, a mask or the split is missing, or the split names no normal image of the folder.

    Source: Huang et al., The Visual Computer 36 (2020); split of Rudolph et al., DifferNet, WACV 2021.
    """
    listed = _listed(folder / MTD_SPLIT)
    normal = [Sample(image, DEFECT_FREE) for image in _mtd_images(folder, MTD_NORMAL)]
    defects = [
        Sample(image, c, _mask(image.with_suffix(".png"))) for c in MTD_CLASSES for image in _mtd_images(folder, c)
    ]
    if absent := sorted(listed - {sample.image.name for sample in normal}):
        raise ConfigError(
            f"{folder / MTD_SPLIT} lists {len(absent)} images that MT_{MTD_NORMAL}/Imgs does not hold "
            f"({', '.join(absent[:5])}{' ...' if absent[5:] else ''}); take images and split as published"
        )
    train = tuple(sample for sample in normal if sample.image.name in listed)
    kept = tuple(sample for sample in normal if sample.image.name not in listed)
    return checked(DataSet("MTD", train, (*kept, *defects)), require_masks=True)


def mtd_tiles(samples: Sequence[Sample]) -> NDArray[np.intp]:
    """Tell which images of MTD show one tile: (n,) group of each sample, counted from 0.

    exp<e>_num_<number> is the e-th exposure, six to a tile, numbered within 120 of the last. Tiles that lie as near to
    each other share a group, so a split by group never parts a tile. Split so when choosing settings: a random share
    of the normal images holds tiles that were trained on.

    Raises:
        ConfigError: a file is not named so.
    """
    names = [re.fullmatch(r"exp\d+_num_(\d+)", sample.image.stem) for sample in samples]
    if None in names:
        raise ConfigError(f"{samples[names.index(None)].image}: not named exp<e>_num_<number>, as MTD's images are")
    numbers = np.array([int(name[1]) for name in names if name], np.int64)
    order = np.argsort(numbers, kind="stable")
    tiles = np.zeros(len(numbers), np.intp)
    tiles[order[1:]] = np.cumsum(np.diff(numbers[order]) > MTD_TILE_GAP)
    return tiles


def _listed(split: Path) -> set[str]:
    try:
        listed = set(split.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{split}: cannot be read ({error}); it lists the normal images to train on") from error
    if not listed:
        raise ConfigError(f"{split} is empty; it lists the normal images to train on, one name a line")
    return listed


def _mtd_images(folder: Path, name: str) -> list[Path]:
    images = sorted((folder / f"MT_{name}" / "Imgs").glob("*.jpg"))
    if not images:
        raise ConfigError(f"{folder / f'MT_{name}' / 'Imgs'}: an empty class (.jpg); unpack the data set whole")
    return images


def read_sd_saliency(folder: Path) -> DataSet:
    """Read SD-saliency-900, hot-rolled steel: inclusion, patches, scratches. No normal images, no split: all test.

    Pa_101 and Pa_105 are the same image as published: ``datasets.distinct`` leaves one out.

    Raises:
        ConfigError: a folder, a class or a mask is missing, or an image's name tells none of the classes.

    Source: Song et al., Optics and Lasers in Engineering 128 (2020).
    """
    root = sd_root(folder)
    if root is None:
        raise ConfigError(f"{folder}: no '{SD_FOLDERS[0]}' beside '{SD_FOLDERS[1]}'; unpack SD-saliency-900 whole")
    samples = []
    for image in sorted((root / SD_FOLDERS[0]).glob("*.bmp")):
        label = SD_CLASSES.get(image.stem.partition("_")[0])
        if label is None:
            raise ConfigError(f"{image}: its name begins with none of {', '.join(SD_CLASSES)}; remove it")
        samples.append(Sample(image, label, _mask(root / SD_FOLDERS[1] / f"{image.stem}.png")))
    return checked(DataSet("SD-saliency-900", (), tuple(samples)), labels=SD_CLASSES.values(), require_masks=True)


def sd_root(folder: Path) -> Path | None:
    """Return where the two folders lie, if they do: the download nests them in a folder of the set's own name."""
    roots = folder, folder / "SD-saliency-900"
    return next((root for root in roots if all((root / name).is_dir() for name in SD_FOLDERS)), None)


def _mask(path: Path) -> Path | None:
    return path if path.is_file() else None
