"""A lot as a review tool would leave it: images one by one, then masks, labels and an inspection file.

<folder>/<lot>_0001.tif ...        8-bit TIFF, every fifth image or so PNG; some with an info bar at the bottom
<folder>/masks/<stem>_<k>.png      0 or 255, as large as the image's page; k counts the image's defects from 1
<folder>/labels.csv                file,defect,label,stage,x0,y0,x1,y1; a defect-free image has defect 0 and no box
<folder>/LOT.klarf                 KLARF 1.2; CLASSNUMBER is 0 (unclassified), MANSEMCLASS holds the truth
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, Box
from semwatch.errors import ConfigError
from semwatch.system import files
from semwatch_training.synthetic.defects import DEFECT_TYPES, STAGES
from semwatch_training.synthetic.info_bar import HV_KV, draw_info_bar
from semwatch_training.synthetic.klarf import klarf_text
from semwatch_training.synthetic.rendering import SyntheticMicrograph, render
from semwatch_training.synthetic.shapes import NoRoom

DETECTORS = ("TLD", "ETD", "ICE")
P_COUNT = (0.75, 0.18, 0.07)
"""Shares of defective images with one, two and three defects."""
FIRST_RECORDED = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
FEI_TAG = 34682
MAX_SEEDS = 20
"""Small fields have no room for some defects; so many are tried."""


@dataclass(frozen=True, slots=True, eq=False)
class LotImage:
    """One image file of a lot, not yet written."""

    name: str
    """File name; says nothing about what is in it."""
    content: bytes
    """The file, whole."""
    micrograph: SyntheticMicrograph
    page_hw: tuple[int, int]
    """Height and width of the file's page: the field, and the info bar below it."""
    recorded: datetime

    @property
    def boxes_xyxy(self) -> tuple[Box, ...]:
        """One half-open box per defect."""
        return tuple(_box(mask) for mask in self.micrograph.masks)


@dataclass(frozen=True, slots=True)
class LotManifest:
    """What ``write_lot`` wrote."""

    folder: Path
    lot_id: str
    images: tuple[Path, ...]
    labels_csv: Path
    klarf: Path
    n_defects: int


def lot_images(
    *,
    n: int,
    seed: int,
    stages: Sequence[str] = STAGES,
    defect_types: Sequence[str] | None = None,
    defect_free_share: float = 0.3,
    size_hw: tuple[int, int] = (1024, 1024),
    info_bar_share: float = 0.6,
    png_share: float = 0.2,
    layout_svg: Path | None = None,
) -> Iterator[LotImage]:
    """Render a lot image by image, without touching the disk; the same seed gives the same bytes.

    Raises:
        ConfigError: an unknown stage or defect type, a stage left without any type, a share outside [0, 1].
    """
    choices = _choices(stages, defect_types)
    for share in (defect_free_share, info_bar_share, png_share):
        if not 0 <= share <= 1:
            raise ConfigError(f"share {share} is outside [0, 1]")
    return _lot_images(n, seed, choices, size_hw, (defect_free_share, info_bar_share, png_share), layout_svg)


def _lot_images(
    n: int,
    seed: int,
    choices: dict[str, tuple[str, ...]],
    size_hw: tuple[int, int],
    shares: tuple[float, float, float],
    layout_svg: Path | None,
) -> Iterator[LotImage]:
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        stage = str(rng.choice(list(choices)))
        clean, barred, png = rng.random(3) < shares
        count = 0 if clean else int(rng.choice([1, 2, 3], p=P_COUNT))
        labels = [str(label) for label in rng.choice(choices[stage], count)]
        shown = _rendered(stage, rng, size_hw, labels, layout_svg if stage == "BEOL" else None)
        yield _develop(f"{lot_id(seed)}_{i + 1:04d}", shown, rng, barred=bool(barred), png=bool(png), minutes=i)


def _rendered(
    stage: str, rng: np.random.Generator, size_hw: tuple[int, int], labels: Sequence[str], layout_svg: Path | None
) -> SyntheticMicrograph:
    """Render with the first of some seeds whose field has room for the defects."""
    for tries_left in reversed(range(MAX_SEEDS)):
        try:
            drawn = int(rng.integers(2**31))
            return render(stage, seed=drawn, size_hw=size_hw, defects=labels, layout_svg=layout_svg)
        except NoRoom:
            if not tries_left:
                raise
    raise AssertionError("unreachable")


def lot_id(seed: int) -> str:
    """Name a lot by its seed."""
    return f"SIM{seed:06d}"


def write_image(folder: Path, image: LotImage) -> Path:
    """Place one image in a folder, whole: under a hidden name first, then renamed."""
    path = folder / image.name
    files.write_whole(path, image.content)
    return path


def write_lot(
    folder: Path,
    *,
    n: int,
    seed: int,
    stages: Sequence[str] = STAGES,
    defect_types: Sequence[str] | None = None,
    defect_free_share: float = 0.3,
    size_hw: tuple[int, int] = (1024, 1024),
    info_bar_share: float = 0.6,
    png_share: float = 0.2,
    layout_svg: Path | None = None,
    on_image: Callable[[int, Path], None] | None = None,
) -> LotManifest:
    """Write a lot with its truth into a folder; ``on_image(index, path)`` is called after each image.

    Raises:
        ConfigError: as ``lot_images``.
    """
    images = lot_images(
        n=n,
        seed=seed,
        stages=stages,
        defect_types=defect_types,
        defect_free_share=defect_free_share,
        size_hw=size_hw,
        info_bar_share=info_bar_share,
        png_share=png_share,
        layout_svg=layout_svg,
    )
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    sites: list[tuple[str, SyntheticMicrograph, tuple[Box, ...]]] = []
    for i, image in enumerate(images):
        _write_masks(folder / "masks", image)
        paths.append(write_image(folder, image))
        sites.append((image.name, image.micrograph, image.boxes_xyxy))
        if on_image is not None:
            on_image(i, paths[-1])
    labels_csv, klarf = folder / "labels.csv", folder / "LOT.klarf"
    files.write_whole(labels_csv, _labels_csv(sites).encode())
    files.write_whole(klarf, klarf_text(lot_id(seed), sites, FIRST_RECORDED, seed=seed).encode())
    return LotManifest(folder, lot_id(seed), tuple(paths), labels_csv, klarf, sum(len(b) for _, _, b in sites))


def _choices(stages: Sequence[str], defect_types: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Return the types that may occur, by stage."""
    known = {label for labels in DEFECT_TYPES.values() for label in labels}
    wrong = [stage for stage in stages if stage not in STAGES] + [t for t in defect_types or () if t not in known]
    if wrong or not stages:
        raise ConfigError(f"unknown stage or defect type {wrong}; stages: {list(STAGES)}, types: {sorted(known)}")
    chosen = {
        stage: tuple(t for t in DEFECT_TYPES[stage] if defect_types is None or t in defect_types) for stage in stages
    }
    if empty := [stage for stage, labels in chosen.items() if not labels]:
        raise ConfigError(f"none of the defect types belongs to {', '.join(empty)}; leave that stage out")
    return chosen


def _develop(
    stem: str, shown: SyntheticMicrograph, rng: np.random.Generator, *, barred: bool, png: bool, minutes: int
) -> LotImage:
    """Turn a rendered field into an image file, with its info bar and vendor tags."""
    recorded = FIRST_RECORDED + timedelta(minutes=minutes)
    detector, dark = str(rng.choice(DETECTORS)), bool(rng.random() < 0.6)
    page = shown.pixels
    if barred:
        text = recorded.strftime("%m/%d/%Y %H:%M")
        page = np.vstack([page, draw_info_bar(page.shape[1], shown.pixel_nm, text, detector, dark=dark)])
    page_hw = page.shape[0], page.shape[1]
    if png:
        return LotImage(f"{stem}.png", _png(page), shown, page_hw, recorded)
    return LotImage(f"{stem}.tif", _tiff(page, shown, recorded, detector), shown, page_hw, recorded)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def _tiff(page: NDArray[np.uint8], shown: SyntheticMicrograph, recorded: datetime, detector: str) -> bytes:
    """Encode an 8-bit TIFF with FEI's tag, where readers find the pixel size and the height of the field."""
    field_h, field_w = shown.pixels.shape
    pixel_m = shown.pixel_nm * 1e-9
    sections: dict[str, dict[str, object]] = {
        "User": {"Date": recorded.strftime("%m/%d/%Y"), "Time": recorded.strftime("%H:%M:%S")},
        "Beam": {"HV": HV_KV * 1000, "Beam": "EBeam"},
        "Scan": {"PixelWidth": pixel_m, "PixelHeight": pixel_m, "HorFieldsize": pixel_m * field_w},
        "Detectors": {"Number": 1, "Name": detector, "Mode": "SE"},
        "Image": {"DigitalContrast": 1, "ResolutionX": field_w, "ResolutionY": field_h},
    }
    text = "".join(
        f"[{section}]\r\n" + "".join(f"{key}={value}\r\n" for key, value in entries.items()) + "\r\n"
        for section, entries in sections.items()
    )
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, page, photometric="minisblack", metadata=None, extratags=[(FEI_TAG, "s", 0, text, True)])
    return buffer.getvalue()


def _box(mask: NDArray[np.bool_]) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _write_masks(folder: Path, image: LotImage) -> None:
    below = image.page_hw[0] - image.micrograph.pixels.shape[0]
    for k, mask in enumerate(image.micrograph.masks, start=1):
        page = np.pad(mask.astype(np.uint8) * np.uint8(255), ((0, below), (0, 0)))
        files.write_whole(folder / f"{Path(image.name).stem}_{k}.png", _png(page))


def _labels_csv(sites: Sequence[tuple[str, SyntheticMicrograph, tuple[Box, ...]]]) -> str:
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(["file", "defect", "label", "stage", "x0", "y0", "x1", "y1"])
    for name, shown, boxes in sites:
        if not boxes:
            rows.writerow([name, 0, DEFECT_FREE, shown.stage, "", "", "", ""])
        for k, (label, box) in enumerate(zip(shown.labels, boxes, strict=True), start=1):
            rows.writerow([name, k, label, shown.stage, *box])
    return buffer.getvalue()
