"""Make a memory of normal images: look at them, choose what to remember, measure distances on held-out ones.

Source: PatchCore (Roth et al. 2022; greedy coreset, here of a random share of the patches) and AnomalyDINO (Damm et
al. 2025; few images are turned).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semwatch.errors import ConfigError
from semwatch.line.scaling import resize
from semwatch_training.data.augment import turned
from semwatch_training.families.memory.memory_detector import (
    Bank,
    Memory,
    MemoryForm,
    TrunkFeatures,
    Trunks,
    as_map,
    most_alike,
    nearest_distances,
    scored,
    signatures,
)
from semwatch_training.system.progress_bars import Progress

MIN_SPREAD = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """Both trunks' features of normal images, extracted once; memories of several seeds may be made of them."""

    vit: NDArray[np.float16]
    """(n, N, C) of n views."""
    efficientnet: NDArray[np.float16]
    """(n, N', C')"""
    owners: NDArray[np.int64]
    """(n,) views of one owner do not judge each other."""
    are_images: bool
    """False where images are seen from all sides: turned views stand in for others, but are no images to come."""


def fit(
    images: Sequence[NDArray[np.uint8]],
    trunks: Trunks,
    form: MemoryForm | None = None,
    *,
    groups: Sequence[int] | None = None,
    seed: int = 1,
    progress: Progress = lambda *_: None,
) -> Memory:
    """Remember normal images: ``look`` at them, then ``remember``; arguments and errors are theirs."""
    form = form or MemoryForm()
    return remember(look(images, trunks, form, groups=groups, progress=progress), form, seed=seed, progress=progress)


def look(
    images: Sequence[NDArray[np.uint8]],
    trunks: Trunks,
    form: MemoryForm,
    *,
    groups: Sequence[int] | None = None,
    progress: Progress = lambda *_: None,
) -> Patches:
    """Extract the patch features of normal images.

    Args:
        images: normal, (H, W) uint8, any size; one is enough to detect, the gate needs about a hundred.
        trunks: frozen, in evaluation mode.
        form: what memories will be made of.
        groups: one number per image; images of one site share theirs and are not scored by each other's patches, as
            they would look more normal than images to come. None where every image stands alone.
        progress: called after every image.

    Raises:
        ConfigError: no images, an image of another type, groups that do not fit, or features that are not finite.
    """
    _check(images, groups)
    views, owners = _views(images, groups, form)
    vit, efficientnet = _extract(views, TrunkFeatures(trunks, form).eval(), progress)
    return Patches(vit, efficientnet, owners, len(views) == len(images))


def remember(patches: Patches, form: MemoryForm, *, seed: int = 1, progress: Progress = lambda *_: None) -> Memory:
    """Choose the patches of a memory, and measure its distances on images that it was made without.

    Args:
        patches: of ``look``, with the same trunk sizes, layers and stages.
        form: of the memory.
        seed: of the drawing of patches and folds.
        progress: called after every held-out image.
    """
    rng = np.random.default_rng(seed)
    kept, distances = (_images if form.alike else _coreset)(patches, form, rng, progress)
    scales = [(float(found.mean()), max(float(found.std()), MIN_SPREAD)) for found in distances]
    maps = [(found - centre) / spread for found, (centre, spread) in zip(distances, scales, strict=True)]
    scores = scored((maps[0] + maps[1]) / 2, form)[1].tolist()
    honest = scores if len(set(patches.owners.tolist())) > 1 and patches.are_images else []
    first, second = (Bank(*bank, *scale) for bank, scale in zip(kept, scales, strict=True))
    return Memory(form, (first, second), tuple(sorted(honest)))


def _images(
    patches: Patches, form: MemoryForm, rng: np.random.Generator, progress: Progress
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[Tensor]]:
    """Mean, projection and patches (n, N, D) of each trunk, and distance maps of images without their owner's."""
    chosen = _in_turn(patches.owners, rng)[
        : max(form.images, 2)
    ]  # the first two are of two owners, to judge each other
    owners = torch.from_numpy(patches.owners[chosen])
    kept = []
    for values, components in zip((patches.vit, patches.efficientnet), form.components, strict=True):
        drawn = _candidates(values, form.candidates, rng)
        mean, projection = principal_components(drawn, components, whitening=form.whitening)
        projected = [((torch.from_numpy(values[i]).float() - mean) @ projection).half() for i in chosen]
        kept.append((mean, projection, torch.stack(projected)))
    compared = signatures([bank[2] for bank in kept])
    held_out = rng.permutation(len(chosen))[: form.calibration_images]
    maps = [torch.empty(len(held_out), form.side, form.side) for _ in kept]
    for done, index in enumerate(held_out.tolist()):
        others = (owners != owners[index]).nonzero()[:, 0]
        asked = others[most_alike(compared[index : index + 1], compared[others], form.alike)[0]]
        for found, (_, _, remembered) in zip(maps, kept, strict=True):
            query, bank = remembered[index : index + 1].float(), remembered[asked].float().flatten(0, 1)
            found[done] = as_map(nearest_distances(query, bank), form.side)[0]
        progress("held-out distances", done + 1, len(held_out))
    return kept, maps


def _in_turn(owners: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """All views in random order, save that no owner has its second before every owner had its first, and so on."""
    order = rng.permutation(len(owners))
    turns = np.zeros(len(owners), np.int64)
    for owner in np.unique(owners):
        own = order[owners[order] == owner]
        turns[own] = np.arange(len(own))
    return order[np.argsort(turns[order], kind="stable")].astype(np.int64)


def _coreset(
    patches: Patches, form: MemoryForm, rng: np.random.Generator, progress: Progress
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[Tensor]]:
    """Mean, projection and patches (P, D) of each trunk, and distance maps of images to coresets without their fold."""
    folds = _folds(patches.owners, form.folds, rng)
    held_out = rng.permutation(len(patches.owners))[: form.calibration_images]
    kept, maps = [], []
    for values, components in zip((patches.vit, patches.efficientnet), form.components, strict=True):
        maps.append(_held_out_maps(values, folds, held_out, components, form, rng, progress))
        kept.append(_remember(values, components, form, rng))
    return kept, maps


def _check(images: Sequence[NDArray[np.uint8]], groups: Sequence[int] | None) -> None:
    if not len(images):
        raise ConfigError("a memory needs at least one normal image; none was given")
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 2 or 0 in image.shape:
            raise ConfigError(f"image {index} is {image.dtype} {image.shape}; a memory takes uint8 gray (H, W)")
    if groups is not None and len(groups) != len(images):
        raise ConfigError(f"{len(groups)} groups for {len(images)} images; give one number per image")
    if groups is not None and len(set(groups)) == 1 and len(images) > 1:
        raise ConfigError("all images are of one group, so none can be scored by another; give groups that differ")


def _views(
    images: Sequence[NDArray[np.uint8]], groups: Sequence[int] | None, form: MemoryForm
) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Images at the input size with their owners; a few are seen from all sides, one alone owns nothing but views."""
    resized = [resize(image, (form.input_px, form.input_px)) for image in images]
    numbers = np.arange(len(images)) if groups is None else np.asarray(groups)
    if len(images) > form.few_shot:
        return resized, numbers.astype(np.int64)
    views = [turned(image, turns, mirrored) for image in resized for mirrored in (False, True) for turns in range(4)]
    owners = np.arange(len(views)) if len(images) == 1 else np.repeat(numbers, 8)
    return views, owners.astype(np.int64)


def _extract(
    views: Sequence[NDArray[np.uint8]], eye: TrunkFeatures, progress: Progress
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Both trunks' features (n, N, C) fp16."""
    found: tuple[list[NDArray[np.float16]], list[NDArray[np.float16]]] = ([], [])
    for index, view in enumerate(views):
        with torch.no_grad():
            for kept, values in zip(found, eye(torch.from_numpy(view[None])), strict=True):
                kept.append(values[0].half().numpy())
        progress("features", index + 1, len(views))
    stacked = np.stack(found[0]), np.stack(found[1])
    if not all(np.isfinite(values).all() for values in stacked):
        raise ConfigError("a trunk gave features that are not finite; its weights are damaged, fetch them again")
    return stacked


def _folds(owners: NDArray[np.int64], n_folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A fold number per view; views of one owner share theirs. Fewer folds where there are fewer owners."""
    numbers, index = np.unique(owners, return_inverse=True)
    fold_of_owner: NDArray[np.int64] = rng.permutation(len(numbers)) % min(n_folds, len(numbers))
    return fold_of_owner[index]


def _held_out_maps(
    features: NDArray[np.float16],
    folds: NDArray[np.int64],
    held_out: NDArray[np.int64],
    components: int,
    form: MemoryForm,
    rng: np.random.Generator,
    progress: Progress,
) -> Tensor:
    """Distance maps (m, h, w) of the held-out images to memories of the other folds, in the order of ``held_out``."""
    maps = torch.empty(len(held_out), form.side, form.side)
    done = 0
    for fold in np.unique(folds[held_out]):
        mean, projection, patches = _remember(features[folds != fold], components, form, rng)
        for position in np.flatnonzero(folds[held_out] == fold):
            query = (torch.from_numpy(features[held_out[position]]).float() - mean) @ projection
            maps[position] = as_map(nearest_distances(query[None], patches.float()), form.side)[0]
            done += 1
            progress("held-out distances", done, len(held_out))
    return maps


def _remember(
    features: NDArray[np.float16], components: int, form: MemoryForm, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, projection and remembered patches (fp16) of one trunk's features (n, N, C)."""
    drawn = _candidates(features, max(form.candidates, form.patches), rng)
    mean, projection = principal_components(drawn, components, whitening=form.whitening)
    projected = (drawn - mean) @ projection
    return mean, projection, projected[coreset(projected, form.patches, rng)].half()


def _candidates(features: NDArray[np.float16], wanted: int, rng: np.random.Generator) -> Tensor:
    """Patches (P, C) drawn from features (n, N, C), see ``_drawn``."""
    return torch.from_numpy(features[_drawn(len(features), features.shape[1], wanted, rng)]).float()


def _drawn(
    n_images: int, n_patches: int, wanted: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image and patch numbers of at most ``wanted`` patches, from every image the same number, give or take one."""
    wanted = min(wanted, n_images * n_patches)
    order = np.stack([rng.permutation(n_patches) for _ in range(n_images)])  # (n, N)
    images = np.tile(rng.permutation(n_images), n_patches)[:wanted]
    turns = np.repeat(np.arange(n_patches), n_images)[:wanted]
    return images.astype(np.int64), order[images, turns].astype(np.int64)


def coreset(features: Tensor, n: int, rng: np.random.Generator, *, width: int = 24) -> Tensor:
    """Numbers (min(n, P),) of features (P, D) that lie far apart: each is the farthest from all chosen before it.

    Rare normal patches are kept where a random draw loses them. Distances are taken on a random projection to
    ``width`` numbers.

    Source: PatchCore, algorithm 1 (greedy k-centre).
    """
    P, D = features.shape
    if n >= P:
        return torch.arange(P)
    projected = features @ torch.from_numpy(rng.normal(0, width**-0.5, (D, width))).float()
    norms = projected.square().sum(dim=1)
    distance = torch.full((P,), torch.inf)
    chosen = torch.empty(n, dtype=torch.int64)
    chosen[0] = int(rng.integers(P))
    for index in range(1, n):
        latest = projected[chosen[index - 1]]
        distance = torch.minimum(distance, norms - 2 * projected @ latest + latest.square().sum())
        distance[chosen[index - 1]] = -torch.inf  # never twice, not even among identical features
        chosen[index] = distance.argmax()
    return chosen


def principal_components(features: Tensor, components: int, *, whitening: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean (C,) and the first principal directions (C, D) of features (P, C), D = min(components, C).

    Args:
        features: at least one.
        components: how many to keep.
        whitening: 0 for an isometry; 1 for unit variance along every direction. Directions that normal patches never
            take count as having 1e-4 of the largest variance.
    """
    mean = features.mean(dim=0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    variances, directions = variances.flip(0)[:components], directions.flip(1)[:, :components]
    floor = max(1e-4 * float(variances[0]), 1e-12)
    return mean, directions * variances.clamp_min(floor).pow(-whitening / 2)
