from dataclasses import replace

import numpy as np
import pytest

from semwatch.errors import ConfigError
from semwatch_training.data.augment import NOTHING, Augmentation, augment, centre_of_mass, imaged, reframed, turned

S, T = 64, 4


def crop(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (S, S), dtype=np.uint8)


def corner_mask() -> np.ndarray:
    mask = np.zeros((T, T), np.float32)
    mask[0, 3] = 0.8
    return mask


def marked() -> tuple[np.ndarray, np.ndarray]:
    """A crop that is white exactly where its mask is 1."""
    mask = np.zeros((T, T), np.float32)
    mask[1, 2] = 1
    return np.kron(mask, np.full((16, 16), 255)).astype(np.uint8), mask


def test_augmentation_of_nothing_gives_the_crop_back() -> None:
    view, mask = augment(crop(), corner_mask(), NOTHING, np.random.default_rng(0))
    assert np.array_equal(view, crop())
    assert np.allclose(mask, corner_mask())


def test_same_seed_same_view_and_another_seed_another() -> None:
    first, again, other = (
        augment(crop(), corner_mask(), Augmentation(), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_input_is_left_alone() -> None:
    pixels, mask = crop(), corner_mask()
    augment(pixels, mask, Augmentation(), np.random.default_rng(0))
    assert np.array_equal(pixels, crop())
    assert np.array_equal(mask, corner_mask())


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_mask_turns_with_its_crop(turns, mirrored) -> None:
    pixels, mask = marked()
    pixels, mask = turned(pixels, turns, mirrored), turned(mask, turns, mirrored)
    assert np.array_equal(pixels, np.kron(mask, np.full((16, 16), 255)))


def test_all_eight_turns_come_up_and_differ() -> None:
    only_turns = Augmentation(True, (1.0, 1.0), 0, 0, 0, 0, 0, 0)
    rng = np.random.default_rng(0)
    views = {augment(crop(), corner_mask(), only_turns, rng)[0].tobytes() for _ in range(80)}
    assert len(views) == 8


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.3])
def test_mask_is_framed_with_its_crop(scale) -> None:
    pixels, mask = marked()
    for seed in range(10):
        view, seen = reframed(pixels, mask, (scale, scale), np.random.default_rng(seed), side_px=S, tokens=T)
        share = view.reshape(T, 16, T, 16).mean(axis=(1, 3)) / 255
        if scale <= 1:  # beyond the border the crop is mirrored and the mask is zero
            assert np.abs(share - seen).max() < 0.05
        assert seen.max() > 0.1


@pytest.mark.parametrize("scale", [0.3, 0.6, 1.0, 1.2])
def test_no_view_loses_the_centre_of_the_defect(scale) -> None:
    for seed in range(20):
        _, seen = reframed(crop(), corner_mask(), (scale, scale), np.random.default_rng(seed), side_px=S, tokens=T)
        assert seen.max() > 0.1


def test_frame_of_side_one_keeps_everything() -> None:
    view, seen = reframed(crop(), corner_mask(), (1.0, 1.0), np.random.default_rng(0), side_px=S, tokens=T)
    assert np.array_equal(view, crop())
    assert np.allclose(seen, corner_mask())


def test_view_may_be_smaller_than_the_crop() -> None:
    view, mask = augment(crop(), corner_mask(), Augmentation(), np.random.default_rng(0), side_px=32, tokens=2)
    assert view.shape == (32, 32)
    assert view.dtype == np.uint8
    assert mask.shape == (2, 2)
    assert mask.dtype == np.float32


def test_empty_mask_stays_empty_and_is_framed_about_the_middle() -> None:
    empty = np.zeros((T, T), np.float32)
    assert centre_of_mass(empty) == (0.5, 0.5)
    assert not augment(crop(), empty, Augmentation(), np.random.default_rng(0))[1].any()


def test_centre_of_mass_is_the_middle_of_the_only_token() -> None:
    assert centre_of_mass(corner_mask()) == pytest.approx((0.875, 0.125))


def test_mask_stays_in_range() -> None:
    full = np.ones((T, T), np.float32)
    for seed in range(20):
        mask = augment(crop(), full, Augmentation(scale=(0.5, 1.5)), np.random.default_rng(seed))[1]
        assert mask.min() >= 0
        assert mask.max() <= 1


@pytest.mark.parametrize(
    ("effect", "reach", "least", "most"),
    [
        ("contrast", 0.5, 27, 30),  # a draw near nothing rounds away
        ("brightness", 0.5, 27, 30),
        ("gamma", 0.5, 27, 30),
        ("charging", 0.5, 27, 30),
        ("shot_noise", 0.5, 27, 30),
        ("defocus_px", 4, 3, 17),  # one view in three
    ],
)
def test_each_effect_of_imaging_changes_the_crop_by_itself(effect, reach, least, most) -> None:
    alone = replace(NOTHING, **{effect: reach})
    changed = [not np.array_equal(imaged(crop(), alone, np.random.default_rng(seed)), crop()) for seed in range(20, 50)]
    assert least <= sum(changed) <= most


def test_noise_grows_with_gray() -> None:
    noisy = Augmentation(False, (1.0, 1.0), 0, 0, 0, 0, 0, shot_noise=0.1)
    spread = []
    for gray in (10, 60, 120):
        view = imaged(np.full((S, S), gray, np.uint8), noisy, np.random.default_rng(3))
        spread.append(view.astype(float).std())
    assert spread[0] < spread[1] < spread[2]
    assert spread[2] / spread[1] == pytest.approx(2**0.5, rel=0.1)  # the noise of counted electrons


def test_charging_is_a_ramp() -> None:
    charged = Augmentation(False, (1.0, 1.0), 0, 0, 0, charging=0.4, defocus_px=0, shot_noise=0)
    view = imaged(np.full((S, S), 128, np.uint8), charged, np.random.default_rng(0)).astype(float)
    assert view.max() - view.min() > 5
    assert np.abs(np.diff(view, n=2, axis=0)).max() <= 2  # linear up to rounding
    assert view.mean() == pytest.approx(128, abs=1)


def test_flat_crop_stays_finite() -> None:
    for gray in (0, 255):
        view, _ = augment(np.full((S, S), gray, np.uint8), corner_mask(), Augmentation(), np.random.default_rng(0))
        assert view.shape == (S, S)


@pytest.mark.parametrize(
    ("pixels", "mask", "message"),
    [
        (np.zeros((4, 5), np.uint8), np.zeros((2, 2), np.float32), "crop must be square"),
        (np.zeros((0, 0), np.uint8), np.zeros((2, 2), np.float32), "crop must be square"),
        (np.zeros((4, 4), np.uint8), np.zeros((2, 3), np.float32), "soft mask must be square"),
        (np.zeros((4, 4), np.uint8), np.full((2, 2), np.nan, np.float32), "without NaN"),
        (np.zeros((4, 4), np.uint8), np.full((2, 2), 1.5, np.float32), r"in \[0, 1\]"),
        (np.zeros((4, 4), np.uint8), np.full((2, 2), -0.1, np.float32), r"in \[0, 1\]"),
    ],
)
def test_what_is_no_crop_with_its_mask_is_refused(pixels, mask, message) -> None:
    with pytest.raises(ConfigError, match=message):
        augment(pixels, mask, Augmentation(), np.random.default_rng(0))
