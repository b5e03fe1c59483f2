"""Scenes of no process in particular."""

from itertools import islice

import numpy as np
import pytest

from semwatch_training.data.world import DEFECTS, LAYOUTS, scene, scenes
from semwatch_training.data.world.defects import NEED_LIKE, PATTERN, SURFACE, kinds_for
from semwatch_training.data.world.layouts import layout
from semwatch_training.data.world.twins import LARGEST_SHARE, SHARES


@pytest.mark.parametrize("side", [64, 448, 640])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_is_drawn_at_every_size(kind: str, side: int) -> None:
    normal = scene(np.random.default_rng(3), (side, side), defective=False, kind=kind)
    assert (normal.image.shape, normal.image.dtype) == ((side, side), np.uint8)
    assert (normal.mask.shape, normal.mask.dtype) == ((side, side), np.bool_)
    assert not normal.mask.any()
    assert normal.image.std() > 0.5
    assert (normal.kind, normal.defect) == (kind, "")


@pytest.mark.parametrize("side", [64, 448, 640])
@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_drawn_at_every_size(defect: str, side: int) -> None:
    drawn = scene(np.random.default_rng(2), (side, side), defective=True, kind="segments", defect=defect)
    assert drawn.image.shape == drawn.mask.shape == (side, side)
    assert 0 < drawn.mask.mean() <= LARGEST_SHARE * 1.5  # of an enlarged picture, rounded
    assert drawn.defect in (defect, "spot")


def test_a_field_need_not_be_square() -> None:
    drawn = scene(np.random.default_rng(5), (96, 200), defective=True)
    assert drawn.image.shape == drawn.mask.shape == (96, 200)


def test_the_same_state_draws_the_same_scene_and_another_draws_another() -> None:
    for defective in (False, True):
        first, again, other = (scene(np.random.default_rng(s), (96, 96), defective=defective) for s in (5, 5, 6))
        assert np.array_equal(first.image, again.image)
        assert np.array_equal(first.mask, again.mask)
        assert not np.array_equal(first.image, other.image)


def test_the_mask_covers_what_differs_from_the_normal_twin() -> None:
    """Compression and enlargement spread a change by some pixels; far from the mask nothing may differ."""
    inside, outside = [], []
    for seed in range(40):
        twin = scene(np.random.default_rng(seed), (160, 160), defective=False)
        drawn = scene(np.random.default_rng(seed), (160, 160), defective=True)
        assert drawn.kind == twin.kind
        assert drawn.mask.any()
        difference = np.abs(drawn.image.astype(int) - twin.image)
        inside.append(difference[drawn.mask].mean())
        outside.append(difference[~drawn.mask].mean())
    assert min(inside) > 2
    assert np.mean(inside) > 15 * np.mean(outside)
    assert max(outside) < 3


def test_defects_come_from_hardly_visible_to_glaring() -> None:
    shares = [scene(np.random.default_rng(seed), (128, 128), defective=True).mask.mean() for seed in range(60)]
    assert min(shares) < 0.004
    assert max(shares) > 0.05


def test_a_missing_feature_is_asked_for_only_where_every_feature_has_its_like() -> None:
    for seed in range(30):
        for kind in LAYOUTS:
            drawn = layout(kind, np.random.default_rng(seed), (80, 80))
            kinds = kinds_for(drawn)
            assert set(SURFACE) <= set(kinds)
            assert (set(NEED_LIKE) <= set(kinds)) == (drawn.regular and drawn.patterned)
            assert bool(set(PATTERN) & set(kinds)) == drawn.patterned


def test_scenes_mix_normal_and_defective_ones_in_the_share_asked_for() -> None:
    assert list(scenes(0, seed=0, size_px=64)) == []
    for share, least, most in ((0.0, 0, 0), (0.5, 10, 30), (1.0, 40, 40)):
        found = list(scenes(40, seed=1, size_px=64, defective_share=share))
        assert least <= sum(bool(mask.any()) for _, mask in found) <= most


def test_every_layout_has_its_share() -> None:
    assert len(SHARES) == len(LAYOUTS)
    assert sum(SHARES) == pytest.approx(1)


def test_more_scenes_begin_like_fewer() -> None:
    few, many = scenes(3, seed=4, size_px=64), scenes(50, seed=4, size_px=64)
    for (image, mask), (same, same_mask) in zip(few, islice(many, 3), strict=True):
        assert np.array_equal(image, same)
        assert np.array_equal(mask, same_mask)
