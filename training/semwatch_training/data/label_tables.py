"""Tables of labels: a CSV file beside the images, with a header or without, one row for an image or for a defect.

image,label[,split]                       one label an image; masks/<stem>.png shows where, if it is there
image,x,y,w,h,label[,split]               a box a row, pixels of the whole page; an image with two defects comes twice
image,x0,y0,x1,y1,label[,split]           the same with corners, half-open
file,defect,label,stage,x0,y0,x1,y1       ``synthetic.write_lot``: a mask for each defect, masks/<stem>_<k>.png

Columns go by name in any order, other columns are ignored; the names that are understood stand in ``COLUMNS``. Commas,
semicolons and tabs part cells. Images lie where the table says, from its own folder or from images/ beside it.
A column whose name is almost one of these is a slip, and refused.
"""

import csv
import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from semwatch.defects import DEFECT_FREE, Box
from semwatch.errors import ConfigError
from semwatch_training.data.datasets import MASK_FOLDERS, DataSet, Place, Sample
from semwatch_training.data.labels import canonical

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "file", "filename", "file_name", "image_name", "image_path", "path", "name"),
    "label": ("label", "class", "class_name", "category", "defect_class", "defect_type", "type"),
    "split": ("split", "part", "set"),
    "defect": ("defect",),
    "x0": ("x0", "x1min", "xmin", "x_min", "left"),
    "y0": ("y0", "y1min", "ymin", "y_min", "top"),
    "x1": ("x1", "xmax", "x_max", "right"),
    "y1": ("y1", "ymax", "y_max", "bottom"),
    "x": ("x", "bbox_x"),
    "y": ("y", "bbox_y"),
    "w": ("w", "width", "bbox_w", "bbox_width"),
    "h": ("h", "height", "bbox_h", "bbox_height"),
}
"""Names of columns, in lower case, by what they say."""
_SIZED, _CORNERS = ("x", "y", "w", "h"), ("x0", "y0", "x1", "y1")
_BARE = {2: ("image", "label"), 6: ("image", *_SIZED, "label")}
"""Columns of tables without a header, by their number."""
_SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test", "": "test"}
SHAPES = "image,label or image,label,split or image,x,y,w,h,label"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table by what its columns say."""

    place: str
    """Of the row, for messages."""
    cells: Mapping[str, str]


def read_table(table: Path) -> DataSet:
    """Read a table of labels and what lies beside it.

    Raises:
        ConfigError: it cannot be read or has no such columns; a row without a value, a file that is not there, a split
            that is neither train nor test, a box that is none; an image with two labels and no box to tell them apart.
    """
    rows = list(_rows(table))
    is_lot = "defect" in rows[0].cells
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    row_of_mask: dict[Place, Row] = {}
    for of_image in _by_image(rows).values():
        image = _image_of(table, of_image[0])
        split = _split_of(of_image)
        labels = [canonical(row.cells["label"]) for row in of_image]
        boxes = [_box_of(row, label) for row, label in zip(of_image, labels, strict=True)]
        places: Sequence[Place | None]
        if is_lot:
            _refuse_bad_numbers(of_image, labels)
            places = [_lot_mask(table, row) for row in of_image]  # its boxes say no more than its masks
        else:
            _refuse_two_labels(of_image, labels, boxes)
            places = boxes
        for k, label in enumerate(labels):
            others = tuple(place for other, place in enumerate(places) if other != k and place is not None)
            mask = places[k]
            if mask is None and not is_lot and label != DEFECT_FREE:
                mask = mask_beside(image, table.parent)
                _refuse_shared_mask(mask, of_image[k], row_of_mask)
            parts[split].append(Sample(image, label) if label == DEFECT_FREE else Sample(image, label, mask, others))
    return DataSet(table.resolve().parent.name, tuple(parts["train"]), tuple(parts["test"]))


def looks_like_labels(table: Path) -> bool:
    """Whether a CSV file could be a table of labels."""
    try:
        next(_rows(table))
    except ConfigError:
        return False
    return True


def mask_beside(image: Path, top: Path) -> Path | None:
    """The mask of an image below ``top``: of its stem, in a folder of masks beside the image's top folder."""
    relative = image.relative_to(top)
    inner = Path(*relative.parts[1:]) if relative.parts[0] == "images" else relative
    for folder, ending in itertools.product(MASK_FOLDERS, ("", "_mask")):
        found = top / folder / inner.with_name(f"{inner.stem}{ending}.png")
        if found.is_file():
            return found
    return None


# ---- rows ----


def _rows(table: Path) -> Iterator[Row]:
    lines = _lines(table)
    _, first = next(lines, (1, []))
    columns, is_header = _columns(table, first)
    if not is_header:
        lines = itertools.chain([(1, first)], lines)
    n_rows = 0
    for line, cells in lines:
        place = f"{table} line {line}"
        named = dict(zip(columns, cells, strict=False))
        if len(cells) != len(columns) or not named["image"] or not named["label"]:
            raise ConfigError(f"{place}: {','.join(cells)!r}; write {len(columns)} values, no image or label empty")
        n_rows += 1
        yield Row(place, named)
    if not n_rows:
        raise ConfigError(f"{table}: no rows; write one for each image")


def _columns(table: Path, first: list[str]) -> tuple[list[str], bool]:
    """What each column says, and whether the first line is a header."""
    meaning = {name: what for what, names in COLUMNS.items() for name in names}
    found = [meaning.get(cell.lower(), f"({cell})") for cell in first]
    for cell, what in zip(first, found, strict=True):
        if what not in COLUMNS and (near := difflib.get_close_matches(cell.lower(), meaning, n=1, cutoff=0.8)):
            raise ConfigError(f"{table}: its first line is {','.join(first)!r}; write {near[0]} for {cell!r}")
    has_box = set(_SIZED) <= set(found) or set(_CORNERS) <= set(found)
    some_box = {*_SIZED, *_CORNERS} & set(found)
    if found.count("image") == found.count("label") == 1 and (has_box or not some_box):
        return found, True
    columns = _BARE.get(len(first), ())
    if columns and not {"image", "label"} & set(found) and any((d / first[0]).is_file() for d in _image_folders(table)):
        return list(columns), False
    raise ConfigError(
        f"{table}: its first line is {','.join(first)!r}; the nearest layout is a table of labels: it must be {SHAPES}"
    )


def _lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of each line that is not blank; Excel's byte-order mark is skipped."""
    try:
        text = table.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(",;\t", key=first.count)
        lines = csv.reader(text.splitlines(keepends=True), strict=True, delimiter=delimiter)
        for cells in lines:
            if any(cell.strip() for cell in cells):
                yield lines.line_num, [cell.strip() for cell in cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table}: cannot be read ({error}); save it as CSV with commas, in UTF-8") from error


def _by_image(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.cells["image"].replace("\\", "/"), []).append(row)
    return found


def _image_folders(table: Path) -> tuple[Path, ...]:
    return table.parent / "images", table.parent


def _image_of(table: Path, row: Row) -> Path:
    """The file that a row names."""
    name = PurePosixPath(row.cells["image"].replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise ConfigError(f"{row.place}: {name} leads out of {table.parent}; write names relative to it")
    folders = _image_folders(table)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    place = folders[0] if folders[0].is_dir() else folders[1]
    raise ConfigError(f"{row.place}: {place / name} does not exist; add the image or take out the row")


def _split_of(rows: list[Row]) -> str:
    splits = {row.cells.get("split", "").lower() for row in rows}
    for row in rows:
        split = row.cells.get("split", "test").lower()
        if split not in _SPLITS or (not split and "split" in row.cells):
            raise ConfigError(f"{row.place}: split {split!r}; write train or test")
    if len(splits) > 1:
        raise ConfigError(f"{rows[-1].place}: {rows[0].cells['image']} is in two splits; keep an image in one")
    return _SPLITS[splits.pop()]


def _box_of(row: Row, label: str) -> Box | None:
    """The box of a row; None without such columns, or where all four are empty."""
    names = _SIZED if "w" in row.cells else _CORNERS
    texts = [row.cells.get(name, "") for name in names]
    if not any(texts) or label == DEFECT_FREE:
        return None
    try:
        a, b, c, d = (float(text) for text in texts)
        x0, y0, x1, y1 = (a, b, a + c, b + d) if names is _SIZED else (a, b, c, d)
        box = int(x0), int(y0), round(x1), round(y1)  # an infinite number has no integer: also a ValueError
    except (ValueError, OverflowError):
        raise ConfigError(f"{row.place}: the box {','.join(texts)!r} is not four numbers; write pixels") from None
    if not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise ConfigError(f"{row.place}: the box {','.join(texts)!r} is empty; write {','.join(names)} in pixels")
    return box


def _refuse_shared_mask(mask: Path | None, row: Row, row_of_mask: dict[Place, Row]) -> None:
    """Masks go by the stem, so those of a.png and a.jpg would be one."""
    if mask is not None and (other := row_of_mask.setdefault(mask, row)) is not row:
        first, line = other.cells["image"], other.place.rpartition(" ")[2]
        raise ConfigError(f"{row.place}: {row.cells['image']} has the mask of {first}, line {line}; rename one")


def _refuse_two_labels(rows: list[Row], labels: list[str], boxes: list[Box | None]) -> None:
    """Of one image: without a box for each, its labels contradict each other."""
    if len(rows) == 1 or (None not in boxes and DEFECT_FREE not in labels):
        return
    name, first = rows[0].cells["image"], rows[0].place.rpartition(" ")[2]
    if len(set(labels)) > 1:
        raise ConfigError(
            f"{rows[1].place}: {name} is {labels[1]!r}, and {labels[0]!r} in line {first}; keep one row for each "
            f"image, or give each defect its box: image,x,y,w,h,label"
        )
    raise ConfigError(f"{rows[1].place}: {name} again, after line {first}; keep one row for each image")


# ---- lots of the generator ----


def _lot_mask(table: Path, row: Row) -> Place | None:
    stem = PurePosixPath(row.cells["image"]).stem
    mask = table.parent / "masks" / f"{stem}_{row.cells['defect']}.png"
    return mask if mask.is_file() else None


def _refuse_bad_numbers(rows: list[Row], labels: list[str]) -> None:
    """Defects of an image count from 1, each is there once; a defect-free image has a single row with 0."""
    seen: set[str] = set()
    for row, label in zip(rows, labels, strict=True):
        defect = row.cells["defect"]
        if defect in seen:
            raise ConfigError(f"{row.place}: defect {defect} of {row.cells['image']} is there twice; keep one row")
        seen.add(defect)
        is_free = label == DEFECT_FREE
        if not defect.isdecimal() or (defect == "0") != is_free or ("0" in seen and len(seen) > 1):
            raise ConfigError(
                f"{row.place}: defect {defect!r} with label {label!r}; an image's defects count from 1, "
                f"and one that is {DEFECT_FREE} has a single row with 0"
            )
