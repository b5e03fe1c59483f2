"""What a process's own normal images add to the detector: what is usual *in this process*, without training.

One Gaussian of their places, which is fixed where ``own_statistics`` fits one to each image; and descriptions of their
fields, which make the process a known one. How far a place lies from the Gaussian is counted beside the branch's logit,
both in spreads of the normal images that the Gaussian did not see: so neither can drown the other, whatever the
process.

Source: Mahalanobis distance of one Gaussian (Rippel et al. 2020); cross-fitting over folds of images.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semwatch.errors import ConfigError
from semwatch_training.families.branch.segmentation_branch import image_score
from semwatch_training.families.intrinsic.own_statistics import SHRINKAGE

FEWEST = 3
"""Normal images before a Gaussian is made of them: of fewer, none can be judged by the others."""
FOLDS = 5


class Seen(NamedTuple):
    """One field, or one tile or view of it, as the trunk and the branch see it."""

    image: int
    """Number of the normal image it is of: its tiles and views are never judged by one another."""
    places: NDArray[np.float16]
    """(h, w, C), see ``own_statistics.places``."""
    branch: NDArray[np.float32]
    """(h, w) logits."""
    kind: Literal["own", "view", "planted"] = "own"
    """The image itself; a view of it, or it with a planted defect, which are judged alone and never learnt from."""
    raw_logit: float = 0.0
    """Of the image score as the detector has it without normals."""


class OwnNormals(nn.Module):
    """The statistics of a process's normal images, as they stand in the graph."""

    in_fp32 = True
    """Distances are differences of large sums."""

    def __init__(self, n_channels: int, n_fields: int, width: int, *, top_cells: int, has_places: bool = True) -> None:
        super().__init__()
        self.top_cells, self.has_places = top_cells, has_places
        self.register_buffer("mean", torch.zeros(n_channels))
        self.register_buffer("precision", torch.eye(n_channels))
        self.register_buffer("of_place", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        """Mean and spread over normal places: of the branch's logit, of the distance."""
        self.register_buffer("field_mean", torch.zeros(width))
        self.register_buffer("field_spread", torch.ones(width))
        self.register_buffer("fields", torch.zeros(n_fields, width))
        """Descriptions of normal fields, in spreads from their mean."""
        self.register_buffer("field_distances", torch.zeros(n_fields))
        """Of each to the nearest of another image, ascending."""

    def distance(self, places: Tensor) -> Tensor:
        """Distance (B, h, w) of places (B, C, h, w) to the Gaussian of normal places."""
        cells = places.flatten(2).transpose(1, 2) - cast(Tensor, self.mean)
        squared = ((cells @ cast(Tensor, self.precision)) * cells).sum(dim=2)
        return squared.clamp_min(0).sqrt().reshape(places.shape[0], *places.shape[2:])

    def forward(self, places: Tensor, branch: Tensor, calibration: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of places (B, h, w) and of the image (B,), in the branch's units: a spread of either counts alike.

        Args:
            places: (B, C, h, w).
            branch: its logits (B, h, w).
            calibration: of the detector, see ``IntrinsicDetector``.
        """
        (_, spread), (mean_far, spread_far) = cast(Tensor, self.of_place)
        both = branch + spread * (self.distance(places) - mean_far) / spread_far
        return (
            calibration[0, 0] * both + calibration[0, 2],
            calibration[1, 0] * image_score(both, self.top_cells) + calibration[1, 2],
        )

    def domain_p(self, description: Tensor) -> Tensor:
        """P-value (B,) of fields as described (B, F), among the normal fields.

        Beyond the last of few fields it falls on, as those of heads do: a handful of images must not make every field a
        known one.
        """
        known, distances = cast(Tensor, self.fields), cast(Tensor, self.field_distances)
        away = (description - cast(Tensor, self.field_mean)) / cast(Tensor, self.field_spread)
        squared = known.square().sum(dim=1) - 2 * (away @ known.T)
        nearest = (squared.amin(dim=1) + away.square().sum(dim=1)).clamp_min(0).sqrt()
        n = distances.shape[0]
        as_far = (distances >= nearest[:, None]).to(away.dtype).sum(dim=1)
        last, middle = distances[n - 1], distances[n // 2]
        spread = torch.maximum(last - middle, 0.05 * last + 1e-6)
        beyond = spread / (spread + (nearest - last).clamp_min(0))
        return (as_far + beyond) / (n + 1)


# ---- fitting ----


def fit(seen: Sequence[Seen], calibration: NDArray[np.float64], *, into: OwnNormals) -> NDArray[np.float64]:
    """Fit the Gaussian of all images, in place, and judge each by the Gaussian of those of other folds.

    Args:
        seen: normal images, their tiles and views; of ``FEWEST`` images or more where ``into`` has places.
        calibration: (2, 3) of the detector.
        into: takes the Gaussian and the spreads.

    Returns:
        (n,) logits of the image score of all that was seen, each by the normals of other folds.

    Raises:
        ConfigError: too few images.
    """
    image = np.array([one.image for one in seen], np.intp)
    if not into.has_places:
        raise ConfigError("there are no places to fit: fewer normal images than a Gaussian takes")
    numbers = np.unique(image)
    if len(numbers) < FEWEST:
        raise ConfigError(f"{len(numbers)} normal images: a Gaussian of their places takes {FEWEST}")
    fold_of = {number: k % min(FOLDS, len(numbers)) for k, number in enumerate(numbers.tolist())}
    folds = np.array([fold_of[number] for number in image.tolist()])
    moments = _moments([one for one in seen if one.kind == "own"])
    distances: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(seen)
    for fold in np.unique(folds):
        gaussian = _gaussian([moments[number] for number in numbers.tolist() if fold_of[number] != fold])
        for k in np.flatnonzero(folds == fold).tolist():
            distances[k] = _distance(seen[k].places, gaussian)
    of_own = [k for k, one in enumerate(seen) if one.kind == "own"]
    maps = ([one.branch for one in seen], distances)
    of_place = np.array([_mean_spread(np.concatenate([of[k].ravel() for k in of_own])) for of in maps])
    mean, precision = _gaussian(list(moments.values()))
    for name, value in (("mean", mean), ("precision", precision), ("of_place", of_place)):
        cast(Tensor, getattr(into, name)).copy_(torch.from_numpy(np.asarray(value, np.float32)))
    (_, spread), (mean_far, spread_far) = of_place
    both = [one.branch + spread * (far - mean_far) / spread_far for one, far in zip(seen, distances, strict=True)]
    return np.asarray(
        calibration[1, 0] * np.array([_top(values, into.top_cells) for values in both]) + calibration[1, 2]
    )


def fit_fields(descriptions: NDArray[np.float32], image: NDArray[np.intp], *, into: OwnNormals) -> None:
    """Remember what normal fields look like, in place.

    Args:
        descriptions: (n, F) of ``intrinsic_detector.described``, views among them.
        image: (n,) which image each is of: near ones of the same image prove nothing, where there is another.
        into: takes them.
    """
    mean, spread = descriptions.mean(axis=0), descriptions.std(axis=0) + 1e-3 * np.abs(descriptions).mean(axis=0) + 1e-6
    away = (descriptions - mean) / spread
    apart = np.sqrt(np.maximum((away**2).sum(1)[:, None] + (away**2).sum(1) - 2 * away @ away.T, 0))
    same = image[:, None] == image if len(np.unique(image)) > 1 else np.eye(len(image), dtype=bool)
    apart[same] = np.inf
    nearest = np.sort(np.where(np.isfinite(apart), apart, np.inf).min(axis=1))
    nearest = np.where(np.isfinite(nearest), nearest, 0.0)
    for name, value in (("field_mean", mean), ("field_spread", spread), ("fields", away), ("field_distances", nearest)):
        cast(Tensor, getattr(into, name)).copy_(torch.from_numpy(np.asarray(value, np.float32)))


_Moments = tuple[int, NDArray[np.float64], NDArray[np.float64]]


def _moments(seen: Sequence[Seen]) -> dict[int, _Moments]:
    """Number of places, their sum and that of their products, by image; every image counts alike."""
    found: dict[int, _Moments] = {}
    for one in seen:
        cells = one.places.reshape(-1, one.places.shape[-1]).astype(np.float64)
        n, total, products = found.get(one.image, (0, np.zeros(cells.shape[1]), np.zeros((cells.shape[1],) * 2)))
        found[one.image] = n + len(cells), total + cells.sum(axis=0), products + cells.T @ cells
    return found


def _gaussian(moments: Sequence[_Moments]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (C,) and inverse of the shrunken covariance (C, C)."""
    mean = np.mean([total / n for n, total, _ in moments], axis=0)
    second = np.mean([products / n for n, _, products in moments], axis=0)
    covariance = second - np.outer(mean, mean)
    floor = SHRINKAGE * np.trace(covariance) / len(mean) + 1e-9
    return mean, np.linalg.inv((1 - SHRINKAGE) * covariance + floor * np.eye(len(mean)))


def _distance(
    places: NDArray[np.float16], gaussian: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> NDArray[np.float32]:
    mean, precision = (part.astype(np.float32) for part in gaussian)
    cells = places.astype(np.float32) - mean
    return np.asarray(np.sqrt(np.maximum(((cells @ precision) * cells).sum(axis=2), 0)), np.float32)


def _top(values: NDArray[np.floating], top_cells: int) -> float:
    """Of (h, w), as the graph has it."""
    return float(image_score(torch.from_numpy(values.astype(np.float32))[None], top_cells))


def _mean_spread(values: NDArray[np.floating]) -> tuple[float, float]:
    return float(values.mean()), float(max(values.std(), 1e-3))
