import math
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from skimage import measure

from semwatch.defects import Box
from semwatch.errors import ImageError
from semwatch.line.binarization import (
    Method,
    binarize,
    clean_mask,
    component_counts,
    conformal_threshold,
    crop_window,
    cut,
    gate,
    literal_plateau,
    plateau,
    regions,
    saliency,
    soft_mask,
    sweep,
)

METHODS: list[Method] = ["plateau", "lowest", "fixed", "otsu", "literal"]
GRID = 112
quickly = settings(deadline=None, max_examples=60, derandomize=True)


def bumps(*peaks: tuple[int, int, float], side: int = 32, sigma: float = 1.5) -> NDArray[np.float32]:
    """Return a score map with a Gaussian bump of the given height at each (row, column) and ripple far below them."""
    rows, cols = np.mgrid[:side, :side]
    score_map = 0.1 + 0.01 * np.random.default_rng(0).standard_normal((side, side))
    for row, col, height in peaks:
        score_map += height * np.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (2 * sigma**2))
    return score_map.astype(np.float32)


def disc(size_hw: tuple[int, int], centre_xy: tuple[int, int], axes_xy: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a black field with a white ellipse."""
    return np.asarray(cv2.ellipse(np.zeros(size_hw, np.uint8), centre_xy, axes_xy, 0, 0, 360, 255, -1))


def centroid(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the centre of mass (row, column) with the array's extent as unit."""
    mass = values.astype(np.float64)
    rows, cols = ((np.arange(n) + 0.5) / n for n in values.shape)
    return np.array([mass.sum(1) @ rows, mass.sum(0) @ cols]) / float(mass.sum())


def inside(box: Box, outer: Box) -> bool:
    return outer[0] <= box[0] and outer[1] <= box[1] and box[2] <= outer[2] and box[3] <= outer[3]


# --- gate ---------------------------------------------------------------------------------------------------------


def test_no_normal_images_give_an_infinite_threshold() -> None:
    assert conformal_threshold(np.zeros(0), false_alarm_rate=0.01) == math.inf


@pytest.mark.parametrize(("rate", "n_least"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1)])
def test_the_threshold_is_finite_from_one_over_rate_minus_one_images_on(rate: float, n_least: int) -> None:
    scores = np.arange(n_least, dtype=np.float64)
    assert conformal_threshold(scores, false_alarm_rate=rate) == n_least - 1
    assert conformal_threshold(scores[1:], false_alarm_rate=rate) == math.inf


def test_the_rank_is_exact_for_every_size_and_rate() -> None:
    for percent in range(1, 100):
        rate = Fraction(percent, 100)
        for n in (*range(1, 120), 299, 999):
            rank = math.ceil((n + 1) * (1 - rate))
            expected = float(rank) if rank <= n else math.inf
            assert conformal_threshold(np.arange(n, 0, -1.0), false_alarm_rate=float(rate)) == expected


def test_new_normal_images_pass_the_gate_at_the_chosen_rate() -> None:
    scores = np.random.default_rng(0).gamma(2.0, size=(4000, 60))
    alarms = [gate(s[-1], threshold=conformal_threshold(s[:-1], false_alarm_rate=0.05)) for s in scores]
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.012)  # 3.5 standard errors


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="leave out"):
        conformal_threshold(np.array([0.1, wrong]), false_alarm_rate=0.5)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_outside_zero_and_one_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="false_alarm_rate"):
        conformal_threshold(np.ones(5), false_alarm_rate=rate)


def test_the_gate_opens_above_the_threshold_and_not_at_it() -> None:
    assert not gate(0.5, threshold=0.5)
    assert gate(0.51, threshold=0.5)
    assert not gate(1e9, threshold=math.inf)


def test_a_nan_score_is_an_image_error_and_not_defect_free() -> None:
    with pytest.raises(ImageError, match="NaN"):
        gate(math.nan, threshold=0.5)


# --- saliency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1.7, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_map_has_no_saliency_and_no_defect(value: float, method: Method) -> None:
    result = binarize(np.full((32, 31), value, np.float32), method=method)
    assert not result.saliency.any()
    assert not result.mask.any()
    assert regions(result.mask, np.full((32, 31), value, np.float32), size_hw=(100, 100)) == []


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_an_image_error(wrong: float) -> None:
    score_map = bumps((5, 5, 1.0))
    score_map[3, 3] = wrong
    with pytest.raises(ImageError, match="score map"):
        binarize(score_map)


def test_saliency_spans_zero_to_one_whatever_the_scale() -> None:
    score_map = bumps((10, 20, 0.5))
    shown = saliency(score_map, grid_px=56)
    assert shown.dtype == np.float32
    assert shown.shape == (56, 56)
    assert (shown.min(), shown.max()) == (0.0, 1.0)
    np.testing.assert_allclose(saliency(1e-3 * score_map, grid_px=56), shown, atol=1e-4)


def test_a_peak_below_a_thousandth_of_the_field_still_shows() -> None:
    score_map = np.zeros((GRID, GRID), np.float32)
    score_map[50, 50:55] = 0.4
    assert saliency(score_map, grid_px=GRID).max() == 1.0


def test_upsampling_covers_the_field_without_a_shift() -> None:
    shown = saliency(bumps((8, 20, 1.0)), grid_px=GRID)
    np.testing.assert_allclose(centroid(shown > 0.5), [8.5 / 32, 20.5 / 32], atol=0.5 / GRID)


# --- sweep --------------------------------------------------------------------------------------------------------


def areas_of_components(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    labels: NDArray[np.intp] = measure.label(mask, connectivity=2)  # type: ignore[no-untyped-call]
    return np.bincount(labels.ravel())[1:]


def reference_counts(shown: NDArray[np.float32], thresholds: NDArray[np.float32], min_area_px: int) -> list[int]:
    return [int((areas_of_components(shown >= threshold) >= min_area_px).sum()) for threshold in thresholds]


def test_counts_are_those_of_the_reference_on_a_thousand_random_maps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        shape = rng.integers(1, 40, 2)
        shown = rng.random(shape).astype(np.float32)
        if rng.random() < 0.7:
            smooth = cv2.GaussianBlur(shown, (0, 0), float(rng.uniform(0.4, 3)))
            shown = saliency(np.asarray(smooth, np.float32), grid_px=int(shape[0]))
        min_area_px, n_thresholds = int(rng.integers(1, 6)), int(rng.integers(1, 24))
        thresholds, fractions, counts = sweep(shown, n_thresholds=n_thresholds, min_area_px=min_area_px)
        assert counts.tolist() == reference_counts(shown, thresholds, min_area_px)
        assert fractions.tolist() == [float((shown >= t).mean()) for t in thresholds]


def test_black_and_white_maps_are_counted() -> None:
    thresholds = np.array([0.9, 0.1], np.float32)
    assert component_counts(np.zeros((4, 4), np.float32), thresholds, min_area_px=1).tolist() == [0, 0]
    assert component_counts(np.ones((4, 4), np.float32), thresholds, min_area_px=1).tolist() == [1, 1]
    assert component_counts(np.ones((4, 4), np.float32), thresholds[:0], min_area_px=1).tolist() == []


def test_small_components_are_not_counted_and_diagonal_neighbours_are_one() -> None:
    shown = np.zeros((8, 8), np.float32)
    shown[0, 0] = shown[1, 1] = shown[2, 2] = shown[5, 5] = 1.0
    assert [int(component_counts(shown, np.array([0.5], np.float32), min_area_px=n)[0]) for n in (1, 2, 3, 4)] == [
        2,
        1,
        1,
        0,
    ]


def test_the_capped_sweep_is_the_head_of_the_full_one() -> None:
    shown = saliency(bumps((8, 8, 0.2), (20, 24, 0.1)))
    thresholds, fractions, counts = sweep(shown, min_area_px=3)
    capped_thresholds, capped_fractions, capped_counts = sweep(shown, min_area_px=3, max_mask_fraction=0.3)
    n_swept = len(capped_thresholds)
    assert 0 < n_swept < 64
    assert capped_fractions[-1] <= 0.3 < fractions[n_swept]
    np.testing.assert_array_equal(capped_thresholds, thresholds[:n_swept])
    np.testing.assert_array_equal(capped_fractions, fractions[:n_swept])
    np.testing.assert_array_equal(capped_counts, counts[:n_swept])


# --- plateau ------------------------------------------------------------------------------------------------------


def flat(n: int, fraction: float = 0.1) -> NDArray[np.float64]:
    return np.full(n, fraction)


def test_no_counts_have_no_plateau() -> None:
    assert plateau(np.zeros(0, np.intp), flat(0)) is None


def test_a_run_of_empty_masks_is_no_plateau() -> None:
    assert plateau(np.zeros(64, np.intp), flat(64, 0.0)) is None
    assert plateau(np.array([0] * 9 + [2, 2, 2, 2]), np.array([0.0] * 9 + [0.1, 0.1, 0.1, 0.1])) == (9, 12)


def test_the_whole_image_is_no_plateau_but_is_one_literally() -> None:
    counts = np.array([1, 2, 2, 2, 2, 5, 9, 4, *[1] * 12])
    fractions = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.29, *[0.9] * 12])
    assert plateau(counts, fractions) == (1, 4)
    assert literal_plateau(counts, fractions) == len(counts) - 1


def test_a_plateau_ends_at_the_cap() -> None:
    fractions = np.linspace(0.01, 1.0, 64)
    assert plateau(np.ones(64, np.intp), fractions, max_mask_fraction=0.3) == (0, np.flatnonzero(fractions <= 0.3)[-1])
    assert plateau(np.ones(64, np.intp), fractions, max_mask_fraction=1.0) == (0, 63)
    assert plateau(np.ones(64, np.intp), fractions, max_mask_fraction=0.001) is None


def test_a_run_below_the_least_length_is_no_plateau() -> None:
    counts = np.array([1, 1, 1, 2, 2, 2, 3])
    assert plateau(counts, flat(7)) is None
    assert plateau(counts, flat(7), min_length=3) == (0, 2)


def test_the_longest_run_wins() -> None:
    assert plateau(np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 7]), flat(10)) == (4, 8)


def test_equal_lengths_are_decided_by_mean_iou_then_by_the_higher_threshold() -> None:
    counts = np.array([1, 1, 1, 1, 2, 2, 2, 2])
    growing, steady = [0.01, 0.02, 0.04, 0.08], [0.10, 0.101, 0.102, 0.103]
    assert plateau(counts, np.array(growing + steady)) == (4, 7)
    assert plateau(counts, np.array([0.01, 0.0101, 0.0102, 0.0103, 0.02, 0.04, 0.08, 0.16])) == (0, 3)
    assert plateau(counts, flat(8)) == (0, 3)
    assert literal_plateau(counts, np.array(growing + steady)) == 7


def test_with_epsilon_one_the_count_does_not_drift() -> None:
    staircase = np.arange(1, 21)
    assert plateau(staircase, flat(20), epsilon=1) is None
    assert literal_plateau(staircase, flat(20), epsilon=1) == 19
    assert plateau(np.array([5, 9, 3, 4, 3, 4, 4, 3, 2, 9]), flat(10), epsilon=1) == (2, 7)


@quickly
@given(
    counts=hnp.arrays(np.intp, st.integers(1, 24), elements=st.integers(0, 3)),
    epsilon=st.integers(0, 1),
    min_length=st.integers(1, 5),
    data=st.data(),
)
def test_no_valid_run_is_longer_than_the_plateau(
    counts: NDArray[np.intp], epsilon: int, min_length: int, data: st.DataObject
) -> None:
    n = len(counts)
    steps = st.lists(st.floats(0, 1), min_size=n, max_size=n)
    fractions = np.sort(np.array(data.draw(steps)))
    run = plateau(counts, fractions, epsilon=epsilon, min_length=min_length, max_mask_fraction=0.6)
    valid = [
        (start, stop)
        for start in range(n)
        for stop in range(start + min_length - 1, n)
        if np.ptp(counts[start : stop + 1]) <= epsilon
        and counts[start : stop + 1].min() >= 1
        and fractions[stop] <= 0.6
    ]
    if run is None:
        assert valid == []
    else:
        longest = max(stop - start for start, stop in valid)
        assert run in [found for found in valid if found[1] - found[0] == longest]


# --- mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_px", [32, 56, 112])
def test_one_hot_token_is_one_defect(grid_px: int) -> None:
    score_map = np.full((32, 32), 0.1, np.float32)
    score_map[7, 21] = 0.6
    result = binarize(score_map, grid_px=grid_px)
    (region,) = regions(result.mask, score_map, size_hw=(320, 640))
    assert inside((420, 70, 440, 80), region.box_xyxy)
    assert region.peak_score == np.float32(0.6)
    assert np.isfinite(result.threshold)


def test_a_defect_of_five_pixels_survives() -> None:
    score_map = 0.01 * np.random.default_rng(0).random((GRID, GRID), np.float32)
    score_map[60, 40:45] = 0.5
    result = binarize(score_map, percentiles=(1.0, 100.0))  # 99.9 leaves out the 12 brightest of 112 x 112
    assert result.mask[60, 40:45].all()
    assert np.count_nonzero(result.mask) == 5


def test_two_bumps_are_two_defects_though_lower_thresholds_merge_them() -> None:
    score_map = bumps((16, 11, 0.5), (16, 21, 0.5), (28, 28, 0.2), sigma=2.4)  # the faint one ends the plateau
    result = binarize(score_map)
    assert len(regions(result.mask, score_map, size_hw=(512, 512))) == 2
    assert component_counts(result.saliency, np.array([0.3, 0.15], np.float32), min_area_px=3).tolist() == [3, 2]


def test_lobes_that_end_the_plateau_by_touching_are_one_region() -> None:
    score_map = bumps((16, 11, 0.5), (16, 21, 0.5), sigma=2.4)
    result = binarize(score_map, method="lowest")
    assert component_counts(result.saliency, np.array([result.threshold], np.float32), min_area_px=3).tolist() == [2]
    assert len(regions(result.mask, score_map, size_hw=(512, 512))) == 1


@pytest.mark.parametrize(("row", "col"), [(0, 0), (0, 15), (31, 31), (16, 31)])
def test_a_defect_at_the_border_is_found_and_its_box_stays_in_the_field(row: int, col: int) -> None:
    score_map = bumps((row, col, 0.6))
    (region,) = regions(binarize(score_map).mask, score_map, size_hw=(480, 640))
    assert inside(region.box_xyxy, (0, 0, 640, 480))
    assert (region.box_xyxy[1] == 0) == (row == 0)
    assert (region.box_xyxy[3] == 480) == (row == 31)
    assert (region.box_xyxy[2] == 640) == (col == 31)


def test_where_no_count_is_stable_the_mask_is_empty_and_the_threshold_infinite() -> None:
    result = binarize(np.random.default_rng(0).random((32, 32), np.float32), min_length=10)
    assert not result.mask.any()
    assert result.threshold == math.inf


def test_the_fixed_otsu_and_literal_methods_keep_their_own_rules() -> None:
    score_map = bumps((8, 8, 0.5), (20, 24, 0.3))
    assert binarize(score_map, method="fixed").threshold == 0.5
    otsu, literal = binarize(score_map, method="otsu"), binarize(score_map, method="literal")
    bright, dark = (otsu.saliency[otsu.saliency >= otsu.threshold], otsu.saliency[otsu.saliency < otsu.threshold])
    assert bright.mean() - dark.mean() > 0.3
    assert len(literal.counts) == 64
    assert len(otsu.counts) == 0


def test_only_the_literal_rule_takes_the_whole_image() -> None:
    score_map = np.full((32, 32), 0.6, np.float32)
    score_map[:6, :6] = 0.1
    assert binarize(score_map, method="literal").mask.mean() > 0.9
    assert not binarize(score_map).mask.any()


def test_holes_are_filled_and_a_frame_is_not() -> None:
    mask = np.zeros((40, 40), np.bool_)
    cv2.circle(mask.view(np.uint8), (12, 12), 6, 1, 1)
    assert clean_mask(mask, min_area_px=1, max_hole_px=480, max_defects=9)[12, 12]
    frame = np.zeros((40, 40), np.bool_)
    frame[3:-3, 3:-3] = True
    frame[4:-4, 4:-4] = False
    np.testing.assert_array_equal(clean_mask(frame, min_area_px=1, max_hole_px=480, max_defects=9), frame)


def test_a_bay_that_is_open_to_the_border_is_no_hole() -> None:
    mask = np.zeros((20, 20), np.bool_)
    mask[:8, 4] = mask[:8, 12] = mask[8, 4:13] = True
    np.testing.assert_array_equal(clean_mask(mask, min_area_px=1, max_hole_px=400, max_defects=9), mask)


def test_the_largest_components_are_kept_and_the_small_ones_dropped() -> None:
    mask = np.zeros((40, 40), np.bool_)
    for idx, side in enumerate((1, 2, 3, 4)):
        mask[10 * idx : 10 * idx + side, :side] = True
    areas = [
        np.count_nonzero(clean_mask(mask, min_area_px=m, max_hole_px=9, max_defects=n))
        for m, n in [(1, 9), (4, 9), (5, 9), (1, 1), (1, 2), (99, 9), (1, 0)]
    ]
    assert areas == [30, 29, 25, 16, 25, 0, 0]


def test_empty_and_full_masks_stay_as_they_are() -> None:
    for mask in (np.zeros((9, 9), np.bool_), np.ones((9, 9), np.bool_)):
        np.testing.assert_array_equal(clean_mask(mask, min_area_px=3, max_hole_px=9, max_defects=3), mask)


score_maps = hnp.arrays(np.float32, (12, 12), elements=st.floats(0, 2, width=16))


@quickly
@given(score_map=score_maps, high=st.floats(0.05, 0.95), low=st.floats(0.05, 0.95))
def test_a_lower_threshold_gives_a_mask_that_holds_the_higher_ones(
    score_map: NDArray[np.float32], high: float, low: float
) -> None:
    shown = saliency(score_map, grid_px=24)
    high, low = max(high, low), min(high, low)
    smaller, larger = (clean_mask(shown >= t, min_area_px=3, max_hole_px=170, max_defects=999) for t in (high, low))
    assert not (smaller & ~larger).any()


@quickly
@given(score_map=score_maps, method=st.sampled_from(METHODS))
def test_a_mask_never_has_more_or_smaller_components_than_allowed(
    score_map: NDArray[np.float32], method: Method
) -> None:
    result = binarize(score_map, method=method, grid_px=40, min_area_fraction=0.003, max_defects=2)
    areas = areas_of_components(result.mask)
    assert len(areas) <= 2
    assert (areas >= 5).all()
    if method in ("plateau", "lowest") and np.isfinite(result.threshold):
        assert (result.saliency >= result.threshold).mean() <= 0.3


# --- regions ------------------------------------------------------------------------------------------------------


def boxes_mask(*boxes: Box, grid_px: int = GRID) -> NDArray[np.bool_]:
    mask = np.zeros((grid_px, grid_px), np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def test_an_empty_mask_has_no_regions() -> None:
    assert regions(boxes_mask(), np.ones((32, 32), np.float32), size_hw=(100, 100)) == []


def test_regions_come_largest_first_and_no_more_than_asked_for() -> None:
    mask = boxes_mask((0, 0, 5, 5), (40, 40, 60, 60), (80, 10, 90, 20))
    found = regions(mask, np.ones((32, 32), np.float32), size_hw=(GRID, GRID))
    assert [region.area_px for region in found] == [400, 100, 25]
    assert [r.box_xyxy for r in regions(mask, np.ones((32, 32), np.float32), size_hw=(GRID, GRID), max_regions=1)] == [
        (40, 40, 60, 60)
    ]


def test_each_axis_is_scaled_by_itself() -> None:
    (region,) = regions(boxes_mask((28, 56, 42, 63)), np.ones((32, 32), np.float32), size_hw=(480, 1024))
    assert region.box_xyxy == (256, 240, 384, 270)
    assert region.area_px == 128 * 30


def test_close_boxes_are_one_region_and_the_merging_goes_on() -> None:
    score_map = np.zeros((32, 32), np.float32)
    chain = boxes_mask((10, 10, 14, 14), (16, 10, 20, 14), (22, 10, 26, 14), (60, 60, 64, 64))

    def found(merge_fraction: float) -> list[Box]:
        return [r.box_xyxy for r in regions(chain, score_map, size_hw=(GRID, GRID), merge_fraction=merge_fraction)]

    assert found(0.025) == [(10, 10, 26, 14), (60, 60, 64, 64)]  # 2 of 112 cells between them
    assert len(found(0.01)) == 4
    assert len(found(1.0)) == 1


def test_a_union_of_boxes_may_reach_a_third_one() -> None:
    corner = boxes_mask((10, 10, 12, 30), (13, 28, 30, 30), (24, 12, 26, 14))
    (region,) = regions(corner, np.zeros((32, 32), np.float32), size_hw=(GRID, GRID), merge_fraction=0.02)
    assert region.box_xyxy == (10, 10, 30, 30)
    np.testing.assert_array_equal(region.mask, corner)


def test_the_peak_is_that_of_the_region_alone() -> None:
    score_map = bumps((5, 5, 1.0), (25, 25, 0.7))
    found = regions(binarize(score_map).mask, score_map, size_hw=(512, 512))
    assert {region.peak_score for region in found} == {float(score_map[5, 5]), float(score_map[25, 25])}


@quickly
@given(mask=hnp.arrays(np.bool_, (14, 14)), height=st.integers(1, 90), width=st.integers(1, 90))
def test_regions_share_out_the_mask_and_their_boxes_hold_it(mask: NDArray[np.bool_], height: int, width: int) -> None:
    found = regions(mask, np.ones((4, 4), np.float32), size_hw=(height, width), max_regions=999)
    shared = np.sum([region.mask for region in found], axis=0) if found else np.zeros_like(mask, np.int_)
    np.testing.assert_array_equal(shared, mask.astype(np.int_))
    for region in found:
        x0, y0, x1, y1 = region.box_xyxy
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        rows, cols = np.nonzero(region.mask)
        assert x0 <= cols.min() * width / 14
        assert x1 >= (cols.max() + 1) * width / 14
        assert y0 <= rows.min() * height / 14
        assert y1 >= (rows.max() + 1) * height / 14


# --- crops --------------------------------------------------------------------------------------------------------


@st.composite
def boxes_in_fields(draw: st.DrawFn) -> tuple[Box, tuple[int, int]]:
    height, width = draw(st.integers(1, 700)), draw(st.integers(1, 700))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))), (height, width)


@quickly
@given(case=boxes_in_fields(), context=st.floats(0.5, 4), min_side_fraction=st.floats(0, 1.5))
def test_windows_are_square_centred_and_hold_the_box(
    case: tuple[Box, tuple[int, int]], context: float, min_side_fraction: float
) -> None:
    box, size_hw = case
    window = crop_window(box, size_hw=size_hw, context=context, min_side_fraction=min_side_fraction)
    side = window[2] - window[0]
    assert side == window[3] - window[1]
    assert side <= max(size_hw)
    assert inside(box, window)
    assert abs((window[0] + window[2]) - (box[0] + box[2])) <= 1
    assert abs((window[1] + window[3]) - (box[1] + box[3])) <= 1


def test_a_small_defect_gets_the_least_window_and_a_field_wide_one_no_more_than_the_field() -> None:
    assert crop_window((500, 500, 504, 504), size_hw=(1024, 2000)) == (450, 450, 553, 553)
    assert crop_window((0, 0, 1000, 1000), size_hw=(1000, 1000)) == (0, 0, 1000, 1000)


@quickly
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    left=st.integers(-30, 30),
    top=st.integers(-30, 30),
    side=st.integers(1, 40),
)
def test_outside_the_field_a_crop_is_mirrored_however_far(
    height: int, width: int, left: int, top: int, side: int
) -> None:
    field = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)
    padded = np.pad(field, 80, mode="reflect")
    expected = padded[80 + top : 80 + top + side, 80 + left : 80 + left + side]
    np.testing.assert_array_equal(cut(field, (left, top, left + side, top + side), side_px=side), expected)


@pytest.mark.parametrize("window", [(0, 0, 40, 40), (-30, 20, 70, 120), (10, 10, 14, 14), (-200, -200, 300, 300)])
@pytest.mark.parametrize("side_px", [1, 16, 224])
def test_a_crop_is_always_square_and_of_the_asked_size(window: Box, side_px: int) -> None:
    field = np.full((60, 90), 77, np.uint8)
    crop = cut(field, window, side_px=side_px)
    assert crop.dtype == np.uint8
    np.testing.assert_array_equal(crop, np.full((side_px, side_px), 77, np.uint8))


def test_shrinking_averages_so_that_a_single_pixel_leaves_a_trace() -> None:
    field = np.zeros((640, 640), np.uint8)
    field[333, 217] = 255
    assert np.count_nonzero(cut(field, (0, 0, 640, 640), side_px=160)) == 1


def test_a_crop_does_not_change_the_field() -> None:
    field = np.zeros((300, 300), np.uint8)
    crop = cut(field, (10, 10, 234, 234), side_px=224)
    crop[:] = 9
    assert not field.any()


# --- soft masks ---------------------------------------------------------------------------------------------------


def test_a_region_outside_the_window_or_absent_leaves_an_empty_soft_mask() -> None:
    ones = np.ones((GRID, GRID), np.float32)
    assert not soft_mask(ones, boxes_mask(), (0, 0, 100, 100), size_hw=(1000, 1000), tokens=16).any()
    assert not soft_mask(
        ones, boxes_mask((100, 100, 110, 110)), (0, 0, 500, 500), size_hw=(1000, 1000), tokens=16
    ).any()


def test_outside_the_field_the_soft_mask_is_zero_and_inside_it_is_the_heat() -> None:
    heat = np.full((GRID, GRID), 0.25, np.float32)
    values = soft_mask(heat, boxes_mask((0, 0, GRID, GRID)), (-500, -500, 500, 500), size_hw=(1000, 1000), tokens=16)
    expected = np.zeros((16, 16), np.float32)
    expected[8:, 8:] = 0.25
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_only_this_region_is_in_its_soft_mask() -> None:
    score_map = bumps((10, 10, 0.6), (10, 24, 0.6))
    result = binarize(score_map)
    left, right = sorted(regions(result.mask, score_map, size_hw=(512, 512)), key=lambda region: region.box_xyxy)
    window = (0, 0, 512, 512)
    values = soft_mask(result.saliency, left.mask, window, size_hw=(512, 512), tokens=32)
    assert values[10, 10] > 0.8
    assert values[10, 24] == 0
    assert soft_mask(result.saliency, right.mask, window, size_hw=(512, 512), tokens=32)[10, 24] > 0.8


@quickly
@given(score_map=score_maps, height=st.integers(20, 300), width=st.integers(20, 300), tokens=st.integers(1, 20))
def test_soft_masks_lie_in_zero_to_one_and_show_every_region(
    score_map: NDArray[np.float32], height: int, width: int, tokens: int
) -> None:
    result = binarize(score_map, grid_px=40, method="fixed")
    for region in regions(result.mask, score_map, size_hw=(height, width)):
        window = crop_window(region.box_xyxy, size_hw=(height, width))
        values = soft_mask(result.saliency, region.mask, window, size_hw=(height, width), tokens=tokens)
        assert values.shape == (tokens, tokens)
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert 0 < values.max() <= 1


@quickly
@given(
    centre=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    axes=st.tuples(st.integers(12, 120), st.integers(12, 120)),
    size_hw=st.sampled_from([(1024, 1024), (480, 1200), (900, 640)]),
)
def test_the_soft_mask_lies_on_the_defect_of_the_crop(
    centre: tuple[float, float], axes: tuple[int, int], size_hw: tuple[int, int]
) -> None:
    height, width = size_hw
    field = disc(size_hw, (int(centre[0] * (width - 1)), int(centre[1] * (height - 1))), axes)
    heat = cv2.resize(field.astype(np.float32) / 255, (GRID, GRID), interpolation=cv2.INTER_AREA)
    shown = np.asarray(heat, np.float32)
    (region,) = regions(shown > 0, shown, size_hw=size_hw)
    window = crop_window(region.box_xyxy, size_hw=size_hw)
    inner = np.zeros((window[3] - window[1], window[2] - window[0]), np.uint8)  # without the mirrored part
    x0, y0, x1, y1 = max(window[0], 0), max(window[1], 0), min(window[2], width), min(window[3], height)
    inner[y0 - window[1] : y1 - window[1], x0 - window[0] : x1 - window[0]] = field[y0:y1, x0:x1]
    crop = cut(inner, (0, 0, inner.shape[1], inner.shape[0]), side_px=224)
    values = soft_mask(shown, region.mask, window, size_hw=size_hw, tokens=16)
    np.testing.assert_allclose(centroid(values), centroid(crop), atol=0.5 / 16)


def test_from_score_map_to_soft_mask_the_defect_stays_in_place() -> None:
    field = disc((1024, 1536), (400, 700), (140, 90))
    coverage = cv2.resize(field.astype(np.float32) / 255, (32, 32), interpolation=cv2.INTER_AREA)
    score_map = np.asarray(bumps() + 0.6 * coverage, np.float32)
    result = binarize(score_map)
    (region,) = regions(result.mask, score_map, size_hw=field.shape[:2])
    window = crop_window(region.box_xyxy, size_hw=field.shape[:2])
    assert inside((260, 610, 541, 791), window)
    values = soft_mask(result.saliency, region.mask, window, size_hw=field.shape[:2], tokens=16)
    np.testing.assert_allclose(centroid(values), centroid(cut(field, window, side_px=224)), atol=0.5 / 16)
    assert 0.8 <= region.area_px / np.count_nonzero(field) <= 1.2
    generous = np.count_nonzero(binarize(score_map, method="lowest").mask) / np.count_nonzero(result.mask)
    assert 1.2 < generous < 2.5
