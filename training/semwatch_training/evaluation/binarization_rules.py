"""How well rules turn score maps into masks: the plateau, a fixed threshold, Otsu, the literal rule of the paper."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch import binarization
from semwatch.errors import ConfigError
from semwatch_training.evaluation.report import Table
from semwatch_training.metrics.uncertainty import Spread

RULES: tuple[binarization.Method, ...] = ("plateau", "fixed", "otsu", "literal")


def mask_iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Intersection over union of a mask (g, g) with the true mask (H, W), at the mask's grid; 1 if both are empty.

    A cell is truly defective when half of it is; a defect too thin for that keeps its most covered cells.
    """
    share = cv2.resize(truth.astype(np.float32), mask.shape[::-1], interpolation=cv2.INTER_AREA)
    wanted = (share > 0) & (share >= min(0.5, float(share.max())))
    union = int((mask | wanted).sum())
    return float((mask & wanted).sum() / union) if union else 1.0


def mask_iou_table(
    maps: Sequence[NDArray[np.float32]], truths: Sequence[NDArray[np.bool_]], *, title: str, floor: float = 0.1
) -> Table:
    """Mean IoU of each rule's mask with the truth over defective fields, and the share whose IoU passes ``floor``.

    Raises:
        ConfigError: no field has a true mask.
    """
    pairs = [(m, t) for m, t in zip(maps, truths, strict=True) if t.any()]
    if not pairs:
        raise ConfigError("no field has a true mask: masks cannot be judged")
    rows = []
    for rule in RULES:
        found = np.array([mask_iou(binarization.binarize(m, method=rule).mask, t) for m, t in pairs])
        rows.append((rule, Spread.of(found), float((found > floor).mean())))
    note = f"{len(pairs)} defective fields, gate open; the spread is over fields."
    return Table(
        f"Masks from the maps of {title}", ("rule", "IoU with the truth", f"IoU over {floor}"), tuple(rows), note
    )
