"""Micrograph to score map and raw image score."""

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.defects import ScoreMap
from semwatch.models.contract import FIELD_FEATURES
from semwatch.models.inference import ModelId, Models
from semwatch.models.model_repository import Arrays


def detect(inputs: Arrays, models: Models) -> tuple[ScoreMap, ModelId]:
    """Score one field of view.

    The field is resized, not cropped, to the detector's input: a defect at the border counts as much as any other, and
    the score map covers the field edge to edge (each axis with its own scale).

    Args:
        inputs: what the detector asks for, see ``inputs.for_detector``.
        models: where the detector answers.

    Returns:
        The score map, and which detector gave it.

    Raises:
        ServiceUnavailable: the models are away.
    """
    answer = models.infer("detector", inputs)
    values = answer.outputs["score_map"][0]
    of_field = answer.outputs[FIELD_FEATURES][0] if FIELD_FEATURES in answer.outputs else None
    return ScoreMap(values, float(answer.outputs["raw_score"][0]), of_field), answer.id


def resize(field: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize (H, W) uint8 gray to ``size_hw``: an axis that shrinks is averaged, so that no pixel goes unseen.

    An axis that grows is interpolated. Where one shrinks and the other grows, each goes by its own rule in turn: OpenCV
    would sample both, and pass over most of the one that shrinks.
    """
    (H, W), (height, width) = field.shape, size_hw
    if (H - height) * (W - width) < 0:
        between_wh = (min(W, width), min(H, height))
        averaged = cv2.resize(field, between_wh, interpolation=cv2.INTER_AREA)
        resized = cv2.resize(averaged, (width, height), interpolation=cv2.INTER_LINEAR)
    else:
        is_shrinking = height <= H and width <= W
        interpolation = cv2.INTER_AREA if is_shrinking else cv2.INTER_LINEAR
        resized = cv2.resize(field, (width, height), interpolation=interpolation)
    return np.ascontiguousarray(resized, dtype=np.uint8)
