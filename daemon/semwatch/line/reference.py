"""An inspected page against a reference of the same place: register, compare, score.

    inspected, reference -> registration -> aligned reference, overlap -> difference -> score_map

What both images show is layout; what only one of them shows is a defect. So a page with a valid reference needs no
likeness within itself, which a logic layout does not have.

The difference alone decides: taken together with the detector's map it found less, see ``docs/reference.md``.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Micrograph, Reference, ScoreMap
from semwatch.line.difference import compare, match_gray
from semwatch.line.registration import register
from semwatch.settings.recipe import Recipe
from semwatch.settings.recipe import Reference as Rule

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

Compared = tuple[ScoreMap | None, Reference | None]
"""What ``compared`` returns."""

_RULE = Recipe().reference
"""Where nothing is said, the default recipe holds."""
GOES_ON = 0.7
"""Share of the threshold above which a defect goes on."""
MAX_PLACES = 16
"""A reference that differs in more places shows another place; ``register`` cannot see it where a layout repeats."""


@dataclass(frozen=True, slots=True, eq=False)
class Differing:
    """What differs, on the working grid."""

    mask: Bools
    """(g, g) True on defects."""
    values: Floats
    """(g, g) the difference map, no maximum of it lost."""
    saliency: Floats
    """(g, g) in [0, 1]."""


def compared(page: Micrograph, given: tuple[str, Micrograph | None, str] | None, rule: Rule = _RULE) -> Compared:
    """Compare a page with its reference.

    Args:
        page: the inspected page.
        given: name of the reference, the reference, and why there is none; None where none is asked for.
        rule: the recipe's.

    Returns:
        The difference as a score map, None where the page must be judged alone; and what became of the reference, None
        where none was asked for.
    """
    if given is None:
        return None, None
    name, other, reason = given
    if other is None:
        return None, Reference(name, reason)
    met = register(page.field, other.field, max_shift=rule.max_shift, min_correlation=rule.min_correlation)
    if met.aligned is None or met.overlap is None:
        return None, Reference(name, met.reason, met.shift_px, met.correlation)
    values = compare(page.field, met.aligned, met.overlap, threshold=rule.threshold)
    n_places = _count(values > rule.threshold)
    if n_places > MAX_PLACES:
        reason = f"another place: the images differ in {n_places} places, over {MAX_PLACES}"
        return None, Reference(name, reason, met.shift_px, met.correlation)
    matched = match_gray(page.field.astype(np.float32), met.aligned, met.overlap)
    shown = np.clip(np.rint(matched), 0, 255).astype(np.uint8)
    difference = ScoreMap(values, float(values.max()))
    return difference, Reference(name, "", met.shift_px, met.correlation, shown, met.overlap)


def binarize(values: Floats, *, threshold: float, grid_px: int) -> Differing:
    """Return what differs on the working grid (g, g): places above the threshold, with what hangs on to them.

    A place goes on as far as the difference stays above ``GOES_ON`` thresholds (hysteresis, Canny 1986).
    """
    shown = _on_grid(values, grid_px)
    low = GOES_ON * threshold
    _, labels = cv2.connectedComponents((shown > low).view(np.uint8), connectivity=8)
    is_defect = np.zeros(int(labels.max()) + 1, np.bool_)
    is_defect[labels[shown > threshold]] = True
    is_defect[0] = False
    saliency = np.clip((shown - low) / (2 * threshold - low), 0, 1)
    return Differing(is_defect[labels], shown, np.asarray(saliency, np.float32))


def _on_grid(values: Floats, grid_px: int) -> Floats:
    """Return a map (h, w) on a grid (g, g): a grid cell has the largest value of the cells that it touches."""
    h, w = values.shape
    rows, columns = ((np.arange(grid_px) * n // grid_px, -(-(np.arange(grid_px) + 1) * n // grid_px)) for n in (h, w))
    by_row = np.stack([values[first:last].max(axis=0) for first, last in zip(*rows, strict=True)])
    return np.stack([by_row[:, first:last].max(axis=1) for first, last in zip(*columns, strict=True)], axis=1)


def _count(mask: Bools) -> int:
    return int(cv2.connectedComponents(mask.view(np.uint8), connectivity=8)[0]) - 1
