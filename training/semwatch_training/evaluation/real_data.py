"""Real SEM as it was collected: folder by folder, what is clean, what is defective, and where the defect lies.

    bare-wafer-52px/<class>              defect-free is clean; images of 52 px, enlarged four times first
    line-space-and-more/<CLASS>          CLEAN_... is clean, OTHERS is neither
    clean-defect-pairs/{clean,defect,mask}   one pattern without and with its defect, files of the same name
    inspected-and-reference              <case>_inspected_image, <case>_reference_image, and a text of positions
    nanofibres                           train/good, test/anomalous, ground_truth/anomalous
    normal-patterned-silicon             clean fields
    vendor-files/<tool>                  nobody says what is clean
    wafer-review-480px                   <number>_<class>, all defective

A folder, a class or a mask that is absent is left out, and ``RealSet.absent`` names it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.intake import decoding
from semwatch_training.data.datasets import IMAGE_SUFFIXES

BARE_WAFER = "bare-wafer-52px"
LINE_SPACE = "line-space-and-more"
PAIRS = "clean-defect-pairs"
REFERENCE = "inspected-and-reference"
FIBRES = "nanofibres"
SILICON = "normal-patterned-silicon"
VENDOR = "vendor-files"
WAFER_REVIEW = "wafer-review-480px"
FOLDERS = (BARE_WAFER, LINE_SPACE, PAIRS, REFERENCE, FIBRES, SILICON, VENDOR, WAFER_REVIEW)

CLEAN_LAYER = "CLEAN_LAYER"
CLEAN_CLASSES = (CLEAN_LAYER, "CLEAN_VIA", "CLEAN_CRACK")
FOUR_DEFECTS = ("BRIDGE", "OPEN", "PARTICLE", "CMP")
DEFECT_CLASSES = (*FOUR_DEFECTS, "LER", "VIA", "CRACK")
ENLARGED = 4
"""How many times the images of 52 px are enlarged, linearly: the line takes no side under 64 px."""

_ROLES = re.compile(r"(?P<case>.*)_(?P<role>inspected|reference)_image$")
_CASE = re.compile(r"\bcase\s*(\w+)", re.IGNORECASE)
_POSITION = re.compile(r"\s*(\d+)[\s,;]+(\d+)\s*$")


@dataclass(frozen=True, slots=True, eq=False)
class RealImage:
    """One image file with what its collectors said of it."""

    folder: str
    """One of ``FOLDERS``."""
    label: str
    """Class, as the folder of the image is called; ``DEFECT_FREE`` where a folder of clean images has no classes."""
    name: str
    """Path below the data set's top folder, POSIX."""
    content: bytes
    """What the line is given."""
    defective: bool | None
    """None: nobody says."""
    mask: NDArray[np.bool_] | None = None
    """(H, W) True on the defect, in the frame of the page; None where nobody drew it."""
    positions_xy: tuple[tuple[int, int], ...] = ()
    """Of point defects, in the frame of the page."""
    reference: bytes | None = None
    """Content of the image of the same place without the defect."""


@dataclass(frozen=True, slots=True, eq=False)
class RealSet:
    """All that is there, and what is not."""

    images: tuple[RealImage, ...]
    absent: tuple[str, ...]
    """Folders, classes and masks that the description names and that are not there."""


def read(top: Path) -> RealSet:
    """Read every folder of the data set that is there.

    Raises:
        ConfigError: none of the folders is there, or all are empty.
        ImageError: an image to enlarge, or a mask, is not a whole image.
    """
    readers = {
        BARE_WAFER: _bare_wafer,
        LINE_SPACE: _line_space,
        PAIRS: _pairs,
        REFERENCE: _inspected_and_reference,
        FIBRES: _fibres,
        SILICON: _silicon,
        VENDOR: _vendor,
        WAFER_REVIEW: _wafer_review,
    }
    images: list[RealImage] = []
    absent: list[str] = []
    for folder, reader in readers.items():
        found = list(reader(top, absent)) if (top / folder).is_dir() else []
        if not found:
            absent.append(folder)
        images += found
    if not images:
        raise ConfigError(f"{top}: none of {', '.join(FOLDERS)} holds an image; name the folder they lie in")
    return RealSet(tuple(images), tuple(absent))


def _bare_wafer(top: Path, absent: list[str]) -> Iterator[RealImage]:
    for label, path in _by_class(top / BARE_WAFER):
        yield _image(top, path, BARE_WAFER, label, label != DEFECT_FREE, content=enlarged(path.read_bytes(), path.name))
    _note_classes(top / BARE_WAFER, (DEFECT_FREE, "particle", "pit", "scratch", "dark-spot"), absent)


def _line_space(top: Path, absent: list[str]) -> Iterator[RealImage]:
    for label, path in _by_class(top / LINE_SPACE):
        defective = False if label in CLEAN_CLASSES else True if label in DEFECT_CLASSES else None
        yield _image(top, path, LINE_SPACE, label, defective)
    _note_classes(top / LINE_SPACE, (*CLEAN_CLASSES, *DEFECT_CLASSES), absent)


def _pairs(top: Path, absent: list[str]) -> Iterator[RealImage]:
    for part, defective in (("clean", False), ("defect", True)):
        for path in _files(top / PAIRS / part):
            mask = _mask_beside(top / PAIRS / "mask", path.stem, top, path, absent) if defective else None
            yield _image(top, path, PAIRS, part, defective, mask=mask)


def _inspected_and_reference(top: Path, absent: list[str]) -> Iterator[RealImage]:
    roles: dict[str, dict[str, Path]] = {}
    for path in _files(top / REFERENCE):
        if role := _ROLES.match(path.stem):
            roles.setdefault(role["case"], {})[role["role"]] = path
    texts = sorted((top / REFERENCE).glob("*.txt"))
    positions = positions_of("\n".join(path.read_text(encoding="utf-8", errors="replace") for path in texts))
    for case, paths in roles.items():
        reference, number = paths.get("reference"), case.removeprefix("case")
        if reference is not None:
            yield _image(top, reference, REFERENCE, "reference", False)
        if inspected := paths.get("inspected"):
            known = positions.get(number)
            if known is None:
                absent.append(f"positions of {REFERENCE}/{case}")
            yield _image(
                top,
                inspected,
                REFERENCE,
                "inspected" if known else "inspected, nothing marked",
                None if known is None else bool(known),
                positions_xy=known or (),
                reference=None if reference is None else reference.read_bytes(),
            )


def _fibres(top: Path, absent: list[str]) -> Iterator[RealImage]:
    for path in _files(top / FIBRES / "train" / "good"):
        yield _image(top, path, FIBRES, "good", defective=False)
    for path in _files(top / FIBRES / "test" / "anomalous"):
        mask = _mask_beside(top / FIBRES / "ground_truth" / "anomalous", path.stem, top, path, absent)
        yield _image(top, path, FIBRES, "anomalous", defective=True, mask=mask)
    if not _files(top / FIBRES / "train" / "good"):
        absent.append(f"{FIBRES}/train/good")


def _silicon(top: Path, absent: list[str]) -> Iterator[RealImage]:  # noqa: ARG001 (all readers are called alike)
    for path in _files(top / SILICON):
        yield _image(top, path, SILICON, DEFECT_FREE, defective=False)


def _vendor(top: Path, absent: list[str]) -> Iterator[RealImage]:  # noqa: ARG001
    for label, path in _by_class(top / VENDOR):
        yield _image(top, path, VENDOR, label, None)


def _wafer_review(top: Path, absent: list[str]) -> Iterator[RealImage]:  # noqa: ARG001
    for path in _files(top / WAFER_REVIEW):
        yield _image(top, path, WAFER_REVIEW, re.sub(r"^\d+_", "", path.stem), defective=True)


def positions_of(text: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """Positions (x, y) by case, of lines ``case 2, ...`` and below each of them lines of two numbers.

    >>> positions_of("case 2, x y:\\n344 265\\n105 108\\ncase 3, none")
    {'2': ((344, 265), (105, 108)), '3': ()}
    """
    found: dict[str, tuple[tuple[int, int], ...]] = {}
    case = ""
    for line in text.splitlines():
        if position := _POSITION.match(line):
            found[case] = (*found.get(case, ()), (int(position[1]), int(position[2])))
        elif named := _CASE.search(line):
            case = named[1]
            found.setdefault(case, ())
    return found


def enlarged(content: bytes, name: str) -> bytes:
    """The first page of an image file, its sides ``ENLARGED`` times as long (bilinear), as PNG."""
    pixels = decoding.decode(content, name=name, min_side_px=1)[0].pixels
    height, width = pixels.shape
    larger = cv2.resize(pixels, (ENLARGED * width, ENLARGED * height), interpolation=cv2.INTER_LINEAR)
    return bytes(cv2.imencode(".png", larger)[1])


def _image(
    top: Path,
    path: Path,
    folder: str,
    label: str,
    defective: bool | None,
    *,
    content: bytes | None = None,
    mask: NDArray[np.bool_] | None = None,
    positions_xy: tuple[tuple[int, int], ...] = (),
    reference: bytes | None = None,
) -> RealImage:
    name = path.relative_to(top).as_posix()
    data = path.read_bytes() if content is None else content
    return RealImage(folder, label, name, data, defective, mask, positions_xy, reference)


def _mask_beside(folder: Path, stem: str, top: Path, image: Path, absent: list[str]) -> NDArray[np.bool_] | None:
    """The mask of an image; gray levels above 127 are the defect, in a mask of 0 and 1 the ones."""
    candidates = [path for path in _files(folder) if path.stem in (stem, f"{stem}_mask", f"{stem}_gt")]
    if not candidates:
        absent.append(f"mask of {image.relative_to(top).as_posix()}")
        return None
    pixels = decoding.read(candidates[0], min_side_px=1)[0].pixels
    return pixels > (127 if pixels.max() > 127 else 0)


def _by_class(folder: Path) -> Iterator[tuple[str, Path]]:
    for of_class in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in _files(of_class):
            yield of_class.name, path


def _note_classes(folder: Path, names: Sequence[str], absent: list[str]) -> None:
    absent += [f"{folder.name}/{name}" for name in names if not _files(folder / name)]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
