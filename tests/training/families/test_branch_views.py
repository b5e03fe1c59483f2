from itertools import islice

import numpy as np
import pytest

from semwatch.errors import ConfigError
from semwatch_training.data import pattern_defects
from semwatch_training.data.datasets import MAX_SEEDS
from semwatch_training.data.pattern_defects import LARGEST_SHARE
from semwatch_training.data.pseudo_defects import Planted
from semwatch_training.families.branch import branch_views
from semwatch_training.families.branch.branch_views import SIDES_PX, synthetic_fields, synthetic_views, vary, views
from semwatch_training.synthetic import DEFECT_TYPES, STAGES, SyntheticMicrograph


def noise(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 180, (side, side), dtype=np.uint8)


def made(stage: str, labels: tuple[str, ...], size_hw: tuple[int, int], box: tuple[int, int, int, int]):
    """A black field whose defects, if any, fill a box (x0, y0, x1, y1)."""
    masks = np.zeros((len(labels), *size_hw), bool)
    x0, y0, x1, y1 = box
    masks[:, y0:y1, x0:x1] = True
    return SyntheticMicrograph(np.zeros(size_hw, np.uint8), masks, labels, stage, 0, 1.0, np.zeros(size_hw))


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, tuple[str, ...], range, tuple[int, int]]]:
    """What was asked of the generator; every field is black, its defect 64 x 64 px at the upper left corner."""
    calls: list[tuple[str, tuple[str, ...], range, tuple[int, int]]] = []

    def noted(stage: str, labels: tuple[str, ...], seeds: range, size_hw: tuple[int, int]) -> SyntheticMicrograph:
        calls.append((stage, labels, seeds, size_hw))
        return made(stage, labels, size_hw, (0, 0, 64, 64))

    monkeypatch.setattr(branch_views, "first_with_room", noted)
    return calls


# ---- synthetic fields ----


def test_no_field_is_rendered_unasked(asked) -> None:
    assert list(synthetic_fields(0, first_seed=1, size_px=32, defective=True)) == []
    assert list(synthetic_views(0, 0, 0, seed=0, size_px=32)) == []
    assert asked == []


def test_normal_fields_take_the_stages_in_turn_and_have_an_empty_mask(asked) -> None:
    found = list(synthetic_fields(6, first_seed=50, size_px=32, defective=False))
    assert [stage for stage, *_ in asked] == [*STAGES, *STAGES]
    assert {labels for _, labels, *_ in asked} == {()}
    assert {(image.shape, mask.shape, bool(mask.any())) for image, mask in found} == {((32, 32), (32, 32), False)}


def test_defective_fields_take_each_stages_types_in_turn(asked) -> None:
    list(synthetic_fields(9, first_seed=50, size_px=32, stages=("DEP", "DPR"), defective=True))
    dep, dpr = DEFECT_TYPES["DEP"], DEFECT_TYPES["DPR"]
    of_stage = {stage: [labels for s, labels, *_ in asked if s == stage] for stage in ("DEP", "DPR")}
    assert of_stage == {
        "DEP": [(dep[i % len(dep)],) for i in range(5)],
        "DPR": [(dpr[i],) for i in range(4)],
    }


def test_no_two_fields_may_try_the_same_seed(asked) -> None:
    list(synthetic_fields(7, first_seed=50, size_px=32, defective=False))
    seeds = [set(given) for _, _, given, _ in asked]
    assert all(len(given) == MAX_SEEDS for given in seeds)
    assert len(set().union(*seeds)) == 7 * MAX_SEEDS
    assert [given[0] for _, _, given, _ in asked] == list(range(50, 57))


def test_fields_are_rendered_square_at_a_spread_of_sizes(asked) -> None:
    list(synthetic_fields(60, first_seed=0, size_px=16, defective=False))
    sides = [size_hw for *_, size_hw in asked]
    assert all(height == width for height, width in sides)
    assert {height for height, _ in sides} == set(SIDES_PX)


def test_masks_shrink_with_their_field_and_a_small_defect_keeps_its_most_covered_cells(asked, monkeypatch) -> None:
    monkeypatch.setattr(branch_views, "CUT_SHARE", 0.0)
    for size_px in (128, 16, 4):
        found = list(synthetic_fields(12, first_seed=0, size_px=size_px, defective=True))
        for (_, mask), (*_, (side, _)) in zip(found, asked[-12:], strict=True):
            cells = 64 * size_px / side
            assert mask[0, 0]
            assert mask.sum() == pytest.approx(max(cells, 1) ** 2, rel=0.5)


def test_window_cut_out_of_a_field_shows_part_of_its_defect(asked, monkeypatch) -> None:
    monkeypatch.setattr(branch_views, "CUT_SHARE", 1.0)
    found = list(synthetic_fields(12, first_seed=0, size_px=128, defective=True))
    assert all(image.shape == mask.shape == (128, 128) and mask.any() for image, mask in found)
    areas = [int(mask.sum()) for _, mask in found]
    assert max(areas) > 4 * min(areas), "at a spread of scales"


# ---- views ----


def test_each_background_is_shown_twice_like_a_normal_field(asked) -> None:
    found = list(synthetic_views(1, 2, 1, seed=0, size_px=64, stages=("DEP",)))
    assert len(found) == 2 * (1 + 2) + 1
    assert [bool(mask.any()) for _, mask in found[:6:2]] == [False] * 3
    assert [bool(mask.any()) for _, mask in found[1:6:2]] == [True] * 3
    assert found[-1][1].any()


def test_scenes_of_no_process_come_after_the_labelled_fields(asked) -> None:
    found = list(synthetic_views(0, 0, 1, seed=0, size_px=64, stages=("DEP",), n_scenes=12))
    assert len(found) == 1 + 12
    assert {image.shape for image, _ in found} == {(64, 64)}
    assert 2 <= sum(bool(mask.any()) for _, mask in found[1:]) <= 10


def test_foreign_texture_comes_from_the_last_few_normals_and_never_from_the_image_itself(monkeypatch) -> None:
    given: list[tuple[int, list[int]]] = []
    normals = [noise(seed) for seed in range(5)]
    number = {image.tobytes(): index for index, image in enumerate(normals)}

    def noted(image: np.ndarray, rng: np.random.Generator, *, donors: list[np.ndarray]) -> Planted:
        given.append((number[image.tobytes()], [number[donor.tobytes()] for donor in donors]))
        return Planted(image, np.ones(image.shape, bool), "texture")

    monkeypatch.setattr(pattern_defects, "plant", noted)
    list(views(normals, [], seed=0, n_donors=3))
    assert given == [(0, []), (1, [0]), (2, [1, 0]), (3, [2, 1, 0]), (4, [3, 2, 1])]


def test_views_are_drawn_one_by_one() -> None:
    """A training set of thousands of images must not lie in memory."""

    def normals():
        yield noise(0)
        raise AssertionError("the second image was read before the views of the first were used")

    assert len(list(islice(views(normals(), [], seed=0), 2))) == 2


def test_another_seed_gives_other_views() -> None:
    one, two = (list(views([noise(0)], [], seed=seed)) for seed in (0, 1))
    assert not np.array_equal(one[0][0], two[0][0])


def test_variation_keeps_size_and_type_and_gives_all_eight_sides_and_negatives() -> None:
    image = np.zeros((32, 32), np.uint8)
    image[:8, :16] = 200  # no symmetry
    mask = image > 0
    seen, negatives = set(), 0
    for seed in range(200):
        varied, turned = vary(image, mask, np.random.default_rng(seed))
        assert (varied.shape, varied.dtype, turned.dtype, int(turned.sum())) == ((32, 32), np.uint8, bool, 128)
        seen.add(turned.tobytes())
        negatives += varied[turned].mean() < varied[~turned].mean()
    assert len(seen) == 8
    assert 10 < negatives < 60  # one in seven of 200


# ---- planted defects ----


def test_small_images_are_refused_and_black_ones_are_not() -> None:
    with pytest.raises(ConfigError, match="at least 16 px"):
        list(views([np.zeros((8, 8), np.uint8)], [], seed=0))
    (_, empty), (planted, mask) = views([np.zeros((64, 64), np.uint8)], [], seed=0)
    assert not empty.any()
    assert 0 < mask.mean() <= LARGEST_SHARE
    assert planted[mask].std() > 1


def test_unknown_distortion_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pattern defect is called 'melt'; choose one of swell, warp"):
        pattern_defects.distort(noise(0), np.random.default_rng(0), kind="melt")
