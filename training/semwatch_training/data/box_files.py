"""Boxes as detectors are trained on: a COCO file of instances, and YOLO's text files.

COCO  <any>.json or annotations/<any>.json with images, annotations (bbox x, y, w, h) and categories
YOLO  images/[<split>/]<stem>.<suffix>, labels/[<split>/]<stem>.txt; or both in one folder; names in data.yaml,
      classes.txt or obj.names; a line is: class, centre x, centre y, width, height, as shares of the image

An image without a box is defect-free in both, as the formats have it. Outlines of COCO are not read: their boxes are.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from semwatch.defects import DEFECT_FREE, Box
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch_training.data.class_folders import images_of, subfolders
from semwatch_training.data.datasets import DataSet, Sample
from semwatch_training.data.labels import canonical

_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names", "labels/classes.txt")
Labelled = Sequence[tuple[str, Box]]


# ---- COCO ----


def coco_files(folder: Path) -> list[Path]:
    """JSON files of a folder, or of annotations/ in it, that hold instances of COCO."""
    found = sorted((*folder.glob("*.json"), *folder.glob("annotations/*.json")))
    return [path for path in found if {"images", "annotations", "categories"} <= _json(path).keys()]


def read_coco(tables: Sequence[Path], folder: Path) -> DataSet:
    """Read COCO files of a data set; those whose name says train are to learn from.

    Raises:
        ConfigError: a file of another form, an image that is not there, a category without a name.
    """
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    for table in tables:
        parts["train" if "train" in table.stem.lower() else "test"] += _coco_samples(table, folder)
    return DataSet(folder.resolve().name, tuple(parts["train"]), tuple(parts["test"]))


def _coco_samples(table: Path, folder: Path) -> list[Sample]:
    content = _json(table)
    try:
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        images = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        found: dict[Any, list[tuple[str, Box]]] = {key: [] for key in images}
        for entry in content["annotations"]:
            x, y, w, h = map(float, entry["bbox"])
            found[entry["image_id"]].append((names[entry["category_id"]], _box(x, y, x + w, y + h, table)))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{table}: not COCO's form ({error!r}); each annotation needs image_id, category_id and bbox [x, y, w, h] "
            f"of an image and a category in the file"
        ) from error
    return [s for key, name in images.items() for s in _samples(_coco_image(table, folder, name), found[key])]


def _coco_image(table: Path, folder: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ConfigError(f"{table}: {name} leads out of {folder}; write file_name relative to it")
    for below in ("", "images", table.stem.removeprefix("instances_")):
        if (folder / below / relative).is_file():
            return folder / below / relative
    raise ConfigError(f"{table}: {folder / relative} does not exist; add the image, or take its entry out")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); save it as JSON again, or move it away") from error
    return content if isinstance(content, dict) else {}


# ---- YOLO ----


def is_yolo(folder: Path) -> bool:
    """Whether text files of boxes lie in labels/ beside images/, or beside the images."""
    labels = folder / "labels"
    return (labels.is_dir() and any(labels.rglob("*.txt"))) or any(
        image.with_suffix(".txt").is_file() for image in images_of(folder)
    )


def read_yolo(folder: Path) -> DataSet:
    """Read YOLO's text files; images in a folder whose name says train are to learn from.

    Raises:
        ConfigError: no names of classes, a line that is no box, a number without a name.
    """
    names = _yolo_names(folder)
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    tops = [folder / "images"] if (folder / "images").is_dir() else [folder]
    for top in (*tops, *(path for path in subfolders(tops[0]) if path.name != "labels")):
        for image in images_of(top):
            relative = image.relative_to(tops[0]).with_suffix(".txt")
            texts = (folder / "labels" / relative, image.with_suffix(".txt"))
            text = next((path for path in texts if path.is_file()), None)
            part = "train" if "train" in top.name.lower() else "test"
            parts[part] += _samples(image, [] if text is None else _yolo_boxes(text, image, names))
    return DataSet(folder.resolve().name, tuple(parts["train"]), tuple(parts["test"]))


def _yolo_names(folder: Path) -> dict[int, str]:
    for path in (folder / name for name in _NAMES):
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            named = yaml.safe_load(text).get("names") if path.suffix in (".yaml", ".yml") else text.split("\n")
            entries = named.items() if isinstance(named, dict) else enumerate(named or ())
            found = {int(number): str(name).strip() for number, name in entries if str(name).strip()}
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); write one name of a class a line") from error
        if found:
            return found
    raise ConfigError(
        f"{folder}: the nearest layout is YOLO's, and its classes have no names; add classes.txt with one name a line"
    )


def _yolo_boxes(text: Path, image: Path, names: dict[int, str]) -> list[tuple[str, Box]]:
    try:
        lines = [line.split() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: cannot be read ({error})") from error
    if not lines:
        return []
    height, width = decoding.read(image)[0].pixels.shape
    found = []
    for number, cells in enumerate(lines, start=1):
        try:
            name, (x, y, w, h) = names[int(cells[0])], map(float, cells[1:])
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{text} line {number}: {' '.join(cells)!r}; write a class number that has a name ({len(names)} have) "
                f"and four shares of the image: x y w h"
            ) from error
        box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        found.append((name, _box(*box, text)))
    return found


# ---- both ----


def _box(x0: float, y0: float, x1: float, y1: float, place: Path) -> Box:
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or not (-1 < x0 < x1 and -1 < y0 < y1):
        raise ConfigError(f"{place}: a box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) is none; mend it or take it out")
    left, top = max(0, math.floor(x0 + 1e-6)), max(0, math.floor(y0 + 1e-6))
    return left, top, max(left + 1, round(x1)), max(top + 1, round(y1))


def _samples(image: Path, labelled: Labelled) -> list[Sample]:
    """One sample for each box; an image without one is defect-free."""
    marked = [(canonical(label), box) for label, box in labelled]
    boxes = [box for label, box in marked if label != DEFECT_FREE]
    if not boxes:
        return [Sample(image, DEFECT_FREE)]
    return [
        Sample(image, label, box, tuple(other for other in boxes if other is not box))
        for label, box in marked
        if label != DEFECT_FREE
    ]
