"""Searched crops: what the daemon finds in images whose defects are known, and which defects it never shows anyone.

Crops cut along true masks judge heads; only searched ones, behind the gate that will be served, can tell an escape.
Every image is searched with an open gate and its raw score kept, so that one search answers for every gate; defects
that the search missed are cut out along their true masks, as heads learn from them (``labelled_crops.collect``).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, Micrograph
from semwatch.errors import ConfigError
from semwatch.line.marked import given
from semwatch.line.pipeline import search
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data.datasets import Sample, load_gray, load_mask, synthetic_set
from semwatch_training.discovery.labelled_crops import NOT_A_DEFECT, Crops, encode, shown_defect
from semwatch_training.metrics.uncertainty import Rate
from semwatch_training.synthetic import STAGES


class MarkedField(NamedTuple):
    """A field of view (H, W) uint8, the labels of its d defects, and where each lies (d, H, W)."""

    image: NDArray[np.uint8]
    labels: tuple[str, ...]
    masks: NDArray[np.bool_]
    pixel_nm: float | None


@dataclass(frozen=True, slots=True, eq=False)
class SearchedCrops:
    """All crops of a search with an open gate, and of the defects that it missed."""

    crops: Crops
    """Labelled by the defect they show, or as defect-free."""
    defect_idx: NDArray[np.intp]
    """(n,) the defect that a crop shows, or ``NOT_A_DEFECT``."""
    by_search: NDArray[np.bool_]
    """(n,) False where a crop was cut along the true mask."""
    defects: tuple[str, ...]
    """Labels of all true defects."""
    defect_image: NDArray[np.intp]
    """Image of each defect."""
    raw_scores: NDArray[np.float32]
    """Of the images."""


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What a gate lets through: every true defect once, as a crop or as missed, and every false region."""

    judged: NDArray[np.bool_]
    """(n,) the largest crop of each defect that is seen, and all seen crops that show none."""
    missed: tuple[str, ...]
    """Labels of the defects that no seen crop shows."""
    normals_opened: Rate | None
    """Of the images without a defect; None where there is none."""


def marked_synthetic(per_type: int, *, first_seed: int, side_px: int = 768) -> Iterator[MarkedField]:
    """Render as many fields of each type, and normal ones of each stage, as ``per_type`` says."""
    for stage in STAGES:
        for made in synthetic_set(
            stage, n_normal=per_type, n_per_type=per_type, first_seed=first_seed, side_px=side_px
        ):
            yield MarkedField(made.pixels, made.labels, made.masks, made.pixel_nm)


def marked_samples(samples: Sequence[Sample]) -> Iterator[MarkedField]:
    """Read labelled images, one field per file; images with a defect whose mask marks nothing are left out."""
    of_image: dict[Path, list[Sample]] = {}
    for sample in samples:
        of_image.setdefault(sample.image, []).append(sample)
    for shown in of_image.values():
        image = load_gray(shown[0])
        size_hw = image.shape[0], image.shape[1]
        defects = [sample for sample in shown if sample.label != DEFECT_FREE]
        masks = np.array([load_mask(s, size_hw) for s in defects], np.bool_).reshape(-1, *size_hw)
        if masks.any(axis=(1, 2)).all():
            yield MarkedField(image, tuple(sample.label for sample in defects), masks, None)


def search_marked(
    models: Embedded,
    recipe: Recipe,
    fields: Iterable[MarkedField],
    n: int,
    *,
    progress: Callable[[str, int, int], None],
) -> SearchedCrops:
    """Search n fields with an open gate and encode all that is found, and all that was missed.

    Raises:
        ConfigError: there is no field.
    """
    opened = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    features, labels, image_idx, area_px, defect_idx, by_search = [], [], [], [], [], []
    defects: list[str] = []
    defect_image: list[int] = []
    raw: list[float] = []
    for index, field in enumerate(fields):
        height, width = field.image.shape
        page = Micrograph(field.image, (0, 0, width, height), 0, field.pixel_nm, None)
        found = search(page, opened, models)
        shown = [shown_defect(candidate, field.masks) for candidate in found.candidates]
        missed = [i for i in range(len(field.labels)) if i not in shown and field.masks[i].any()]
        cut = [given(field.masks[i], page, opened, models) for i in missed]
        for position, (candidate, number) in enumerate(zip((*found.candidates, *cut), (*shown, *missed), strict=True)):
            features.append(encode(candidate, models))
            labels.append(DEFECT_FREE if number == NOT_A_DEFECT else field.labels[number])
            image_idx.append(index)
            area_px.append(candidate.region.area_px)
            defect_idx.append(NOT_A_DEFECT if number == NOT_A_DEFECT else len(defects) + number)
            by_search.append(position < len(shown))
        defects += field.labels
        defect_image += [index] * len(field.labels)
        raw.append(found.score_map.raw_score)
        progress("search", index + 1, n)
    if not features:
        raise ConfigError("there is no image to search; give some whose defects have masks that mark them")
    crops = Crops(np.stack(features), tuple(labels), np.array(image_idx), np.array(area_px), {}, {})
    return SearchedCrops(
        crops,
        np.array(defect_idx, np.intp),
        np.array(by_search),
        tuple(defects),
        np.array(defect_image, np.intp),
        np.array(raw, np.float32),
    )


def behind_gate(found: SearchedCrops, threshold: float) -> Outcome:
    """Tell what a reviewer is shown where the gate opens above ``threshold``; a defect found twice counts once."""
    seen = found.by_search & (found.raw_scores > threshold)[found.crops.image_idx]
    judged = seen & (found.defect_idx == NOT_A_DEFECT)
    missed = []
    for number, label in enumerate(found.defects):
        rows = np.flatnonzero(seen & (found.defect_idx == number))
        if len(rows):
            judged[rows[found.crops.area_px[rows].argmax()]] = True
        else:
            missed.append(label)
    normal = np.ones(len(found.raw_scores), np.bool_)
    normal[found.defect_image] = False
    n_opened = int((found.raw_scores[normal] > threshold).sum())
    return Outcome(judged, tuple(missed), Rate.of(n_opened, int(normal.sum())) if normal.any() else None)


def save(found: SearchedCrops, path: Path) -> None:
    """Keep a search, which takes most of the time of an evaluation."""
    with path.open("wb") as file:
        np.savez(
            file,
            features=found.crops.features,
            labels=np.array(found.crops.labels),
            image_idx=found.crops.image_idx,
            area_px=found.crops.area_px,
            defect_idx=found.defect_idx,
            by_search=found.by_search,
            defects=np.array(found.defects, np.str_),
            defect_image=found.defect_image,
            raw_scores=found.raw_scores,
        )


def load(path: Path) -> SearchedCrops:
    """Read what ``save`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        labels = tuple(file["labels"].tolist())
        return SearchedCrops(
            Crops(file["features"], labels, file["image_idx"], file["area_px"], {}, {}),
            file["defect_idx"],
            file["by_search"],
            tuple(file["defects"].tolist()),
            file["defect_image"],
            file["raw_scores"],
        )
