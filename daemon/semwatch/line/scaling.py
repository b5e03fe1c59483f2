"""Resizing that passes over no pixel."""

import cv2
import numpy as np
from numpy.typing import NDArray


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
