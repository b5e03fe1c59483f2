"""What a segmentation branch is trained on: normals, the same with pseudo-defects planted in them, labelled defects."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import cv2
import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.line.scaling import resize
from semwatch_training.data import pattern_defects, world
from semwatch_training.data.backgrounds import backgrounds
from semwatch_training.data.datasets import MAX_SEEDS, SEED_TRAIN, first_with_room
from semwatch_training.data.pseudo_defects import log_uniform
from semwatch_training.synthetic import DEFECT_TYPES, STAGES

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]

LABELLED_OFFSET = 500_000
CUT_SHARE = 0.75
"""Of synthetic fields, those that are not shown as a whole."""
SIDES_PX, SIDE_SHARES = (512, 640, 768, 1024), (0.4, 0.2, 0.25, 0.15)


def synthetic_views(
    n_normals: int,
    n_backgrounds: int,
    n_labelled: int,
    *,
    seed: int,
    size_px: int,
    first_seed: int = SEED_TRAIN,
    stages: Sequence[str] = STAGES,
    n_scenes: int = 0,
    kinds: Sequence[str] = world.LAYOUTS,
) -> Iterator[tuple[Image, Mask]]:
    """Yield what the shipped branch is trained on: 2 * (n_normals + n_backgrounds) + n_labelled pairs, see ``views``.

    After these come ``n_scenes`` scenes of no process, see ``data.world``, normal and defective ones mixed.

    Args:
        n_normals: normal fields of the stages, seeds from ``first_seed``.
        n_backgrounds: procedural ones, of no stage.
        n_labelled: fields with a true defect of the stages; 0 for a branch that has seen pseudo-defects only.
        seed: of backgrounds, pseudo-defects and variation.
        size_px: the branch's input size.
        first_seed: of the generator.
        stages: which to show; leave some out to test on processes never seen.
        n_scenes: of many layouts and microscopes, half of them with a true defect.
        kinds: the layouts of these.
    """
    fields = synthetic_fields(n_normals, first_seed=first_seed, size_px=size_px, stages=stages, defective=False)
    labelled = synthetic_fields(
        n_labelled, first_seed=first_seed + LABELLED_OFFSET, size_px=size_px, stages=stages, defective=True
    )
    normals = (image for image, _ in fields)
    labelled = chain(labelled, world.scenes(n_scenes, seed=seed, size_px=size_px, kinds=kinds))
    return views(chain(normals, backgrounds(n_backgrounds, seed=seed, size_px=size_px)), labelled, seed=seed)


def synthetic_fields(
    n: int, *, first_seed: int, size_px: int, stages: Sequence[str] = STAGES, defective: bool
) -> Iterator[tuple[Image, Mask]]:
    """Yield n synthetic fields with their masks, both (size_px, size_px): the stages, and their defect types, in turn.

    Rendered between 512 and 1024 px a side, then shrunk as a whole or cut out of anything between that and its own
    size, so that patterns, grain and noise come at a spread of scales. Normal ones have an empty mask. A field that has
    no room for its defect is replaced by that of a seed n further on.
    """
    rng = np.random.default_rng(first_seed)
    for index in range(n):
        stage, turn = stages[index % len(stages)], index // len(stages)
        labels = (DEFECT_TYPES[stage][turn % len(DEFECT_TYPES[stage])],) if defective else ()
        side = int(rng.choice(SIDES_PX, p=SIDE_SHARES))
        seeds = range(first_seed + index, first_seed + index + MAX_SEEDS * n, n)
        field = first_with_room(stage, labels, seeds, (side, side))
        shown = max(size_px, round(side * log_uniform(rng, size_px / side, 1.0)) if rng.random() < CUT_SHARE else 0)
        image, cover = resize(field.pixels, (shown, shown)), np.zeros((shown, shown), np.float32)
        if defective:
            cover = cv2.resize(field.masks[0].astype(np.float32), (shown, shown), interpolation=cv2.INTER_AREA)
        window = _window(rng, cover, size_px)
        cover = cover[window]
        yield np.ascontiguousarray(image[window]), (cover > 0) & (cover >= min(0.5, float(cover.max())))


def _window(rng: np.random.Generator, cover: NDArray[np.float32], size_px: int) -> tuple[slice, slice]:
    """A window of ``size_px`` a side anywhere in ``cover`` (S, S), or anywhere that shows part of the defect."""
    corner = rng.integers(0, cover.shape[0] - size_px + 1, 2)
    defective = np.argwhere(cover >= 0.5 * float(cover.max()))
    if cover.max() > 0:
        inside = defective[rng.integers(len(defective))]
        corner = inside - rng.integers(size_px // 8, size_px - size_px // 8, 2)
        corner = np.clip(corner, 0, cover.shape[0] - size_px)
    return slice(corner[0], corner[0] + size_px), slice(corner[1], corner[1] + size_px)


def cuts(images: Iterable[Image], *, seed: int, size_px: int) -> Iterator[Image]:
    """Show each field (H, W) as the detector sees a part of it: (size_px, size_px), at a random scale.

    A field whose shorter side is smaller is enlarged.
    """
    rng = np.random.default_rng(seed)
    for image in images:
        shorter = max(size_px, min(image.shape))
        cut = max(size_px, round(shorter * log_uniform(rng, size_px / shorter, 1.0)) if rng.random() < CUT_SHARE else 0)
        scale = cut / min(image.shape)
        shown = resize(
            image, (max(size_px, round(image.shape[0] * scale)), max(size_px, round(image.shape[1] * scale)))
        )
        y, x = (int(rng.integers(0, n - size_px + 1)) for n in shown.shape)
        yield np.ascontiguousarray(shown[y : y + size_px, x : x + size_px])


def views(
    normals: Iterable[Image], labelled: Iterable[tuple[Image, Mask]], *, seed: int, n_donors: int = 8
) -> Iterator[tuple[Image, Mask]]:
    """Yield what to train on: each normal image as it is and once with a pseudo-defect, then each labelled image.

    All of them turned, mirrored and changed in contrast at random. Foreign texture comes from the last few normals.

    Args:
        normals: (S, S) uint8.
        labelled: pairs of an image (S, S) uint8 and its mask (S, S) bool.
        seed: of pseudo-defects and variation.
        n_donors: how many normals are kept to take foreign texture from.
    """
    rng = np.random.default_rng(seed)
    donors: list[Image] = []
    for image in normals:
        planted = pattern_defects.plant(image, rng, donors=donors)
        donors = [image, *donors[: n_donors - 1]]
        yield vary(image, np.zeros(image.shape, bool), rng)
        yield vary(planted.pixels, planted.mask, rng)
    for image, mask in labelled:
        if mask.shape != image.shape:
            raise ConfigError(f"a mask of {mask.shape} belongs to no image of {image.shape}; give one of the same size")
        yield vary(image, mask, rng)


def vary(image: Image, mask: Mask, rng: np.random.Generator) -> tuple[Image, Mask]:
    """Turn and mirror an image and its mask, both (S, S); change the image's gamma, contrast, focus and noise.

    One in seven is shown as its negative: bright lines on dark and dark ones on bright are the same pattern.
    """
    turns = int(rng.integers(8))
    image, mask = np.rot90(image, turns % 4), np.rot90(mask, turns % 4)
    if turns >= 4:
        image, mask = image[:, ::-1], mask[:, ::-1]
    level = (image.astype(np.float32) / 255) ** np.exp(rng.uniform(-0.3, 0.3))
    level = (level - 0.45) * rng.uniform(0.7, 1.25) + 0.45 + rng.uniform(-0.08, 0.08)
    if rng.random() < 0.15:
        level = 1 - level
    if rng.random() < 0.3:
        level = cv2.GaussianBlur(level, (0, 0), rng.uniform(0.4, 1.0))
    if rng.random() < 0.3:
        level = level + rng.normal(0, rng.uniform(0.01, 0.05), level.shape)
    return (np.clip(level, 0, 1) * 255).astype(np.uint8), np.ascontiguousarray(mask)
