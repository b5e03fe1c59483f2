import cv2
import numpy as np

from semwatch_training.evaluation import near_duplicates
from semwatch_training.evaluation.real_splits import auroc_deviation, cross_calibrated, folds_of, mean_rate


def texture(seed: int, side: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (12, 12), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)


def retouched(image: np.ndarray) -> np.ndarray:
    changed = image.copy()
    changed[20:28, 30:38] = 255
    return changed


# ---- near duplicates ----


def test_no_image_has_no_group() -> None:
    assert near_duplicates.groups([]).tolist() == []


def test_different_textures_are_groups_of_their_own() -> None:
    assert len(set(near_duplicates.groups([texture(seed) for seed in range(8)]).tolist())) == 8


def test_turned_mirrored_retouched_and_resized_copies_are_of_one_group() -> None:
    image = texture(0)
    noisy = (image + np.random.default_rng(1).normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)
    copies = [np.rot90(image, 3), image[:, ::-1], image.T, retouched(image), cv2.resize(image, (208, 208)), noisy]
    groups = near_duplicates.groups([image, texture(1), *map(np.ascontiguousarray, copies)])
    assert set(groups[2:].tolist()) == {groups[0]}
    assert groups[1] != groups[0]


def test_constant_images_are_alike_and_no_other_is_like_them() -> None:
    black, gray = np.zeros((64, 64), np.uint8), np.full((64, 64), 90, np.uint8)
    groups = near_duplicates.groups([black, gray, texture(0)])
    assert groups[0] == groups[1] != groups[2]


# ---- folds ----


def test_folds_keep_duplicates_together_and_classes_even() -> None:
    classes = ["a"] * 40 + ["b"] * 20
    groups = np.array([i // 2 for i in range(60)])
    folds = folds_of(classes, groups, n_folds=5, seed=0)
    assert all(len(set(folds[groups == group].tolist())) == 1 for group in set(groups.tolist()))
    for fold in range(5):
        assert np.sum(folds[:40] == fold) == 8
        assert np.sum(folds[40:] == fold) == 4
    assert not np.array_equal(folds, folds_of(classes, groups, n_folds=5, seed=1))


def test_folds_of_one_group_are_one_fold() -> None:
    assert len(set(folds_of(["a"] * 7, np.zeros(7, np.intp), n_folds=5, seed=0).tolist())) == 1


# ---- gates ----


def test_too_few_clean_images_give_no_calibrated_gate() -> None:
    raw, clean = np.arange(20.0), np.arange(20) < 15
    assert cross_calibrated(raw, clean, np.arange(20), false_alarm_rate=0.05, seeds=(0,)) is None


def test_a_calibrated_gate_keeps_its_rate_and_finds_what_lies_above_all_clean_images() -> None:
    rng = np.random.default_rng(0)
    raw = np.concatenate([rng.normal(size=200), rng.normal(20, 1, 50)])
    clean = np.arange(250) < 200
    opened = cross_calibrated(raw, clean, np.arange(250), false_alarm_rate=0.05, seeds=(0, 1, 2))
    assert opened is not None
    assert opened.shape == (3, 250)
    assert mean_rate(opened[:, clean]).rate < 0.08
    assert mean_rate(opened[:, ~clean]).rate == 1
    assert mean_rate(opened[:, ~clean]).n == 50


def test_deviation_of_an_auroc_is_none_where_all_is_in_order_and_undefined_for_one_group() -> None:
    raw, defective = np.arange(20.0), np.arange(20) >= 10
    assert auroc_deviation(raw, defective, np.arange(20)) < 1e-9
    assert auroc_deviation(raw[::-1].copy() + np.tile([0, 9], 10), defective, np.arange(20)) > 0
    assert np.isnan(auroc_deviation(raw, defective & False, np.arange(20)))
