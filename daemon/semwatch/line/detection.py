"""Micrograph to score map and raw image score, at the detector's own scale or at the field's."""

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box, ScoreMap
from semwatch.errors import ServiceUnavailable
from semwatch.line import inputs
from semwatch.line.scaling import resize
from semwatch.models.contract import FIELD_FEATURES, FIELD_SIDES_PX, PATCH_FEATURES
from semwatch.models.inference import Answer, ModelId, Models
from semwatch.models.model_repository import Arrays, Meta

OVERLAP_PX = 128
"""Of neighbouring tiles, at least: half of it is farther than the trunk's features carry."""
SHORT_SIDE_PX = 448
"""A smaller field is enlarged until its shorter side has so many pixels: what branches are trained at."""


def detect(field: NDArray[np.uint8], models: Models, *, coarser: float = 1.0) -> tuple[ScoreMap, ModelId]:
    """Score one field of view.

    A detector that takes a field at any size is given it at its own scale, in overlapping tiles where it is large; any
    other is given the whole field, resized. Either way the map covers the field edge to edge.

    Args:
        field: (H, W) gray.
        models: where the detector answers.
        coarser: how many pixels of the field one pixel of an open detector's input stands for; 1: as it is.

    Returns:
        The score map, and which detector gave it.

    Raises:
        ServiceUnavailable: the models are away, or the detector was swapped between two tiles.
    """
    meta = models.meta("detector")
    if not meta.inputs["image"].is_open:
        answer = models.infer("detector", inputs.for_detector(meta, field))
        return _read(answer), answer.id
    answered: set[ModelId] = set()

    def ask(tile: NDArray[np.uint8]) -> ScoreMap:
        answer = models.infer("detector", inputs.for_detector(meta, tile))
        answered.add(answer.id)
        return _read(answer)

    found = own_scale(field, ask, coarser=coarser)
    if len(answered) > 1:
        raise ServiceUnavailable("the detector was swapped between two tiles of a field")
    return found, answered.pop()


def asked(detector: Meta, field: NDArray[np.uint8]) -> list[Arrays]:
    """What a detector is given of a field (H, W), one after another: the whole of it, or its tiles."""
    if not detector.inputs["image"].is_open:
        return [inputs.for_detector(detector, field)]
    shown = resize(field, scaled_size(field.shape))
    return [inputs.for_detector(detector, shown[y0:y1, x0:x1]) for x0, y0, x1, y1 in tiles(shown.shape)]


def _read(answer: Answer) -> ScoreMap:
    outputs = answer.outputs
    domain_p = float(outputs["domain_p"][0]) if "domain_p" in outputs else None
    of_field, of_patches = (outputs[name][0] if name in outputs else None for name in (FIELD_FEATURES, PATCH_FEATURES))
    return ScoreMap(outputs["score_map"][0], float(outputs["raw_score"][0]), domain_p, of_field, of_patches)


def own_scale(
    field: NDArray[np.uint8], ask: Callable[[NDArray[np.uint8]], ScoreMap], *, coarser: float = 1.0
) -> ScoreMap:
    """Score a field (H, W) at its own scale by a detector that takes tiles, sides as in ``scaled_size``, gray."""
    shown = resize(field, scaled_size(field.shape, coarser=coarser))
    boxes = list(tiles(shown.shape))
    return joined([ask(shown[y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes], boxes, shown.shape)


def scaled_size(size_hw: tuple[int, ...], *, coarser: float = 1.0) -> tuple[int, int]:
    """The size (h, w) at which an open detector sees a field of ``size_hw``: both sides multiples of 16.

    Both axes have the same scale, but for the rounding to 16 pixels. A field whose shorter side is under
    ``SHORT_SIDE_PX`` is enlarged to it, unless its longer side would no longer fit into one tile.

    >>> scaled_size((1024, 1024)), scaled_size((52, 52)), scaled_size((64, 4096)), scaled_size((1000, 700), coarser=2)
    ((1024, 1024), (448, 448), (64, 4096), (640, 448))
    """
    sides = FIELD_SIDES_PX
    shorter, longer = min(size_hw), max(size_hw)
    enlarged = min(SHORT_SIDE_PX / shorter, max(sides.largest / longer, 1.0))
    scale = max(1 / coarser, enlarged)
    height, width = (max(sides.smallest, round(n * scale / sides.multiple) * sides.multiple) for n in size_hw[:2])
    return height, width


def tiles(size_hw: tuple[int, ...]) -> Iterator[Box]:
    """Cover a field of ``size_hw``, multiples of 16, with overlapping boxes that a detector takes, of one size.

    >>> list(tiles((448, 1600)))
    [(0, 0, 864, 448), (736, 0, 1600, 448)]
    """
    rows, columns = (_spans(n) for n in size_hw[:2])
    yield from ((x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns)


def _spans(length: int) -> list[tuple[int, int]]:
    sides = FIELD_SIDES_PX
    if length <= sides.largest:
        return [(0, length)]
    n = math.ceil((length - OVERLAP_PX) / (sides.largest - OVERLAP_PX))
    side = math.ceil((length + (n - 1) * OVERLAP_PX) / n / sides.multiple) * sides.multiple
    starts = (round(k * (length - side) / (n - 1) / sides.multiple) * sides.multiple for k in range(n))
    return [(start, start + side) for start in starts]


def joined(found: list[ScoreMap], boxes: list[Box], size_hw: tuple[int, ...]) -> ScoreMap:
    """Join the maps of tiles: where they overlap, each counts the more the farther its own border is.

    The raw score is the highest of the tiles'; the field is of a known process as far as its tiles are on average, and
    what is said of it is the tiles' average too.
    """
    if len(found) == 1:
        return found[0]
    known = [one.domain_p for one in found if one.domain_p is not None]
    of_fields = [one.field_features for one in found if one.field_features is not None]
    of_patches = [one.patch_features for one in found if one.patch_features is not None]
    return ScoreMap(
        values=_blended([one.values for one in found], boxes, size_hw),
        raw_score=max(one.raw_score for one in found),
        domain_p=sum(known) / len(known) if known else None,
        field_features=np.mean(of_fields, axis=0, dtype=np.float32) if of_fields else None,
        patch_features=_blended(of_patches, boxes, size_hw) if of_patches else None,
    )


def _blended(maps: list[NDArray[np.float32]], boxes: list[Box], size_hw: tuple[int, ...]) -> NDArray[np.float32]:
    """One map (..., H, W) of the maps (..., h, w) of tiles."""
    *leading, h, w = maps[0].shape
    cell = (boxes[0][2] - boxes[0][0]) // w
    total = np.zeros((*leading, size_hw[0] // cell, size_hw[1] // cell), np.float32)
    weight = np.zeros(total.shape[-2:], np.float32)
    inner = np.minimum.outer(_ramp(h, cell), _ramp(w, cell)).astype(np.float32)
    for one, (left, top, _, _) in zip(maps, boxes, strict=True):
        part = slice(top // cell, top // cell + h), slice(left // cell, left // cell + w)
        total[..., part[0], part[1]] += inner * one
        weight[part] += inner
    return np.asarray(total / weight, np.float32)


def _ramp(n: int, cell_px: int) -> NDArray[np.float64]:
    """1, 2, ... from either end of n cells, at most half the overlap."""
    return np.minimum(np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)), OVERLAP_PX / 2 / cell_px)
