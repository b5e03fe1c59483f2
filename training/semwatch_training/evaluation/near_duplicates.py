"""Groups of near duplicates, so that no picture is on both sides of a split: the same pattern cut out, turned or
retouched once more.

Two pictures are near duplicates where, in one of the eight symmetries of the square, their perceptual hashes differ in
at most ``MAX_HASH_BITS`` of 64 bits and their thumbnails correlate by at least ``MIN_CORRELATION``. Either alone is
fooled: all arrays of lines hash alike, and a slow shading correlates with every other.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn
from scipy.sparse.csgraph import connected_components

THUMBNAIL_PX = 32
HASH_PX = 8
MAX_HASH_BITS = 12
MIN_CORRELATION = 0.9


def groups(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.intp]:
    """Number the groups of images (H, W), of any size: (n,). A duplicate of a duplicate is of the same group."""
    if not images:
        return np.zeros(0, np.intp)
    alike = near(images, images)
    return np.asarray(connected_components(alike | alike.T, directed=False)[1], np.intp)


def near(images: Sequence[NDArray[np.uint8]], others: Sequence[NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """Which images are near duplicates of which others: (n, m)."""
    alike = np.zeros((len(images), len(others)), np.bool_)
    if not alike.size:
        return alike
    thumbnails, of_others = (np.stack([_thumbnail(image) for image in some]) for some in (images, others))
    hashes, vectors = _hashes(thumbnails), _unit(thumbnails)
    for turns in range(4):
        for flipped in (False, True):
            turned = np.rot90(of_others, turns, axes=(1, 2))
            turned = turned[:, :, ::-1] if flipped else turned
            bits = (hashes[:, None] != _hashes(turned)[None]).sum(axis=2)
            alike |= (bits <= MAX_HASH_BITS) & (vectors @ _unit(turned).T >= MIN_CORRELATION)
    return alike


def _thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    shrunk = cv2.resize(image, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    return shrunk.astype(np.float32)


def _hashes(thumbnails: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(n, 64): which of the lowest frequencies of the cosine transform lie above their median."""
    low = dctn(thumbnails, axes=(1, 2), norm="ortho")[:, :HASH_PX, :HASH_PX].reshape(len(thumbnails), -1)
    low[:, 0] = 0  # the mean gray says nothing
    return np.asarray(low > np.median(low, axis=1, keepdims=True))


def _unit(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, p): without their mean and of unit length; constant pictures are alike among themselves."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    constant = length[:, 0] < 1e-3
    centred[constant], length[constant] = 1.0, np.sqrt(flat.shape[1])
    unit: NDArray[np.float32] = centred / length
    return unit
