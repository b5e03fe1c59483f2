"""Labels by folder: one folder per class, with or without masks and splits; and images with masks alone.

<label>/<name>, [train/|test/|val/]<label>/<name>      a class a folder
ground_truth/<label>/<stem>_mask.png or <stem>.png     masks, also without <label>, also in masks/, mask/ or gt/
<label>/<stem>_mask.png, <label>/<stem>.png beside another suffix       masks beside their images
images/<name>, masks/<stem>.png                        no labels: the class is ``UNNAMED`` where the mask marks anything
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch_training.data.datasets import IMAGE_SUFFIXES, MASK_FOLDERS, DataSet, Sample
from semwatch_training.data.labels import canonical

UNNAMED = "defect"
"""The class of images whose masks say where something is, and nobody what."""
_PARTS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


def read_class_folders(folder: Path) -> DataSet:
    """Read one folder per class, below train/ and test/ where there are such.

    Raises:
        ConfigError: no class, a class without images, folders beside train/ and test/.
    """
    below = {path.name: path for path in subfolders(folder) if path.name not in MASK_FOLDERS}
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    if below.keys().isdisjoint(_PARTS):
        parts["test"] = _classes(folder, folder)
    elif stray := sorted(below.keys() - _PARTS.keys()):
        raise ConfigError(f"{folder}: {', '.join(stray)} beside train or test; move each class below one of them")
    else:
        for name, path in below.items():
            parts[_PARTS[name]] += _classes(path, folder)
    return DataSet(folder.resolve().name, tuple(parts["train"]), tuple(parts["test"]))


def read_images_with_masks(folder: Path) -> DataSet:
    """Read images/ and masks/ (or another of ``MASK_FOLDERS``) without any label.

    Raises:
        ConfigError: no image has a mask.
    """
    masks = next(folder / name for name in MASK_FOLDERS if (folder / name).is_dir())
    samples = []
    for image in images_of(folder / "images"):
        mask = next((path for path in _mask_names(masks, image.stem) if path.is_file()), None)
        is_marked = mask is not None and bool(decoding.read(mask, min_side_px=1)[0].pixels.any())
        samples.append(Sample(image, UNNAMED, mask) if is_marked else Sample(image, DEFECT_FREE))
    if all(sample.label == DEFECT_FREE for sample in samples):
        raise ConfigError(
            f"{folder}: no file of {masks.name}/ marks anything in one of images/; the nearest layout is images and "
            f"masks: name masks as their images, {masks.name}/{samples[0].image.stem}.png"
        )
    return DataSet(folder.resolve().name, (), tuple(samples))


def subfolders(folder: Path) -> list[Path]:
    """Folders of a folder that are not hidden, sorted."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of images; name the data set's top folder")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def images_of(folder: Path) -> list[Path]:
    """The images of one folder, sorted, masks beside them left out; empty where there are none."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    files = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    stems = {path.stem for path in files}
    found = [path for path in files if not (path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in stems)]
    others = {path.stem for path in found if path.suffix.lower() != ".png"}
    return [path for path in found if not (path.suffix.lower() == ".png" and path.stem in others and _is_mask(path))]


def _classes(folder: Path, root: Path) -> list[Sample]:
    samples = []
    for of_class in subfolders(folder):
        if of_class.name in MASK_FOLDERS:
            continue
        images = images_of(of_class)
        if not images:
            what = ", ".join(IMAGE_SUFFIXES)
            raise ConfigError(f"{of_class}: an empty class ({what}); add images or remove the folder")
        label = canonical(of_class.name)
        for image in images:
            mask = None if label == DEFECT_FREE else _mask_of(image, of_class.name, root)
            samples.append(Sample(image, label, mask))
    if not samples:
        raise ConfigError(f"{folder}: no class folders; make one folder of images for each label")
    return samples


def _mask_of(image: Path, label: str, root: Path) -> Path | None:
    above = (root / folder for folder in MASK_FOLDERS)
    beside = (image.parent / folder for folder in MASK_FOLDERS)
    places = [*itertools.chain.from_iterable((folder / label, folder) for folder in above), *beside, image.parent]
    named = (path for place in places for path in _mask_names(place, image.stem))
    return next((path for path in named if path != image and path.is_file()), None)


def _mask_names(folder: Path, stem: str) -> Iterator[Path]:
    yield folder / f"{stem}_mask.png"
    yield folder / f"{stem}.png"


def _is_mask(path: Path) -> bool:
    """Whether an image beside another of its name is its mask: of two gray levels at most."""
    return len(np.unique(decoding.read(path, min_side_px=1)[0].pixels)) <= 2
