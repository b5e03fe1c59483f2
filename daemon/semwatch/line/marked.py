"""Crops of defects that somebody has marked: cut as the line cuts what it finds itself."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box, Micrograph
from semwatch.line import binarization, detection, inputs
from semwatch.line.pipeline import Candidate, cut_out, search
from semwatch.models.inference import ModelId, Models
from semwatch.settings.recipe import Recipe

CELL_PX = 8
"""Of a map at the field's own scale."""
SAME = 0.5
"""Intersection over union from which a region that the search finds is the marked one."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One marked defect as encoder and learning see it."""

    candidate: Candidate
    features: NDArray[np.float32]
    """(D,)"""
    encoder: ModelId


def given(truth: NDArray[np.bool_], page: Micrograph, recipe: Recipe, models: Models) -> Candidate:
    """Cut out a defect along its true mask (H, W), with the mask's own blur at the working grid as its heat.

    The detector is asked only where the encoder wants to hear what it says.

    Raises:
        ValueError: the mask marks nothing.
    """
    map_hw = detection.scaled_size(truth.shape)
    grid = binarization.grid_hw((map_hw[0] // CELL_PX, map_hw[1] // CELL_PX), grid_px=recipe.binarization.grid_px)
    heat: NDArray[np.float32] = np.asarray(
        cv2.resize(truth.astype(np.float32), grid[::-1], interpolation=cv2.INTER_AREA), np.float32
    )
    height, width = truth.shape
    (region,) = binarization.regions(heat > 0, heat, size_hw=(height, width), merge_fraction=1.0, max_regions=1)
    answer = detection.detect(page.field, models)[0] if inputs.listens(models.meta("encoder")) else None
    return cut_out((region,), page, heat / heat.max(), recipe, models, answer)[0]


def encoded(boxes_xyxy: list[Box], page: Micrograph, recipe: Recipe, models: Models) -> list[Encoded | None]:
    """Cut and encode marked defects of one page: as the region that the search finds there, else along the box.

    Args:
        boxes_xyxy: half-open, in pixels of the page as read.
        page: the page.
        recipe: how to search; its gate is left open.
        models: detector and encoder.

    Returns:
        One for each box; None where it lies outside the field.

    Raises:
        ServiceUnavailable: the models are away.
        ImageError: the detector cannot judge the page.
    """
    opened = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    found = search(page, opened, models).candidates
    height, width = page.field.shape
    left, top = page.field_xyxy[:2]
    chosen: list[Candidate | None] = []
    for x0, y0, x1, y1 in boxes_xyxy:
        box = max(0, x0 - left), max(0, y0 - top), min(width, x1 - left), min(height, y1 - top)
        if box[0] >= box[2] or box[1] >= box[3]:
            chosen.append(None)
            continue
        best = max(found, key=lambda one: _overlap(one.region.box_xyxy, box), default=None)
        if best is None or _overlap(best.region.box_xyxy, box) < SAME:
            truth = np.zeros((height, width), np.bool_)
            truth[box[1] : box[3], box[0] : box[2]] = True
            best = given(truth, page, recipe, models)
        chosen.append(best)
    asked = [one for one in chosen if one is not None]
    if not asked:
        return [None] * len(chosen)
    answer = models.infer("encoder", inputs.for_encoder(models.meta("encoder"), asked))
    rows = iter(answer.outputs["features"])
    return [None if one is None else Encoded(one, next(rows), answer.id) for one in chosen]


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union of two half-open boxes.

    >>> _overlap((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333333333333
    """
    common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    both = math.prod((a[2] - a[0], a[3] - a[1])) + math.prod((b[2] - b[0], b[3] - b[1])) - common
    return common / both if both else 0.0
