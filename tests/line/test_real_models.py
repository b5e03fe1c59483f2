"""The shipped weights end to end: what they find on pictures whose truth is known, and on real ones."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from semwatch.defects import DEFECT_FREE, Review
from semwatch.line import pipeline
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch.store import results, review_record
from semwatch_training.synthetic import DEFECT_TYPES, render


@pytest.fixture(scope="module")
def models(repository: Path):
    with Embedded(repository) as models:
        yield models


def review(data: bytes, models: Embedded, **gate: float) -> Review:
    recipe = Recipe()
    recipe = recipe.model_copy(update={"gate": recipe.gate.model_copy(update=gate)})
    return pipeline.review(
        data,
        source="test",
        path="a.png",
        sha256=hashlib.sha256(data).hexdigest(),
        recipe=recipe,
        models=models,
        reviewed_utc="2025-01-01T00:00:00Z",
    )


def test_head_knows_every_synthetic_type_and_the_defect_free_class(models) -> None:
    known = {label for types in DEFECT_TYPES.values() for label in types}
    assert set(models.meta("head").labels) <= known | {DEFECT_FREE}
    assert DEFECT_FREE in models.meta("head").labels
    assert len(models.meta("head").labels) >= 12


def test_a_bubble_in_a_film_is_found_where_it_is(models) -> None:
    hits = 0
    for seed in range(6):
        image = render("DEP", seed=9000 + seed, size_hw=(512, 512), defects=("bubble",))
        found = review(cv2.imencode(".png", image.pixels)[1].tobytes(), models, threshold=0.0)
        x0, y0, x1, y1 = found.pages[0].defects[0].box_xyxy
        hits += bool(image.masks[0, y0:y1, x0:x1].any())
    assert hits >= 4


def test_clean_films_mostly_stay_behind_the_gate(models) -> None:
    """The default gate lets through one normal image in twenty of its mix; 12 films leave room for three."""
    n_open = 0
    for seed in range(12):
        pixels = render("DEP", seed=9100 + seed, size_hw=(512, 512)).pixels
        n_open += review(cv2.imencode(".png", pixels)[1].tobytes(), models).n_defects > 0
    assert n_open <= 3


@pytest.mark.parametrize("name", ["MTD/MT_Blowhole/Imgs", "SEM-TIFF-metadata"])
def test_a_real_image_gives_result_and_overlay(models, data, tmp_path, name) -> None:
    path = next(p for p in sorted((data / name).iterdir()) if p.suffix in (".jpg", ".tif"))
    found = review(path.read_bytes(), models, threshold=0.0)
    written = results.write(found, results_dir=tmp_path)
    record = results.read(written.json)
    assert len(record.pages) == len(written.overlays) >= 1
    assert all(page.defects or not page.quality.is_image for page in record.pages)
    picture = cv2.imread(str(written.overlays[0]))
    assert picture.shape[0] > 100
    assert np.ptp(picture) > 100


def test_same_bytes_same_review(models) -> None:
    data = cv2.imencode(".png", render("BEOL", seed=1, size_hw=(300, 300)).pixels)[1].tobytes()
    first, second = (review_record.to_record(review(data, models, threshold=0.0)).pages for _ in range(2))
    assert first == second
