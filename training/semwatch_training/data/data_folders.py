"""Data sets as folders: every layout that is read, and ``read``, which tells them apart.

plain              images/<name>, masks/<stem>.png, labels.csv with the header image,label or image,label,split
lot                <name>, masks/<stem>_<k>.png, labels.csv with the header file,defect,...: ``synthetic.write_lot``
folder per class   [train/|test/]<label>/<name>, ground_truth/<label>/<stem>_mask.png or <stem>.png, as MVTec AD has it
MTD                MT_<Class>/Imgs/<stem>.jpg and .png, mtd_train_filenames.txt: Huang 2020, split of DifferNet
SD-saliency-900    Source Images/<In|Pa|Sc>_<n>.bmp, Ground truth/<In|Pa|Sc>_<n>.png: Song 2020

Where a layout does not split, every sample is in the test part: nothing is learnt from what nobody set aside for it.
Normal images are labelled defect-free, good or normal (in the files), and any mask beside them is ignored. Only
``read`` looks at pixels, for leakage.
"""

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.data.datasets import IMAGE_SUFFIXES, DataSet, Sample, checked, refuse_leakage
from semwatch_training.data.public_sets import SD_FOLDERS, read_mtd, read_sd_saliency, sd_root

NORMAL_NAMES = (DEFECT_FREE, "good", "normal")
_PLAIN_COLUMNS = (["image", "label"], ["image", "label", "split"])
_LOT_COLUMNS = (["file", "defect", "label", "stage", "x0", "y0", "x1", "y1"],)


def read(
    folder: Path, *, labels: Collection[str] | None = None, require_masks: bool = False, allow_leakage: bool = False
) -> DataSet:
    """Read a data set in any of the layouts, and refuse it where test images repeat training images.

    ``labels`` are the defect classes that may and must occur; without them those found are taken.

    Raises:
        ConfigError: none of the layouts, what the layout's own reader refuses, or leakage.
        ImageError: a file is not a whole image.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of images; name the data set's top folder")
    if any(folder.glob("MT_*/Imgs")):
        data_set = checked(read_mtd(folder), labels=labels)
    elif sd_root(folder) is not None:
        data_set = checked(read_sd_saliency(folder), labels=labels)
    elif (folder / "labels.csv").is_file():
        reader = read_lot if _header(folder / "labels.csv") in _LOT_COLUMNS else read_plain
        data_set = reader(folder, labels=labels, require_masks=require_masks)
    elif (folder / "images").is_dir() or not _subfolders(folder):
        raise ConfigError(
            f"{folder}: no data set; looked for labels.csv beside images/ and masks/ (plain) or beside the images "
            f"(lot), one folder per class or train/ and test/ with those, MT_<Class>/Imgs (MTD), and "
            f"'{SD_FOLDERS[0]}' beside '{SD_FOLDERS[1]}' (SD-saliency-900)"
        )
    else:
        data_set = read_folder_per_class(folder, labels=labels, require_masks=require_masks)
    refuse_leakage(data_set.train, data_set.test, allow=allow_leakage)
    return data_set


# ---- labels.csv ----


def read_plain(folder: Path, *, labels: Collection[str] | None = None, require_masks: bool = False) -> DataSet:
    """Read images/, masks/ and labels.csv; ``split`` is train or test. Images without a row are not part of the set.

    Raises:
        ConfigError: labels.csv cannot be read, names an image twice or one that is absent, or two images share a mask;
            labels other than ``labels``, or one of them without a sample; ``require_masks`` and a defect has none.
    """
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    lines: dict[str, int] = {}
    for line, row in _rows(folder / "labels.csv", _PLAIN_COLUMNS):
        place, part = f"{folder / 'labels.csv'} line {line}", row.get("split", "test")
        image = _inside(folder / "images", row["image"], place)
        # The mask goes by the stem, so a.png and a.jpg are one row too many as well.
        stem = str(PurePosixPath(row["image"]).with_suffix(""))
        if stem in lines:
            raise ConfigError(
                f"{place}: {row['image']} is {stem!r} again, after line {lines[stem]}; keep one row for each image, "
                f"and one image for each masks/<stem>.png"
            )
        if part not in parts:
            raise ConfigError(f"{place}: split {part!r}; write train or test")
        lines[stem] = line
        parts[part].append(_sample(image, row["label"], (folder / "masks" / f"{stem}.png",)))
    return checked(_data_set(folder, parts["train"], parts["test"]), labels=labels, require_masks=require_masks)


def read_lot(folder: Path, *, labels: Collection[str] | None = None, require_masks: bool = False) -> DataSet:
    """Read what ``synthetic.write_lot`` wrote: one sample per defect, so an image with two defects comes twice.

    Raises:
        ConfigError: as ``read_plain``; a defect that is there twice, or numbered 0 and not defect-free, or otherwise.
    """
    images: dict[str, dict[str, str]] = {}
    for line, row in _rows(folder / "labels.csv", _LOT_COLUMNS):
        place = f"{folder / 'labels.csv'} line {line}"
        file, defect, label = row["file"], row["defect"], row["label"]
        _inside(folder, file, place)
        labels_of = images.setdefault(file, {})
        if defect in labels_of:
            raise ConfigError(f"{place}: defect {defect} of {file} is there twice; keep one row")
        labels_of[defect] = label
        if (
            not defect.isdecimal()
            or (defect == "0") != (label == DEFECT_FREE)
            or ("0" in labels_of and len(labels_of) > 1)
        ):
            raise ConfigError(
                f"{place}: defect {defect!r} with label {label!r}; an image's defects count from 1, "
                f"and one that is {DEFECT_FREE} has a single row with 0"
            )
    samples = []
    for file, labels_of in images.items():
        masks = {k: folder / "masks" / f"{PurePosixPath(file).stem}_{k}.png" for k in labels_of}
        for k, label in labels_of.items():
            others = tuple(mask for other, mask in masks.items() if other != k)
            samples.append(_sample(folder / file, label, (masks[k],), others))
    return checked(_data_set(folder, [], samples), labels=labels, require_masks=require_masks)


def _header(table: Path) -> list[str] | None:
    return next((row for _, row in _lines(table)), None)


def _rows(table: Path, headers: Sequence[list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line number and cells by column of a table whose header is one of ``headers``."""
    lines = _lines(table)
    _, header = next(lines, (1, []))
    if header not in headers:
        wanted = " or ".join(",".join(columns) for columns in headers)
        raise ConfigError(f"{table}: its first line is {','.join(header)!r}; it must be {wanted}")
    n_rows = 0
    for line, cells in lines:
        row = dict(zip(header, cells, strict=False))
        if len(cells) != len(header) or not row[header[0]] or not row["label"]:
            raise ConfigError(
                f"{table} line {line}: {','.join(cells)!r}; write {len(header)} values, no image or label empty"
            )
        n_rows += 1
        yield line, row
    if not n_rows:
        raise ConfigError(f"{table}: no rows; write one for each image")


def _lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of each line that is not blank; Excel's byte-order mark is skipped."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            lines = csv.reader(stream, strict=True)
            for cells in lines:
                if any(cell.strip() for cell in cells):
                    yield lines.line_num, [cell.strip() for cell in cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table}: cannot be read ({error}); save it as CSV with commas, in UTF-8") from error


def _inside(folder: Path, name: str, where: str) -> Path:
    """Return the path of a file that a table names."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise ConfigError(f"{where}: {name} leads out of {folder}; write names relative to it")
    if not (folder / relative).is_file():
        raise ConfigError(f"{where}: {folder / relative} does not exist; add the image or take out the row")
    return folder / relative


# ---- folder per class ----


def read_folder_per_class(
    folder: Path, *, labels: Collection[str] | None = None, require_masks: bool = False
) -> DataSet:
    """Read one folder per class, below train/ and test/ where there are such; masks lie below ground_truth/.

    Raises:
        ConfigError: no class, a class without images, folders beside train/ and test/; labels other than ``labels``, or
            one of them without a sample; ``require_masks`` and a defect has none.
    """
    below = {path.name: path for path in _subfolders(folder) if path.name != "ground_truth"}
    if below.keys().isdisjoint({"train", "test"}):
        return checked(_data_set(folder, [], _classes(folder, folder)), labels=labels, require_masks=require_masks)
    if stray := sorted(below.keys() - {"train", "test"}):
        raise ConfigError(f"{folder}: {', '.join(stray)} beside train or test; move each class below one of them")
    parts = {name: _classes(path, folder) for name, path in below.items()}
    return checked(
        _data_set(folder, parts.get("train", []), parts.get("test", [])), labels=labels, require_masks=require_masks
    )


def _classes(folder: Path, root: Path) -> list[Sample]:
    samples = []
    for of_class in _subfolders(folder):
        if of_class == root / "ground_truth":
            continue
        truth = root / "ground_truth" / of_class.name
        for image in _images(of_class):
            masks = truth / f"{image.stem}_mask.png", truth / f"{image.stem}.png"
            samples.append(_sample(image, of_class.name, masks))
    if not samples:
        raise ConfigError(f"{folder}: no class folders; make one folder of images for each label")
    return samples


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder of images; name the data set's top folder")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """Return the images of one class, sorted."""
    files = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ConfigError(f"{folder}: an empty class ({', '.join(IMAGE_SUFFIXES)}); add images or remove the folder")
    return found


# ---- samples ----


def _sample(image: Path, label: str, masks: Sequence[Path], others: tuple[Path, ...] = ()) -> Sample:
    """Label an image, with the first of the masks that exists."""
    if label in NORMAL_NAMES:
        return Sample(image, DEFECT_FREE)
    return Sample(image, label, next((mask for mask in masks if mask.is_file()), None), others)


def _data_set(folder: Path, train: Sequence[Sample], test: Sequence[Sample]) -> DataSet:
    return DataSet(folder.resolve().name, tuple(train), tuple(test))
