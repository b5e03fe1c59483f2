"""How well rules turn score maps into masks: the plateau, a fixed threshold, Otsu, the literal rule of the paper."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.line import binarization
from semwatch.settings.recipe import Method
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.metrics.uncertainty import Spread

NAMES: dict[Method, str] = {
    "fixed": "0.5",
    "otsu": "Otsu",
    "literal": "the paper's, as printed",
    "lowest": "lowest of the plateau (MEBin)",
    "plateau": "ours (middle of the plateau)",
}
RULES = tuple(NAMES)


def mask_iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Intersection over union of a mask (g, g) with the true mask (H, W), at the mask's grid; 1 if both are empty.

    A cell is truly defective when half of it is; a defect too thin for that keeps its most covered cells.
    """
    share = cv2.resize(truth.astype(np.float32), mask.shape[::-1], interpolation=cv2.INTER_AREA)
    wanted = (share > 0) & (share >= min(0.5, float(share.max())))
    union = int((mask | wanted).sum())
    return float((mask & wanted).sum() / union) if union else 1.0


def count_error(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> int:
    """How many regions, 8-connected, a mask (g, g) has more or fewer than the true mask (H, W)."""
    return abs(_n_regions(mask) - _n_regions(truth))


def _n_regions(mask: NDArray[np.bool_]) -> int:
    return int(cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0]) - 1


def mask_table(
    groups: Mapping[str, tuple[Sequence[NDArray[np.float32]], Sequence[NDArray[np.bool_]]]],
    *,
    title: str,
    floor: float = 0.1,
) -> Table:
    """Judge each rule's masks over the defective fields of each group: IoU with the truth and error of the count.

    Args:
        groups: score maps (h, w) and true masks (H, W), by name, such as that of a process stage.
        title: of the table.
        floor: IoU over which a mask points at its defect.

    Raises:
        ConfigError: no field of a group has a true mask.
    """
    rows: list[tuple[Cell, ...]] = []
    n = 0
    for group, (maps, truths) in groups.items():
        pairs = [(m, t) for m, t in zip(maps, truths, strict=True) if t.any()]
        if not pairs:
            raise ConfigError(f"no field of {group} has a true mask: masks cannot be judged")
        n += len(pairs)
        for rule in RULES:
            masks = [binarization.binarize(m, method=rule).mask for m, _ in pairs]
            found = np.array([mask_iou(mask, t) for mask, (_, t) in zip(masks, pairs, strict=True)])
            errors = [count_error(mask, t) for mask, (_, t) in zip(masks, pairs, strict=True)]
            rows.append((group, NAMES[rule], Spread.of(found), float((found > floor).mean()), Spread.of(errors)))
    note = (
        f"{n} defective fields, gate open; spread over fields. The count error is in regions, 0 is best; it is 1 where "
        f"a mask is empty and there is one defect."
    )
    return Table(
        title, ("maps of", "rule", "IoU with the truth", f"IoU over {floor}", "count error"), tuple(rows), note
    )
