"""Data sets on disk: ``read`` tells every plausible layout apart, and is the one reader that all commands use.

table              a CSV of labels or boxes beside the images or images/: ``label_tables``; lots of ``synth`` too
folder per class   <label>/<name>, with or without masks, train/ and test/: ``class_folders``
images and masks   images/<name>, masks/<stem>.png: ``class_folders``
COCO, YOLO         boxes: ``box_files``
corrections        a line of JSON for what a person said of a defect: ``correction_files``
MTD                MT_<Class>/Imgs/<stem>.jpg and .png, mtd_train_filenames.txt: Huang 2020, split of DifferNet
SD-saliency-900    Source Images/<In|Pa|Sc>_<n>.bmp, Ground truth/<In|Pa|Sc>_<n>.png: Song 2020

Where a layout does not split, every sample is in the test part: nothing is learnt from what nobody set aside for it.
What counts as defect-free stands in ``labels``; any mask beside such an image is ignored. What is none of these is
refused with the layout that is nearest and the line that would mend it.
"""

from collections.abc import Collection
from pathlib import Path

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.data.box_files import coco_files, is_yolo, read_coco, read_yolo
from semwatch_training.data.class_folders import images_of, read_class_folders, read_images_with_masks, subfolders
from semwatch_training.data.correction_files import SUFFIX, read_corrections
from semwatch_training.data.datasets import (
    MASK_FOLDERS,
    DataSet,
    checked,
    folder_images,
    refuse_leakage,
)
from semwatch_training.data.label_tables import looks_like_labels, read_table
from semwatch_training.data.public_sets import read_mtd, read_sd_saliency, sd_root

TABLE = "labels.csv"


def read(
    place: Path, *, labels: Collection[str] | None = None, require_masks: bool = False, allow_leakage: bool = False
) -> DataSet:
    """Read a data set in any of the layouts, and refuse it where test images repeat training images.

    Args:
        place: the data set's top folder, its table (CSV, or COCO's JSON), or a file of corrections (``.jsonl``).
        labels: the defect classes that may and must occur; without them those found are taken.
        require_masks: refuse a defect without mask or box.
        allow_leakage: take it all the same.

    Raises:
        ConfigError: none of the layouts, what the layout's own reader refuses, or leakage.
        ImageError: a file is not a whole image.
    """
    data_set = checked(_read(place), labels=labels, require_masks=require_masks)
    refuse_leakage(data_set.train, data_set.test, allow=allow_leakage)
    return data_set


def read_normals(folder: Path) -> list[Path]:
    """Images of defect-free fields: of a labelled set that has some the normal ones, else all below the folder.

    Raises:
        ConfigError: the folder is absent or holds no image; its labels.csv cannot be read.
    """
    images = folder_images(folder)
    try:
        data_set = _read(folder)
    except ConfigError:
        if (folder / TABLE).is_file():
            raise
        return images  # a plain folder of images is no labelled set
    normal = {sample.image for sample in (*data_set.train, *data_set.test) if sample.label == DEFECT_FREE}
    return sorted(normal) or images


def _read(place: Path) -> DataSet:
    if place.suffix.lower() == SUFFIX and place.is_file():
        return read_corrections(place)
    if place.is_file():
        return read_coco([place], place.parent) if place.suffix.lower() == ".json" else read_table(place)
    if not place.is_dir():
        raise ConfigError(f"{place} is not a folder of images; name the data set's top folder, or its table")
    if any(place.glob("MT_*/Imgs")):
        return read_mtd(place)
    if sd_root(place) is not None:
        return read_sd_saliency(place)
    return _read_labelled(place)


def _read_labelled(place: Path) -> DataSet:
    if table := _table_of(place):
        return read_table(table)
    if tables := coco_files(place):
        return read_coco(tables, place)
    if is_yolo(place):
        return read_yolo(place)
    if (place / "images").is_dir() and any((place / name).is_dir() for name in MASK_FOLDERS):
        return read_images_with_masks(place)
    below = [path for path in subfolders(place) if path.name not in MASK_FOLDERS]
    if below and [path.name for path in below] != ["images"] and not images_of(place):
        return read_class_folders(place)
    raise ConfigError(f"{place}: {_nearest(place)}")


def _table_of(folder: Path) -> Path | None:
    """labels.csv; else the one CSV file of the folder that could be labels."""
    if (folder / TABLE).is_file():
        return folder / TABLE
    found = [path for path in sorted(folder.glob("*.csv")) if looks_like_labels(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ConfigError(f"{folder}: {names} could all be its labels; name one of them in the folder's place")
    return found[0] if found else None


def _nearest(folder: Path) -> str:
    """Which layout a folder comes nearest to, and the one line that would mend it."""
    flat = images_of(folder) or (images_of(folder / "images") if (folder / "images").is_dir() else [])
    tables = sorted(path.name for path in folder.glob("*.csv"))
    if tables:
        return (
            f"the nearest layout is images with a table, and {tables[0]} is none: let its first line be image,label or "
            f"image,x,y,w,h,label"
        )
    if flat and (below := [path.name for path in subfolders(folder) if path.name not in ("images", *MASK_FOLDERS)]):
        return (
            f"{len(flat)} images lie beside the folders {', '.join(below)}; the nearest layout is a folder per class: "
            f"move each image into the folder of its class"
        )
    if flat:
        return (
            f"{len(flat)} images and no labels; the nearest layout is images with a table: add {TABLE} with the first "
            f"line image,label and a line for each image, as {flat[0].name},scratch"
        )
    return (
        f"no data set: there is no image in it; the nearest layout is a folder per class: put images into "
        f"{folder}/<label>/, defect-free ones into {folder}/good/"
    )
