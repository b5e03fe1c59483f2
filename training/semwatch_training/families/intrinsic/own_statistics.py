"""Statistics of an image's own features: what is unusual *in this image*, without a weight and without a normal image.

Two of them. A robust Gaussian of all places, which sees what no linear combination of the usual explains; and the
distance to the nearest like place, which follows patterns whose places lie on a curve rather than in a cloud, as those
of printed lines do. Both are plain matrix products of fixed depth, so that ONNX, TensorRT and Triton take them, and
both work at any size of the image.

Source: IC-DefectNCD's image-intrinsic priors; Mahalanobis distance of one Gaussian (Rippel et al. 2020) fitted on the
image itself; concentration steps on its most typical places (Rousseeuw and Van Driessen 1999); inverse by Newton and
Schulz (Schulz 1933); like places as MuSc between images (Li et al. 2024).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

SHRINKAGE = 0.05
"""Share of the mean variance in the covariance: the inverse stays tame however few places there are."""
FITTED = 61
"""The Gaussian is fitted on so many places a side, spread evenly: more say nothing new, and cost as the field grows.

A prime number: the steps of no other size then end between two places, where runtimes round differently.
"""
REFITS = 3
TYPICAL = 0.8
"""Share of the places that the Gaussian is refitted on."""
INVERSE_STEPS = 16
"""Enough for a condition of 4,000 in float32: every step doubles the digits, the first ten only find the scale."""


def places(maps: Sequence[Tensor]) -> Tensor:
    """One feature vector of each 8 x 8 px place: (B, C, h, w).

    Args:
        maps: of stages at strides 4, 8 and 16: (B, C1, 2h, 2w), (B, C2, h, w), (B, C3, h / 2, w / 2).

    Returns:
        Each stage averaged over 3 x 3 places and of unit length, side by side.
    """
    fine, middle, coarse = maps
    size = middle.shape[2:]
    parts = (
        functional.avg_pool2d(fine, 2),
        middle,
        functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False),
    )
    return torch.cat([functional.normalize(smooth(part), dim=1) for part in parts], dim=1)


def smooth(x: Tensor) -> Tensor:
    """Average (B, C, h, w) over 3 x 3 places; the border is repeated outside."""
    return functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def mahalanobis(x: Tensor) -> Tensor:
    """Distance of each place (B, C, h, w), see ``places``, to a robust Gaussian of its image: (B, 1, h, w).

    In mean distances of the image.
    """
    size = x.shape[2:]
    cells = x.flatten(2).transpose(1, 2)
    known = functional.interpolate(x, size=(FITTED, FITTED), mode="nearest").flatten(2).transpose(1, 2)
    weights = torch.ones_like(known[..., :1])
    for _ in range(REFITS):
        squared = _squared_distances(known, *_gaussian(known, weights))
        weights = typical(squared)
    squared = _squared_distances(cells, *_gaussian(known, weights))
    distance = squared.clamp_min(0).sqrt()
    distance = distance / distance.mean(dim=1, keepdim=True).clamp_min(1e-6)
    return distance.transpose(1, 2).reshape(x.shape[0], 1, *size)


def typical(squared: Tensor) -> Tensor:
    """Weight 1 for the ``TYPICAL`` share of squared distances (B, ``FITTED``^2, 1) that is smallest, 0 for the rest."""
    # Of the rest, which are few: TensorRT sorts no more than 3,840 values.
    n_rest = round((1 - TYPICAL) * FITTED**2)
    largest = squared.topk(n_rest + 1, dim=1).values[:, n_rest:]
    return (squared <= largest).to(squared.dtype)


def _gaussian(cells: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean (B, 1, C) and inverse of the shrunk covariance (B, C, C) of cells (B, N, C)."""
    total = weights.sum(dim=1, keepdim=True)
    mean = (weights * cells).sum(dim=1, keepdim=True) / total
    centred = cells - mean
    covariance = (centred * weights).transpose(1, 2) @ centred / total
    identity = torch.eye(cells.shape[2], device=cells.device, dtype=cells.dtype)
    mean_variance = (covariance * identity).sum(dim=(1, 2), keepdim=True) / cells.shape[2]
    floor = SHRINKAGE * mean_variance + 1e-9  # a constant image has no spread at all
    return mean, inverse((1 - SHRINKAGE) * covariance + floor * identity, floor)


def inverse(matrix: Tensor, smallest: Tensor) -> Tensor:
    """Inverse of symmetric positive matrices (B, C, C) whose eigenvalues are at least ``smallest`` (B, 1, 1).

    By products alone: X becomes X (2 I - A X), started so that all eigenvalues of A X lie in (0, 2).
    """
    identity = torch.eye(matrix.shape[2], device=matrix.device, dtype=matrix.dtype)
    largest = matrix.abs().sum(dim=2, keepdim=True).amax(dim=1, keepdim=True)
    found = identity * (2 / (largest + smallest))
    for _ in range(INVERSE_STEPS):
        found = found @ (2 * identity - matrix @ found)
    return found


def _squared_distances(cells: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    centred = cells - mean
    return ((centred @ precision) * centred).sum(dim=2, keepdim=True)


def like_places(x: Tensor, *, keys: int, reach: int) -> Tensor:
    """Mean squared difference of each place to its nearest like elsewhere in the image: (B, 1, h, w).

    Args:
        x: (B, C, h, w), channels standardised over the image.
        keys: the likes are sought among ``keys`` x ``keys`` places spread evenly over the image.
        reach: places up to so many away on both axes share most of what a place sees, and are no proof.
    """
    B, C = x.shape[:2]
    size = x.shape[2:]
    sought = functional.interpolate(x, size=(keys, keys), mode="nearest").flatten(2)
    # |b|^2 - 2ab: what |a - b|^2 is without |a|^2, which no minimum over b needs. As one product, by a channel of ones:
    # on a large field every pass over all pairs of places counts.
    cells = torch.cat((x, torch.ones_like(x[:, :1])), dim=1).flatten(2).transpose(1, 2)
    d = cells @ torch.cat((-2 * sought, sought.square().sum(dim=1, keepdim=True)), dim=1)
    rows, columns = _near(x[:1, :1, :, :1], keys, reach), _near(x[:1, :1, :1].mT, keys, reach)
    d = d.reshape(B, *size, keys, keys) + (1e5 * rows)[:, None, :, None] * columns[None, :, None]
    nearest = (d.flatten(3).amin(dim=3) + x.square().sum(dim=1)).clamp_min(0) / C
    return nearest[:, None]


def _near(line: Tensor, keys: int, reach: int) -> Tensor:
    """Which of ``keys`` places, spread along a line (1, 1, n, 1), lie within reach of each of the n: (n, keys)."""
    at = torch.ones_like(line).cumsum(dim=2)
    sought = functional.interpolate(at, size=(keys, 1), mode="nearest")
    return ((at.flatten()[:, None] - sought.flatten()).abs() <= reach).to(line.dtype)
