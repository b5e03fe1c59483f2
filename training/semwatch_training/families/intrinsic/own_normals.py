"""What a process's own normal images add to the detector: what is usual *in this process*, without training.

Some of their places, and descriptions of their fields, which make the process a known one. How far a place lies from
the nearest kept one is counted beside the branch's logit, both in spreads of normal images whose places were not among
the kept: so neither can drown the other, whatever the process.

Source: nearest normal patch, PatchCore (Roth et al. 2022), here in principal components that are whitened half, and
cross-fitted over folds of images. A Gaussian of the places (Rippel et al. 2020) found fewer defects on printed lines.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from semwatch.errors import ConfigError
from semwatch_training.families.branch.segmentation_branch import image_score

FEWEST = 3
"""Normal images whose places can be kept: of fewer, none can be judged by the others."""
FOLDS = 5
KEPT_PLACES = 1000
"""Four times as many find no more, and every place of a field is compared with each."""
COMPONENTS = 128
WHITENING = 0.5
"""Power of a component's standard deviation that it is divided by."""
SEED = 0
"""Of which places are kept."""


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
        n_components = min(COMPONENTS, n_channels)
        self.register_buffer("mean", torch.zeros(n_channels))
        self.register_buffer("projection", torch.eye(n_channels, n_components))
        self.register_buffer("kept", torch.zeros(KEPT_PLACES, n_components))
        """Normal places, projected."""
        self.register_buffer("of_place", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        """Mean and spread over normal places: of the branch's logit, of the distance."""
        self.register_buffer("field_mean", torch.zeros(width))
        self.register_buffer("field_spread", torch.ones(width))
        self.register_buffer("fields", torch.zeros(n_fields, width))
        """Descriptions of normal fields, in spreads from their mean."""
        self.register_buffer("field_distances", torch.zeros(n_fields))
        """Of each to the nearest of another image, ascending."""

    def distance(self, places: Tensor) -> Tensor:
        """Distance (B, h, w) of places (B, C, h, w) to the nearest kept one."""
        cells = (places.flatten(2).transpose(1, 2) - cast(Tensor, self.mean)) @ cast(Tensor, self.projection)
        kept = cast(Tensor, self.kept)
        # |b|^2 - 2ab: what |a - b|^2 is without |a|^2, which no minimum over b needs.
        nearest = (kept.square().sum(dim=1) - 2 * (cells @ kept.T)).amin(dim=2)
        squared = nearest + cells.square().sum(dim=2)
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
    """Keep places of all images, in place, and judge each image by places of those of other folds.

    Args:
        seen: normal images, their tiles and views; of ``FEWEST`` images or more where ``into`` has places.
        calibration: (2, 3) of the detector.
        into: takes the places and the spreads.

    Returns:
        (n,) logits of the image score of all that was seen, each by the normals of other folds.

    Raises:
        ConfigError: too few images.
    """
    image = np.array([one.image for one in seen], np.intp)
    if not into.has_places:
        raise ConfigError(f"there are no places to keep: fewer than {FEWEST} normal images")
    numbers = np.unique(image)
    if len(numbers) < FEWEST:
        raise ConfigError(f"{len(numbers)} normal images: to keep places of them takes {FEWEST}")
    fold_of = {number: k % min(FOLDS, len(numbers)) for k, number in enumerate(numbers.tolist())}
    folds = np.array([fold_of[number] for number in image.tolist()])
    of_own = [k for k, one in enumerate(seen) if one.kind == "own"]
    _set(
        into,
        "mean",
        "projection",
        values=_components([seen[k] for k in of_own], cast(Tensor, into.projection).shape[1]),
    )
    distances: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(seen)
    for fold in np.unique(folds):
        _keep([seen[k] for k in of_own if folds[k] != fold], into)
        for k in np.flatnonzero(folds == fold).tolist():
            distances[k] = _distance(seen[k].places, into)
    maps = ([one.branch for one in seen], distances)
    of_place = np.array([_mean_spread(np.concatenate([of[k].ravel() for k in of_own])) for of in maps])
    _keep([seen[k] for k in of_own], into)
    _set(into, "of_place", values=(of_place,))
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
    names = ("field_mean", "field_spread", "fields", "field_distances")
    _set(into, *names, values=(mean, spread, away, nearest))


def _set(into: OwnNormals, *names: str, values: Sequence[NDArray[np.floating]]) -> None:
    for name, value in zip(names, values, strict=True):
        cast(Tensor, getattr(into, name)).copy_(torch.from_numpy(np.asarray(value, np.float32)))


def _components(seen: Sequence[Seen], n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (C,) of the places, and their n leading principal directions (C, n), whitened; every image counts alike."""
    means: dict[int, list[NDArray[np.float64]]] = {}
    products: dict[int, list[NDArray[np.float64]]] = {}
    for one in seen:
        cells = one.places.reshape(-1, one.places.shape[-1]).astype(np.float64)
        means.setdefault(one.image, []).append(cells.mean(axis=0))
        products.setdefault(one.image, []).append(cells.T @ cells / len(cells))
    mean = np.mean([np.mean(of_image, axis=0) for of_image in means.values()], axis=0)
    second = np.mean([np.mean(of_image, axis=0) for of_image in products.values()], axis=0)
    variances, directions = np.linalg.eigh(second - np.outer(mean, mean))
    spreads = np.sqrt(np.maximum(variances[::-1][:n], 0) + 1e-12)
    return mean, directions[:, ::-1][:, :n] / (spreads / spreads[0]).clip(1e-3) ** WHITENING


def _keep(seen: Sequence[Seen], into: OwnNormals) -> None:
    """Keep places of these, drawn in equal numbers from every image; some twice where there are too few."""
    rng, by_image = np.random.default_rng(SEED), dict[int, list[Seen]]()
    for one in seen:
        by_image.setdefault(one.image, []).append(one)
    drawn, shares = [], np.array_split(np.arange(KEPT_PLACES), len(by_image))
    for number, share in zip(rng.permutation(list(by_image)).tolist(), shares, strict=True):
        cells = np.concatenate([one.places.reshape(-1, one.places.shape[-1]) for one in by_image[number]])
        drawn.append(cells[np.resize(rng.permutation(len(cells)), len(share))])
    places = torch.from_numpy(np.concatenate(drawn).astype(np.float32))
    kept = (places - cast(Tensor, into.mean)) @ cast(Tensor, into.projection)
    cast(Tensor, into.kept).copy_(kept)


def _distance(places: NDArray[np.float16], into: OwnNormals) -> NDArray[np.float32]:
    """Of (h, w, C), as the graph has it."""
    with torch.no_grad():
        values = into.distance(torch.from_numpy(places.astype(np.float32)).permute(2, 0, 1)[None])
    return np.asarray(values[0].numpy(), np.float32)


def _top(values: NDArray[np.floating], top_cells: int) -> float:
    """Of (h, w), as the graph has it."""
    return float(image_score(torch.from_numpy(values.astype(np.float32))[None], top_cells))


def _mean_spread(values: NDArray[np.floating]) -> tuple[float, float]:
    return float(values.mean()), float(max(values.std(), 1e-3))
