"""Few-shot training: many views of a few normal images stand in for the many images that a new process has not got."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.line.scaling import resize


def few_shot_images(
    images: Sequence[NDArray[np.uint8]], seed: int, *, views: int = 22, size_px: int = 448
) -> list[NDArray[np.uint8]]:
    """Make ``views`` training images of each of k normal ones: (k * views) of (size_px, size_px) uint8.

    The first is the image itself; then the eight turns and mirrorings, shifted by up to an eighth, seen a little
    nearer, with other contrast and brightness. What a shift uncovers is mirrored.

    Args:
        images: k normal micrographs (H, W) uint8, often 1 or 4.
        seed: of the views.
        views: 22 as the parent's.
        size_px: the detector's input size.

    Raises:
        ConfigError: no image, or fewer than one view.
    Source: INP-Former's few-shot recipe (22 views of a shot: rotations, shifts, flip, gray).
    """
    if not images or views < 1:
        raise ConfigError(f"few-shot training needs an image and a view; there are {len(images)} and {views}")
    rng = np.random.default_rng(seed)
    made = []
    for image in images:
        square = resize(image, (size_px, size_px))
        made += [square, *(_shot_view(square, index, rng) for index in range(1, views))]
    return made


def _shot_view(square: NDArray[np.uint8], index: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    side = square.shape[0]
    turned = np.rot90(square, index % 4)
    if index // 4 % 2:
        turned = turned[:, ::-1]
    zoom, (dx, dy) = rng.uniform(1.0, 1.2), rng.uniform(-side / 8, side / 8, 2)
    corner = (1 - zoom) * (side - 1) / 2
    affine = np.array([[zoom, 0, corner + dx], [0, zoom, corner + dy]])
    moved = cv2.warpAffine(np.ascontiguousarray(turned), affine, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    level = (moved.astype(np.float32) - 128) * rng.uniform(0.8, 1.2) + 128 + rng.uniform(-15, 15)
    return np.asarray(np.clip(np.rint(level), 0, 255), np.uint8)
