"""Planting of generic defects."""

import numpy as np
import pytest

from semwatch.errors import ConfigError
from semwatch_training.data import pseudo_defects
from semwatch_training.data.pseudo_defects import KINDS, MIN_AREA_PX, MIN_SIDE_PX, plant


def normal(size_hw: tuple[int, int] = (96, 128), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(120, 6, size_hw).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_defect_changes_the_image_where_its_mask_says(kind: str) -> None:
    image = normal()
    for seed in range(10):
        planted = plant(image, np.random.default_rng(seed), kind=kind, donors=[normal((50, 70), 9)])
        changed = np.abs(planted.pixels.astype(int) - image)
        assert planted.kind == kind
        assert planted.pixels.shape == planted.mask.shape == image.shape
        assert (planted.pixels.dtype, planted.mask.dtype) == (np.uint8, np.bool_)
        assert planted.mask.sum() >= MIN_AREA_PX
        assert changed[planted.mask].mean() > 4
        assert changed[planted.mask].mean() > 4 * changed[~planted.mask].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_state_plants_the_same_and_another_plants_another(kind: str) -> None:
    image = normal()
    first, again, other = (plant(image, np.random.default_rng(seed), kind=kind) for seed in (5, 5, 6))
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.pixels, other.pixels)


def test_every_kind_is_drawn_when_none_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    assert {plant(normal((32, 32)), rng).kind for _ in range(80)} == set(KINDS)


def test_the_image_given_is_left_as_it_was() -> None:
    image = normal()
    before = image.copy()
    for kind in KINDS:
        plant(image, np.random.default_rng(1), kind=kind)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_image_gets_a_visible_defect_too(kind: str, level: int) -> None:
    blank = np.full((64, 40), level, np.uint8)
    for seed in range(5):
        planted = plant(blank, np.random.default_rng(seed), kind=kind)
        assert planted.mask.sum() >= MIN_AREA_PX
        assert (planted.pixels != blank).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_and_a_very_long_image_are_taken(kind: str) -> None:
    for size_hw in ((MIN_SIDE_PX, MIN_SIDE_PX), (MIN_SIDE_PX, 400), (400, MIN_SIDE_PX)):
        assert plant(normal(size_hw), np.random.default_rng(2), kind=kind).mask.any()


def test_an_unknown_kind_is_named_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"bubble.*texture, paste"):
        plant(normal(), np.random.default_rng(0), kind="bubble")


@pytest.mark.parametrize(
    "image",
    [np.zeros((0, 0), np.uint8), np.zeros((15, 99), np.uint8), np.zeros((64, 64)), np.zeros((64, 64, 3), np.uint8)],
)
def test_an_image_too_small_or_of_another_type_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="uint8 gray image of at least 16 px"):
        plant(image, np.random.default_rng(0))


@pytest.mark.parametrize("level", [0, 127, 255])
def test_what_no_try_could_show_is_planted_in_a_corner(monkeypatch, level: int) -> None:
    monkeypatch.setattr(pseudo_defects, "TRIES", 0)
    planted = plant(np.full((16, 64), level, np.uint8), np.random.default_rng(0), kind="hole")
    assert planted.mask[:4, :16].all()
    assert planted.mask.sum() == 64
