import cv2
import numpy as np
import pytest

from semwatch.defects import Micrograph, ScoreMap
from semwatch.line import binarization
from semwatch.line.detection import detect, own_scale, scaled_size, tiles
from semwatch.line.pipeline import search
from semwatch.line.scaling import resize
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 300), (300, 64), (1024, 768)])
def test_any_field_gives_the_token_grid(tiny_repository, size_hw) -> None:
    field = np.random.default_rng(0).integers(0, 256, size_hw, dtype=np.uint8)
    with Embedded(tiny_repository) as models:
        score_map, detector = detect(field, models)
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


CELL = 8


def largest_of_each_cell(tile: np.ndarray) -> ScoreMap:
    """A detector of any size of field that sees bright pixels."""
    h, w = tile.shape[0] // CELL, tile.shape[1] // CELL
    values = tile.reshape(h, CELL, w, CELL).max(axis=(1, 3)).astype(np.float32)
    return ScoreMap(values, float(values.max()))


@pytest.mark.parametrize("size_hw", [(1024, 1024), (64, 4096), (8192, 8192), (2168, 2048), (448, 1552), (1536, 64)])
def test_tiles_cover_the_field_and_fit_the_detector(size_hw: tuple[int, int]) -> None:
    covered = np.zeros((size_hw[0] // CELL, size_hw[1] // CELL), bool)
    boxes = list(tiles(size_hw))
    for x0, y0, x1, y1 in boxes:
        assert {side % 16 for side in (x0, y0, x1, y1)} == {0}
        assert min(x1 - x0, y1 - y0) >= 64
        assert max(x1 - x0, y1 - y0) <= 1536
        covered[y0 // CELL : y1 // CELL, x0 // CELL : x1 // CELL] = True
    assert covered.all()
    assert len({(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes}) == 1


@pytest.mark.parametrize("size_hw", [(52, 52), (64, 4096), (369, 480), (1000, 700), (8192, 8192), (755, 1024)])
def test_both_axes_have_one_scale(size_hw: tuple[int, int]) -> None:
    scaled = scaled_size(size_hw)
    scales = [after / before for after, before in zip(scaled, size_hw, strict=True)]
    assert max(scales) / min(scales) < 1 + 16 / min(scaled)
    assert min(scaled) >= min(448, *size_hw)
    assert max(scales) >= 0.99


def test_tiles_join_to_what_one_look_gives() -> None:
    field = np.random.default_rng(1).integers(0, 256, (2176, 3200), dtype=np.uint8)
    assert len(list(tiles(field.shape))) > 4
    joined = own_scale(field, largest_of_each_cell)
    whole = largest_of_each_cell(field)
    assert np.allclose(joined.values, whole.values)
    assert joined.raw_score == whole.raw_score


def test_defect_of_five_pixels_in_a_field_of_4096_is_boxed() -> None:
    rng = np.random.default_rng(2)
    for y, x in rng.integers(8, 4080, (6, 2)):
        field = rng.integers(0, 20, (4096, 4096), dtype=np.uint8)
        field[y : y + 5, x : x + 5] = 255
        values = own_scale(field, largest_of_each_cell).values
        mask = binarization.binarize(values, hot_score=100.0).mask
        (found,) = binarization.regions(mask, values, size_hw=field.shape)
        x0, y0, x1, y1 = found.box_xyxy
        assert x0 <= x < x + 5 <= x1
        assert y0 <= y < y + 5 <= y1
        assert x1 - x0 <= 5 * CELL


def test_coarser_scale_halves_the_map() -> None:
    field = np.zeros((1024, 2048), np.uint8)
    assert own_scale(field, largest_of_each_cell, coarser=2).values.shape == (64, 128)
