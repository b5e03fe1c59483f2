import cv2
import numpy as np
import pytest

from semwatch.defects import Micrograph
from semwatch.line.detection import detect
from semwatch.line.inputs import for_detector
from semwatch.line.pipeline import search
from semwatch.line.scaling import resize
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 300), (300, 64), (1024, 768)])
def test_any_field_gives_the_token_grid(tiny_repository, size_hw) -> None:
    field = np.random.default_rng(0).integers(0, 256, size_hw, dtype=np.uint8)
    with Embedded(tiny_repository) as models:
        score_map, detector = detect(for_detector(models.meta("detector"), field), models)
    assert score_map.values.shape == (8, 8)
    assert np.isfinite(score_map.raw_score)
    assert detector.version == 1


def test_info_bar_outside_the_field_changes_nothing(tiny_repository) -> None:
    field = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    with_bar = np.vstack([field, np.full((32, 128), 255, np.uint8)])
    with Embedded(tiny_repository) as models:
        plain, barred = (
            search(Micrograph(pixels, (0, 0, 128, 128), 0, None, None), Recipe(), models).score_map.values
            for pixels in (field, with_bar)
        )
    assert np.array_equal(plain, barred)


def resized_as_before(field: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """The rule that each axis has by itself where both shrink or both grow."""
    is_shrinking = field.shape[0] >= size_hw[0] and field.shape[1] >= size_hw[1]
    return cv2.resize(field, size_hw[::-1], interpolation=cv2.INTER_AREA if is_shrinking else cv2.INTER_LINEAR)


@pytest.mark.parametrize("size_hw", [(400, 8192), (8192, 400), (447, 449), (64, 4096)])
def test_defect_is_seen_wherever_it_lies_where_one_axis_alone_shrinks(size_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    H, W = size_hw
    for y, x in zip(rng.integers(0, H - 2, 60), rng.integers(0, W - 2, 60), strict=True):
        field = np.zeros(size_hw, np.uint8)
        field[y : y + 3, x : x + 3] = 255
        assert resize(field, (448, 448)).max() >= 20, f"lost at {y}, {x}"


@pytest.mark.parametrize("size_hw", [(400, 8192), (8192, 400)])
def test_averaging_one_axis_keeps_the_mean(size_hw: tuple[int, int]) -> None:
    field = np.random.default_rng(0).integers(0, 256, size_hw, dtype=np.uint8)
    resized = resize(field, (448, 448))
    assert resized.shape == (448, 448)
    assert resized.mean() == pytest.approx(field.mean(), abs=0.5)
    turned = resize(np.ascontiguousarray(field.T), (448, 448)).T
    assert np.abs(turned.astype(int) - resized).max() <= 1, "either axis has the same rule"


@pytest.mark.parametrize(
    "size_hw", [(448, 448), (448, 8192), (449, 448), (1024, 768), (2048, 2048), (447, 447), (300, 448), (64, 64)]
)
def test_where_no_axis_shrinks_while_the_other_grows_nothing_changed(size_hw: tuple[int, int]) -> None:
    field = np.random.default_rng(0).integers(0, 256, size_hw, dtype=np.uint8)
    assert np.array_equal(resize(field, (448, 448)), resized_as_before(field, (448, 448)))


def test_shrinking_averages_so_that_no_pixel_goes_unseen() -> None:
    field = np.zeros((1024, 1024), np.uint8)
    field[500, 500] = 255
    assert resize(field, (448, 448)).max() > 0
