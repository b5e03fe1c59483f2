"""Micrograph to score map and raw image score."""

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import ScoreMap
from semwatch.models.inference import Models
from semwatch.models.model_repository import Arrays


def detect(inputs: Arrays, models: Models) -> tuple[ScoreMap, int]:
    """Score one field of view.

    The field is resized, not cropped, to the detector's input: a defect at the border counts as much as any other, and
    the score map covers the field edge to edge (each axis with its own scale).

    Args:
        inputs: what the detector asks for, see ``inputs.for_detector``.
        models: where the detector answers.

    Returns:
        The score map and the detector's version.

    Raises:
        ServiceUnavailable: the models are away.
    """
    answer = models.infer("detector", inputs)
    values = answer.outputs["score_map"][0]
    return ScoreMap(values=values, raw_score=float(answer.outputs["raw_score"][0])), answer.version


def resize(field: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize (H, W) uint8 gray to ``size_hw``, averaging areas when shrinking so that no pixel goes unseen."""
    shrinking = field.shape[0] >= size_hw[0] and field.shape[1] >= size_hw[1]
    resized = cv2.resize(field, size_hw[::-1], interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return np.ascontiguousarray(resized, dtype=np.uint8)
