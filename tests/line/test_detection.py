import numpy as np
import pytest

from semwatch.defects import Micrograph
from semwatch.line.detection import detect, resize
from semwatch.models.inference import Embedded


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 300), (300, 64), (1024, 768)])
def test_any_field_gives_the_token_grid(tiny_repository, size_hw) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size_hw, dtype=np.uint8)
    page = Micrograph(pixels, (0, 0, size_hw[1], size_hw[0]), 0, None, None)
    with Embedded(tiny_repository) as models:
        score_map, version = detect(page, models)
    assert score_map.values.shape == (8, 8)
    assert np.isfinite(score_map.raw_score)
    assert version == 1


def test_info_bar_outside_the_field_changes_nothing(tiny_repository) -> None:
    field = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    with_bar = np.vstack([field, np.full((32, 128), 255, np.uint8)])
    with Embedded(tiny_repository) as models:
        plain, _ = detect(Micrograph(field, (0, 0, 128, 128), 0, None, None), models)
        barred, _ = detect(Micrograph(with_bar, (0, 0, 128, 128), 0, None, None), models)
    assert np.array_equal(plain.values, barred.values)


def test_shrinking_averages_so_that_no_pixel_goes_unseen() -> None:
    field = np.zeros((1024, 1024), np.uint8)
    field[500, 500] = 255
    assert resize(field, (448, 448)).max() > 0
