"""Detectors that nobody trained, to stand beside the served one: each from one image's own features, at native scale.

Features are those of a frozen EfficientNet-Lite2, stages 2, 3 and 5 on a grid of 8 pixels, averaged over 3 x 3 and of
unit length by stage. They are short implementations from the published descriptions, not the authors' code: *like*
in a name says so. Maps are (h, w) float32 on that grid, higher is more defective; an image's score is its map's largest
value.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from semwatch_training.trunks.efficientnet import EfficientNet

VERSION = 1
"""Changes where a map does, so that maps kept on disk are made again."""
STAGES = (2, 3, 5)
GRID_PX = 8
TRUNK_PX = 16
"""Sides are mirrored up to a multiple of this, the trunk's largest stride."""
TYPICAL_SHARE = 0.8
REFITS = 3
SHRINKAGE = 0.05
TILE = 9
TILE_SIGMA = 3.0
AXES = 32
"""Principal axes whose values FCA sorts: 192 channels would take minutes for a field of 1024 x 700."""
ATOMS = 200
RIDGE = 1.0
MAX_BANK = 10_000
"""Features that a bank keeps, drawn with a seed: all 55,000 of five large fields would take minutes an image."""

Features = NDArray[np.float32]
"""(h, w, C) of one image."""


def features(trunk: EfficientNet, image: NDArray[np.uint8]) -> Features:
    """Features (h, w, 192) of a gray image (H, W), one vector for every 8 x 8 pixels or part of them."""
    height, width = image.shape
    padded = np.pad(image, ((0, -height % TRUNK_PX), (0, -width % TRUNK_PX)), mode="symmetric")
    with torch.no_grad():
        maps = trunk(torch.from_numpy(np.ascontiguousarray(padded))[None], STAGES)
    size_hw = padded.shape[0] // GRID_PX, padded.shape[1] // GRID_PX
    parts = []
    for stage in maps:
        on_grid = (
            functional.adaptive_avg_pool2d(stage, size_hw)
            if stage.shape[-1] >= size_hw[1]
            else functional.interpolate(stage, size=size_hw, mode="bilinear", align_corners=False)
        )
        averaged = functional.avg_pool2d(on_grid, 3, stride=1, padding=1, count_include_pad=False)
        parts.append(functional.normalize(averaged, dim=1))
    found: NDArray[np.float32] = torch.cat(parts, dim=1)[0].permute(1, 2, 0).numpy()
    return found[: math.ceil(height / GRID_PX), : math.ceil(width / GRID_PX)]


def own_gaussian(of_image: Features) -> NDArray[np.float32]:
    """Mahalanobis distance to one Gaussian of the image's own features, refitted on what is most typical of it.

    Source: the table of training-free statistics that this yardstick goes with; robust fit as the minimum covariance
    determinant's concentration steps (Rousseeuw and Van Driessen 1999).
    """
    height, width, channels = of_image.shape
    tokens = of_image.reshape(-1, channels).astype(np.float64)
    kept = tokens
    distance = np.zeros(len(tokens))
    for _ in range(1 + REFITS):
        mean = kept.mean(axis=0)
        covariance = np.atleast_2d(np.cov(kept.T, bias=True))
        floor = SHRINKAGE * np.trace(covariance) / channels + 1e-9
        inverse = np.linalg.inv((1 - SHRINKAGE) * covariance + floor * np.eye(channels))
        centred = tokens - mean
        distance = np.einsum("nc,nc->n", centred @ inverse, centred)
        kept = tokens[np.argsort(distance, kind="stable")[: max(2, round(TYPICAL_SHARE * len(tokens)))]]
    return np.sqrt(np.maximum(distance, 0)).reshape(height, width).astype(np.float32)


def fca_like(of_image: Features) -> NDArray[np.float32]:
    """How far the sorted values of each 9 x 9 tile lie from those of the median tile, given back to their places.

    Source: Ardelean and Weyrich, WACV 2024 (arXiv 2304.06433), the distance and its assignment to places; features,
    their principal axes and the absence of the inner blur are ours.
    """
    height, width, channels = of_image.shape
    tokens = of_image.reshape(-1, channels).astype(np.float64)
    centred = tokens - tokens.mean(axis=0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :AXES]
    plane = torch.from_numpy((centred @ axes).astype(np.float32).T.reshape(1, -1, height, width))
    tile = min(TILE, 2 * ((min(height, width) - 1) // 2) + 1)
    half = tile // 2
    median = _tiles(plane, tile, stride=tile).sort(dim=-1).values.median(dim=0).values
    padded = functional.pad(plane, (half, half, half, half), mode="reflect")
    step = torch.arange(tile) - half
    bump = torch.exp(-(step**2) / (2 * TILE_SIGMA**2))
    weight = (bump[:, None] * bump[None]).flatten()
    weight = weight / weight.sum()
    total = torch.zeros(height + 2 * half, width + 2 * half)
    for row in range(height):
        values, places = _tiles(padded[:, :, row : row + tile], tile, stride=1).sort(dim=-1)
        back = torch.zeros_like(values).scatter_(-1, places, (values - median).abs()).mean(dim=1) * weight
        total[row : row + tile] += functional.fold(back.T[None], (tile, width + 2 * half), tile)[0, 0]
    found: NDArray[np.float32] = total[half : half + height, half : half + width].numpy()
    return found


def _tiles(plane: Tensor, tile: int, *, stride: int) -> Tensor:
    """Tiles of a plane (1, C, h, w): (n, C, tile * tile)."""
    unfolded = functional.unfold(plane, tile, stride=stride)[0].T
    return unfolded.reshape(len(unfolded), plane.shape[1], tile * tile)


def grnr_like(of_image: Features) -> NDArray[np.float32]:
    """What a ridge regression on 200 typical places of the image leaves of each of its features.

    Typical is what lies near all others on average; of the more typical half, evenly spaced places are taken, so that
    one motif does not stand for all.

    Source: GRNR, closed-form regression on the most typical tokens of the same image; without its neighbours and its
    product of scales, and with 200 tokens for 40.
    """
    height, width, channels = of_image.shape
    tokens = of_image.reshape(-1, channels).astype(np.float64)
    some = tokens[:: max(1, len(tokens) // 1000)]
    squared = (tokens**2).sum(axis=1)[:, None] + (some**2).sum(axis=1)[None] - 2 * tokens @ some.T
    apart = np.sqrt(np.maximum(squared, 0)).mean(axis=1)
    typical = np.sort(np.argsort(apart, kind="stable")[: max(1, len(tokens) // 2)])
    atoms = tokens[typical[np.unique(np.linspace(0, len(typical) - 1, ATOMS).round().astype(int))]]
    gram = atoms @ atoms.T + RIDGE * np.eye(len(atoms))
    left = tokens - np.linalg.solve(gram, atoms @ tokens.T).T @ atoms
    return np.asarray(np.linalg.norm(left, axis=1).reshape(height, width), np.float32)


def bank_of(normals: Sequence[Features], *, seed: int = 0) -> NDArray[np.float32]:
    """The bank (m, C) of normal images, at most ``MAX_BANK`` features of them."""
    tokens: NDArray[np.float32] = np.concatenate([of_image.reshape(-1, of_image.shape[-1]) for of_image in normals])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(tokens))[:MAX_BANK])
    return np.asarray(tokens[chosen])


def nearest_patch(of_image: Features, bank: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance of each feature to its nearest in a bank (m, C) of normal ones.

    Source: PatchCore (Roth et al. 2022), with a drawn part of the patches in the place of its coreset.
    """
    height, width, channels = of_image.shape
    tokens, norms = of_image.reshape(-1, channels), (bank**2).sum(axis=1)
    nearest = np.empty(len(tokens), np.float32)
    for start in range(0, len(tokens), 512):
        part = tokens[start : start + 512]
        nearest[start : start + 512] = (norms - 2 * part @ bank.T).min(axis=1)
    distance = np.sqrt(np.maximum(nearest + (tokens**2).sum(axis=1), 0))
    return np.asarray(distance.reshape(height, width), np.float32)


ENGINES: Mapping[str, Callable[[Features], NDArray[np.float32]]] = MappingProxyType(
    {"own Gaussian": own_gaussian, "FCA-like": fca_like, "GRNR-like": grnr_like}
)
"""Those that see nothing but the image they judge."""
NEAREST = "nearest patch"
