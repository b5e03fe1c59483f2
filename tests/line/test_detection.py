import numpy as np
import pytest

from semwatch.defects import Micrograph
from semwatch.line.detection import detect, resize
from semwatch.line.inputs import for_detector
from semwatch.line.pipeline import search
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 300), (300, 64), (1024, 768)])
def test_any_field_gives_the_token_grid(tiny_repository, size_hw) -> None:
    field = np.random.default_rng(0).integers(0, 256, size_hw, dtype=np.uint8)
    with Embedded(tiny_repository) as models:
        score_map, version = detect(for_detector(models.meta("detector"), field), models)
    assert score_map.values.shape == (8, 8)
    assert np.isfinite(score_map.raw_score)
    assert version == 1


def test_info_bar_outside_the_field_changes_nothing(tiny_repository) -> None:
    field = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    with_bar = np.vstack([field, np.full((32, 128), 255, np.uint8)])
    with Embedded(tiny_repository) as models:
        plain, barred = (
            search(Micrograph(pixels, (0, 0, 128, 128), 0, None, None), Recipe(), models).score_map.values
            for pixels in (field, with_bar)
        )
    assert np.array_equal(plain, barred)


def test_shrinking_averages_so_that_no_pixel_goes_unseen() -> None:
    field = np.zeros((1024, 1024), np.uint8)
    field[500, 500] = 255
    assert resize(field, (448, 448)).max() > 0
