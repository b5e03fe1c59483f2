import cv2
import numpy as np
import pytest
from sklearn import metrics

from semwatch.errors import ConfigError
from semwatch_training.metrics.detection_metrics import (
    aupro,
    average_precision,
    class_auroc,
    f1_max,
    false_alarm_rate,
    image_auroc,
    pixel_auroc,
    pixel_metrics,
)

NONE = np.zeros(0)
NO_TRUTH = np.zeros(0, bool)


def tied_scores(seed: int, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Scores of few distinct values, so that many are tied across the two kinds."""
    rng = np.random.default_rng(seed)
    defective = rng.random(n) < 0.4
    return np.round(rng.normal(size=n) + defective, 1), defective


def maps_and_masks(seed: int, n: int = 5, size: int = 24) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Coarse score levels (ties), several regions an image, touching corners among them; the last image is normal."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for index in range(n):
        mask = np.zeros((size, size), bool)
        if index < n - 1:
            mask[2:5, 3:9] = True
            mask[5:7, 9:11] = True  # touches the one above by a corner: one region
            mask[15 : 16 + index, 18:20] = True
        maps.append(np.round(rng.normal(size=(size, size)) + 1.5 * mask * rng.random(), 1).astype(np.float32))
        masks.append(mask)
    return maps, masks


def brute_force_aupro(maps: list[np.ndarray], masks: list[np.ndarray], max_fpr: float) -> float:
    """The definition, threshold by threshold."""
    normal = np.concatenate([m[~t] for m, t in zip(maps, masks, strict=True)])
    regions = []
    for score_map, mask in zip(maps, masks, strict=True):
        count, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        regions += [score_map[numbers == i] for i in range(1, count)]
    thresholds = np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]
    fpr = np.array([0.0] + [np.mean(normal >= t) for t in thresholds])
    overlap = np.array([0.0] + [np.mean([np.mean(r >= t) for r in regions]) for t in thresholds])
    inside = fpr < max_fpr
    fpr_cut = np.append(fpr[inside], max_fpr)
    overlap_cut = np.append(overlap[inside], np.interp(max_fpr, fpr, overlap))
    return float(np.trapezoid(overlap_cut, fpr_cut)) / max_fpr


@pytest.mark.parametrize("figure", [image_auroc, average_precision, f1_max])
def test_image_figures_refuse_nothing_uneven_lengths_nan_and_numbers_as_truth(figure) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        figure(NONE, NO_TRUTH)
    with pytest.raises(ConfigError, match="one score and one truth"):
        figure(np.zeros(3), np.zeros(2, bool))
    with pytest.raises(ConfigError, match="1 of 2 scores are not finite"):
        figure(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(ConfigError, match="not finite"):
        figure(np.array([0.0, np.inf]), np.array([True, False]))
    with pytest.raises(ConfigError, match="truth is bool"):
        figure(np.zeros(2), np.array([0, 1]))


def test_image_auroc_of_one_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="all 3 samples are normal"):
        image_auroc(np.arange(3.0), np.zeros(3, bool))
    with pytest.raises(ConfigError, match="all 3 samples are defective"):
        image_auroc(np.arange(3.0), np.ones(3, bool))


def test_image_auroc_counts_pairs_in_order_and_ties_half() -> None:
    truth = np.array([False, False, True, True])
    assert image_auroc(np.array([1.0, 2, 3, 4]), truth) == 1
    assert image_auroc(np.array([4.0, 3, 2, 1]), truth) == 0
    assert image_auroc(np.array([5.0, 5, 5, 5]), truth) == 0.5
    assert image_auroc(np.array([1.0, 3, 2, 3]), truth) == pytest.approx((1 + 0 + 1 + 0.5) / 4)


def test_class_auroc_sets_each_class_against_all_normals() -> None:
    scores = np.array([1.0, 2, 3, 0, 4, 5])
    labels = np.array(["ok", "ok", "pit", "pit", "arc", "arc"])
    assert class_auroc(scores, labels, "ok") == {"arc": 1.0, "pit": 0.5}
    assert list(class_auroc(scores, labels, "ok")) == ["arc", "pit"]


@pytest.mark.parametrize("labels", [["pit", "arc"], ["ok", "ok"]])
def test_class_auroc_without_normals_or_without_defects_is_refused(labels: list[str]) -> None:
    with pytest.raises(ConfigError, match="labelled 'ok'"):
        class_auroc(np.array([1.0, 2.0]), np.array(labels), "ok")


def test_precision_needs_defects_but_no_normals() -> None:
    with pytest.raises(ConfigError, match="all 2 samples are normal"):
        average_precision(np.zeros(2), np.zeros(2, bool))
    with pytest.raises(ConfigError, match="all 2 samples are normal"):
        f1_max(np.zeros(2), np.zeros(2, bool))
    assert average_precision(np.arange(2.0), np.ones(2, bool)) == 1
    assert f1_max(np.arange(2.0), np.ones(2, bool)) == (1, 0)


def test_f1_max_by_hand() -> None:
    # from the top: TP, FP, TP, FP; F1 is 2/3, 1/2, 4/5, 2/3
    assert f1_max(np.array([4.0, 3, 2, 1]), np.array([True, False, True, False])) == (pytest.approx(0.8), 2)


@pytest.mark.parametrize("seed", range(5))
def test_f1_max_is_the_best_of_scikit_learns_curve_and_its_threshold_reaches_it(seed: int) -> None:
    scores, truth = tied_scores(seed)
    precision, recall, _ = metrics.precision_recall_curve(truth, scores)
    found = f1_max(scores, truth)
    assert found.f1 == pytest.approx((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())
    assert metrics.f1_score(truth, scores >= found.threshold) == pytest.approx(found.f1)


def test_false_alarms_are_scores_above_the_gate_not_at_it() -> None:
    rate = false_alarm_rate(np.array([0.1, 0.5, 0.5, 0.9]), 0.5)
    assert (rate.rate, rate.n) == (0.25, 4)
    with pytest.raises(ConfigError, match="at least one"):
        false_alarm_rate(NONE, 0.5)
    with pytest.raises(ConfigError, match="not finite"):
        false_alarm_rate(np.array([np.nan]), 0.5)


@pytest.mark.parametrize("figure", [pixel_auroc, aupro, pixel_metrics])
def test_pixel_figures_refuse_what_has_no_answer(figure) -> None:
    plain, defect = np.zeros((4, 4), np.float32), np.eye(4, dtype=bool)
    with pytest.raises(ConfigError, match="no mask of 0"):
        figure([], [])
    with pytest.raises(ConfigError, match="as many masks"):
        figure([plain, plain], [defect])
    with pytest.raises(ConfigError, match="as many masks"):
        figure([plain], [defect, defect])
    with pytest.raises(ConfigError, match="no mask of 2 holds a defect"):
        figure([plain, plain], [np.zeros((4, 4), bool)] * 2)
    with pytest.raises(ConfigError, match="every pixel is defective"):
        figure([plain], [np.ones((4, 4), bool)])
    with pytest.raises(ConfigError, match="image 1: the score map"):
        figure([plain, np.full((4, 4), np.nan, np.float32)], [defect, defect])
    with pytest.raises(ConfigError, match="image 0: need a score map"):
        figure([plain], [defect.astype(np.uint8)])
    with pytest.raises(ConfigError, match="image 0: need a score map"):
        figure([plain[0]], [defect])
    with pytest.raises(ConfigError, match="image 0: need a score map"):
        figure([plain], [np.zeros((0, 4), bool)])


@pytest.mark.parametrize("max_fpr", [0.0, 1.5, np.nan])
def test_aupro_refuses_a_limit_outside_0_to_1(max_fpr: float) -> None:
    maps, masks = maps_and_masks(0)
    with pytest.raises(ConfigError, match="max_fpr"):
        aupro(maps, masks, max_fpr=max_fpr)
    with pytest.raises(ConfigError, match="max_fpr"):
        pixel_metrics(maps, masks, max_fpr=max_fpr)


@pytest.mark.parametrize("seed", range(3))
def test_pixel_figures_are_scikit_learns_on_all_pixels(seed: int) -> None:
    maps, masks = maps_and_masks(seed)
    scores, truth = np.ravel(maps), np.ravel(masks)
    found = pixel_metrics(maps, masks, size_hw=None)
    assert found.auroc == pytest.approx(metrics.roc_auc_score(truth, scores))
    assert found.average_precision == pytest.approx(metrics.average_precision_score(truth, scores))
    assert found.f1_max == pytest.approx(f1_max(scores, truth))
    assert found.n_regions == 8
    assert pixel_auroc(maps, masks, size_hw=None) == found.auroc
    assert aupro(maps, masks, size_hw=None) == found.aupro


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_fpr", [0.01, 0.3, 1.0])
def test_aupro_is_the_brute_force_one(seed: int, max_fpr: float) -> None:
    maps, masks = maps_and_masks(seed)
    expected = brute_force_aupro(maps, masks, max_fpr)
    assert 0.01 < expected < 0.99
    assert aupro(maps, masks, max_fpr=max_fpr, size_hw=None) == pytest.approx(expected, abs=1e-9)


def test_aupro_counts_small_and_large_regions_alike() -> None:
    mask = np.zeros((10, 10), bool)
    mask[0, 0], mask[5:, :] = True, True
    only_large, only_small = (mask & (np.arange(10)[:, None] >= 5)), (mask & (np.arange(10)[:, None] < 5))
    for found in (only_large, only_small):
        # one region wholly found before any false alarm, the other with all the rest: 1/2, then a line up to 1
        assert aupro([found.astype(float)], [mask], size_hw=None, max_fpr=1.0) == pytest.approx(0.75)
    assert pixel_auroc([only_small.astype(float)], [mask], size_hw=None) < 0.52


def test_a_perfect_map_scores_1_and_a_constant_one_a_half() -> None:
    _, masks = maps_and_masks(0)
    perfect = pixel_metrics([m.astype(np.float32) for m in masks], masks, size_hw=None)
    assert (perfect.auroc, perfect.aupro, perfect.average_precision) == pytest.approx((1, 1, 1))
    assert perfect.f1_max == (1, 1)
    assert pixel_auroc([np.zeros(m.shape) for m in masks], masks, size_hw=None) == pytest.approx(0.5)


def test_masks_of_another_size_than_the_map_are_compared_at_the_size_asked_for() -> None:
    mask = np.zeros((32, 48), bool)
    mask[8:16, 8:24] = True
    score_map = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 3)[::2, ::2]
    twice = np.kron(mask, np.ones((2, 2))).astype(bool)
    normal, no_defect = np.zeros((5, 7)), np.zeros((9, 9), bool)
    one = pixel_metrics([score_map, normal], [mask, no_defect], size_hw=(32, 48))
    two = pixel_metrics([score_map, normal], [twice, no_defect], size_hw=(32, 48))
    assert one == two
    assert one.auroc > 0.95


def test_a_pixel_of_comparison_is_defective_when_half_of_it_is() -> None:
    score_map = np.arange(16, dtype=np.float32).reshape(4, 4)
    fine, coarse = np.zeros((16, 16), bool), np.zeros((4, 4), bool)
    fine[4:8, 4:10] = True  # the second pixel wholly, half of the third
    fine[8:12, 4:9] = True  # the second pixel wholly, a quarter of the third
    coarse[1, 1:3], coarse[2, 1] = True, True
    assert pixel_metrics([score_map], [fine], size_hw=(4, 4)) == pixel_metrics([score_map], [coarse], size_hw=(4, 4))


def test_a_defect_thinner_than_a_pixel_of_comparison_does_not_vanish() -> None:
    mask = np.zeros((512, 512), bool)
    mask[100, 40:400] = True
    found = pixel_metrics([mask.astype(np.float32)], [mask], size_hw=(64, 64))
    assert found.n_regions == 1
    assert found.auroc == 1


def test_maps_may_come_one_at_a_time() -> None:
    maps, masks = maps_and_masks(1)
    assert pixel_auroc(iter(maps), iter(masks), size_hw=None) == pixel_auroc(maps, masks, size_hw=None)
