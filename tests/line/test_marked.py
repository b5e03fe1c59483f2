"""Marked defects: cut as the region that the line finds there, or along the box."""

from pathlib import Path

import numpy as np
import pytest

from image_files import sem
from semwatch.defects import Micrograph
from semwatch.line import marked
from semwatch.line.pipeline import search
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe


@pytest.fixture
def page() -> Micrograph:
    """A field with a bright spot, 20 px below the top of its page."""
    field = sem(200, 240)
    field[60:84, 100:124] = 255
    return Micrograph(field, (0, 20, 240, 220), 0, None, None)


def test_box_of_a_found_region_gives_that_region_and_another_its_own_crop(
    page: Micrograph, tiny_repository: Path
) -> None:
    recipe = Recipe()
    opened = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    with Embedded(tiny_repository) as models:
        found = search(page, opened, models).candidates
        assert found
        x0, y0, x1, y1 = found[0].region.box_xyxy
        boxes = [(x0, y0 + 20, x1, y1 + 20), (200, 190, 212, 202), (10, 0, 30, 15)]
        same, new, outside = marked.encoded(boxes, page, recipe, models)
    assert same is not None
    assert np.array_equal(same.candidate.crop, found[0].crop)
    assert np.array_equal(same.candidate.soft_mask, found[0].soft_mask)
    assert new is not None
    left, top, right, bottom = new.candidate.window_xyxy
    assert (left <= 200, right >= 212, top <= 170, bottom >= 182) == (True, True, True, True)
    assert not np.array_equal(new.features, same.features)
    assert outside is None, "the box lies above the field, in what was cut away"
