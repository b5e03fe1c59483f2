import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from paths import DATA
from semwatch.defects import Micrograph, Review
from semwatch.line import difference, pipeline, reference, registration
from semwatch.line.pipeline import ReferenceFile
from semwatch.models.inference import Embedded
from semwatch.service.drift import DriftWatch
from semwatch.settings.recipe import Recipe
from semwatch_training.synthetic import render
from semwatch_training.synthetic.pairs import Pair, render_pair

RULE = Recipe().reference
PAGE = Recipe.model_validate({"gate": {"threshold": 0.0}, "reference": {"page": 1}})
NAMED = Recipe.model_validate({"gate": {"threshold": 0.0}, "reference": {"pattern": "*_ref"}})
REAL = DATA / "REAL-SEM" / "inspected-and-reference"


def differences(pair: Pair) -> np.ndarray:
    met = registration.register(pair.inspected, pair.reference)
    assert met.reason == ""
    assert met.aligned is not None
    assert met.overlap is not None
    return difference.compare(pair.inspected, met.aligned, met.overlap)


def near(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Cells that hold a defect, and those around them."""
    held = cv2.resize(mask.astype(np.float32), values.shape[::-1], interpolation=cv2.INTER_AREA) > 0
    return cv2.dilate(held.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0


# ---- registration ----


@pytest.mark.parametrize("max_shift", [0.0, 0.1, 0.2])
@pytest.mark.parametrize(("stage", "seed"), [("BEOL", 3), ("DPR", 2), ("DEP", 4)])
def test_shift_up_to_a_fifth_of_the_field_is_found(stage: str, seed: int, max_shift: float) -> None:
    pair = render_pair(stage, seed=seed, size_hw=(240, 288), max_shift=max_shift)
    met = registration.register(pair.inspected, pair.reference)
    assert met.reason == ""
    assert met.shift_px == pytest.approx(pair.shift_px, abs=0.8)
    assert met.overlap is not None
    assert met.overlap.mean() > (1 - max_shift) ** 2 - 0.05


def test_identical_reference_has_no_difference_and_is_no_fault() -> None:
    pixels = render("BEOL", seed=1, size_hw=(200, 240)).pixels
    met = registration.register(pixels, pixels)
    assert met.reason == ""
    assert met.shift_px == pytest.approx((0, 0), abs=0.1)
    assert met.correlation == pytest.approx(1, abs=0.01)
    assert met.aligned is not None
    assert met.overlap is not None
    values = difference.compare(pixels, met.aligned, met.overlap)
    assert np.isfinite(values).all()
    assert values.max() < 2


@pytest.mark.parametrize(("stage", "seed"), [("DEP", 4), ("BEOL", 4)])
def test_reference_of_another_place_is_refused(stage: str, seed: int) -> None:
    met = registration.register(
        render(stage, seed=seed, size_hw=(240, 240)).pixels, render(stage, seed=seed + 30, size_hw=(240, 240)).pixels
    )
    assert met.reason.startswith("another place")
    assert met.aligned is None
    assert met.correlation is not None
    assert met.correlation < RULE.min_correlation


def test_reference_beyond_the_limit_is_refused() -> None:
    pair = render_pair("DEP", seed=4, size_hw=(240, 288), max_shift=0.2)
    assert max(abs(pair.shift_px[0]) / 288, abs(pair.shift_px[1]) / 240) > 0.06
    met = registration.register(pair.inspected, pair.reference, max_shift=0.02)
    assert met.reason != ""
    assert met.aligned is None


def test_reference_of_another_size_is_resampled_where_the_sides_have_one_ratio() -> None:
    pair = render_pair("DPR", seed=2, size_hw=(240, 288), max_shift=0.05)
    larger = cv2.resize(pair.reference, (576, 480), interpolation=cv2.INTER_CUBIC)
    met = registration.register(pair.inspected, larger)
    assert met.reason == ""
    assert met.shift_px == pytest.approx(pair.shift_px, abs=0.8)
    assert met.aligned is not None
    assert met.aligned.shape == pair.inspected.shape
    cut = registration.register(pair.inspected, pair.reference[:160])
    assert cut.reason == "another size: the reference has 288 x 160 px, the image 288 x 240 px"


@pytest.mark.parametrize("level", [0, 128, 255])
def test_constant_images_are_refused_in_words(level: int) -> None:
    flat, field = np.full((128, 160), level, np.uint8), render("BEOL", seed=1, size_hw=(128, 160)).pixels
    for inspected, other in ((flat, flat), (flat, field), (field, flat)):
        assert registration.register(inspected, other).reason.startswith("no texture")


def test_noise_alone_is_no_texture() -> None:
    rng = np.random.default_rng(0)
    noise = [np.clip(128 + 12 * rng.standard_normal((160, 160)), 0, 255).astype(np.uint8) for _ in range(2)]
    assert registration.register(*noise).reason.startswith("no texture")


# ---- comparison ----


def test_two_scans_of_a_clean_place_seldom_differ() -> None:
    """One in fifty or so may, see docs/reference.md; none of them by far."""
    places = [("BEOL", 3), ("DPR", 8), ("DEP", 16), ("BEOL", 18), ("DPR", 17)]
    scores = [
        differences(render_pair(stage, seed=seed, size_hw=(240, 288), gain=0.2, charging=0.04, drift_px=2.0)).max()
        for stage, seed in places
    ]
    assert sum(score > RULE.threshold for score in scores) <= 1
    assert max(scores) < 1.2 * RULE.threshold


@pytest.mark.parametrize(
    ("stage", "defect", "seed"),
    [("BEOL", "bridge", 1), ("BEOL", "particle", 2), ("DPR", "fin-break", 3), ("DEP", "pinhole", 4)],
)
def test_defect_is_found_where_it_is_and_nowhere_else(stage: str, defect: str, seed: int) -> None:
    pair = render_pair(stage, seed=seed, size_hw=(320, 384), max_shift=0.03, defects=[defect], gain=0.2)
    values, around = differences(pair), near(pair.masks[0], differences(pair))
    assert values[around].max() > RULE.threshold
    assert values[~around].max() < RULE.threshold


def test_spot_of_three_pixels_and_a_large_stain_both_show() -> None:
    pair = render_pair("BEOL", seed=3, size_hw=(320, 384), max_shift=0.03, dose=(300.0, 400.0))
    y, x = np.mgrid[:320, :384]
    spot = (np.abs(x - 200) <= 1) & (np.abs(y - 60) <= 1)
    stain = 24.0 * np.exp(-0.5 * ((x - 120) ** 2 + (y - 220) ** 2) / 16**2)
    struck = np.clip(pair.inspected.astype(np.float32) + 110 * spot + stain, 0, 255).astype(np.uint8)
    values = differences(Pair(struck, pair.reference, pair.masks, pair.shift_px))
    assert values[7, 25] > RULE.threshold
    assert values[25:30, 12:18].max() > RULE.threshold


def test_what_has_no_counterpart_is_not_judged() -> None:
    pair = render_pair("DPR", seed=8, size_hw=(240, 288), max_shift=0.2)
    met = registration.register(pair.inspected, pair.reference)
    assert met.aligned is not None
    assert met.overlap is not None
    assert not met.overlap.all()
    struck = pair.inspected.copy()
    struck[~met.overlap] = 255
    values = difference.compare(struck, met.aligned, met.overlap)
    assert values.max() < RULE.threshold
    assert values.shape == (30, 36)
    assert difference.compare(struck, met.aligned, np.zeros_like(met.overlap)).max() == 0


def test_map_has_cells_of_eight_pixels_whatever_the_size() -> None:
    pair = render_pair("BEOL", seed=3, size_hw=(203, 254), max_shift=0.0)
    assert differences(pair).shape == (26, 32)


def test_mask_keeps_a_single_cell_of_a_large_field_and_leaves_out_what_stays_below() -> None:
    values = np.zeros((256, 300), np.float32)
    values[100, 77], values[10:20, 10:20] = 9.0, 6.0
    found = reference.binarize(values, threshold=7.0, grid_px=112)
    assert found.values.max() == 9
    assert 1 <= found.mask.sum() <= 4
    rows, columns = np.nonzero(found.mask)
    assert rows.mean() == pytest.approx(100.5 * 112 / 256, abs=1)
    assert columns.mean() == pytest.approx(77.5 * 112 / 300, abs=1)
    assert not reference.binarize(0 * values, threshold=7.0, grid_px=112).mask.any()


# ---- the line ----


@pytest.fixture(scope="module")
def models(tiny_repository: Path) -> Iterator[Embedded]:
    with Embedded(tiny_repository, threads=1) as embedded:
        yield embedded


@pytest.fixture(scope="module")
def struck() -> Pair:
    return render_pair("BEOL", seed=1, size_hw=(320, 384), max_shift=0.03, defects=["bridge"])


def tiff(*pages: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack", metadata=None)
    return buffer.getvalue()


def review(data: bytes, models: Embedded, recipe: Recipe, given: ReferenceFile | None = None) -> Review:
    return pipeline.review(
        data,
        source="sem1",
        path="lot/a.tif",
        sha256=hashlib.sha256(data).hexdigest(),
        recipe=recipe,
        models=models,
        reviewed_utc="2026-01-05T08:00:00Z",
        reference_file=given,
    )


def test_page_with_a_reference_is_judged_by_the_difference_alone(models, struck) -> None:
    found = review(tiff(struck.inspected), models, NAMED, ReferenceFile("a_ref.tif", tiff(struck.reference)))
    (page,) = found.pages
    assert page.reference is not None
    assert (page.reference.name, page.reference.used, page.reference.reason) == ("a_ref.tif", True, "")
    assert page.gate_threshold == RULE.threshold
    assert set(found.model_versions) == {"detector", "encoder", "head"}
    (defect,) = page.defects
    rows, columns = np.nonzero(struck.masks[0])
    x0, y0, x1, y1 = defect.box_xyxy
    assert x0 <= columns.mean() < x1
    assert y0 <= rows.mean() < y1
    assert defect.peak_score == pytest.approx(page.score_map.raw_score)


def test_second_page_of_a_file_is_the_reference_of_the_first_and_not_reviewed(models, struck) -> None:
    found = review(tiff(struck.inspected, struck.reference), models, PAGE)
    (page,) = found.pages
    assert page.micrograph.page == 0
    assert page.reference is not None
    assert (page.reference.name, page.reference.used) == ("page 1", True)
    assert len(page.defects) == 1


def test_clean_page_with_a_reference_asks_only_what_the_field_is_like(models) -> None:
    pair = render_pair("BEOL", seed=3, size_hw=(240, 288))
    found = review(tiff(pair.inspected, pair.reference), models, PAGE)
    assert (found.n_defects, found.model_versions) == (0, {"detector": 1})
    assert not found.pages[0].mask.any()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (ReferenceFile("a_ref.tif", None, "there is no reference file"), "there is no reference file"),
        (ReferenceFile("a_ref.tif", b"no image"), "the reference cannot be read"),
        (ReferenceFile("a_ref.tif", tiff(np.full((320, 384), 90, np.uint8))), "no texture"),
        (ReferenceFile("a_ref.tif", tiff(render("DEP", seed=4, size_hw=(320, 384)).pixels)), "another place"),
    ],
    ids=["absent", "broken", "constant", "another place"],
)
def test_page_whose_reference_cannot_be_used_is_judged_alone_with_the_reason(models, struck, given, reason) -> None:
    alone = review(tiff(struck.inspected), models, NAMED)
    found = review(tiff(struck.inspected), models, NAMED, given)
    (page,) = found.pages
    assert page.reference is not None
    assert not page.reference.used
    assert page.reference.reason.startswith(reason)
    assert page.score_map.raw_score == alone.pages[0].score_map.raw_score
    assert [d.box_xyxy for d in page.defects] == [d.box_xyxy for d in alone.pages[0].defects]
    assert alone.pages[0].reference is None


def test_file_without_the_page_of_the_reference_says_so(models, struck) -> None:
    (page,) = review(tiff(struck.inspected), models, PAGE).pages
    assert page.reference is not None
    assert page.reference.reason == "the file has no page 1"


def test_reference_that_differs_everywhere_is_of_another_place() -> None:
    """A layout that repeats registers at any place; what does not repeat then differs in many."""
    pixels = render("BEOL", seed=3, size_hw=(400, 400)).pixels
    page = Micrograph(pixels, (0, 0, 400, 400), 0, None, None)
    spotted = pixels.copy()
    for y in range(30, 390, 60):
        for x in range(30, 390, 60):
            cv2.circle(spotted, (x, y), 3, 255 if spotted[y, x] < 128 else 0, -1)
    other = Micrograph(spotted, (0, 0, 400, 400), 0, None, None)
    difference, met = reference.compared(page, ("a_ref.tif", other, ""))
    assert difference is None
    assert met is not None
    assert met.reason.startswith("another place: the images differ in ")


def test_scores_of_differences_do_not_enter_the_drift_watch(models, struck) -> None:
    watch = DriftWatch()
    watch.observe(review(tiff(struck.inspected, struck.reference), models, PAGE))
    watch.observe(review(tiff(struck.inspected), models, PAGE))  # without its reference: the detector's score
    (state,) = watch.state()["watches"]
    assert len(state["scores"]["first"]) == 1


def test_real_pair_has_its_three_defects_and_nothing_else() -> None:
    if not REAL.is_dir():
        pytest.skip(f"no real pair in {REAL}")
    inspected, other = (tifffile.imread(REAL / f"case2_{name}_image.tif") for name in ("inspected", "reference"))
    met = registration.register(inspected, other)
    assert met.aligned is not None
    assert met.overlap is not None
    values = difference.compare(inspected, met.aligned, met.overlap)
    around = np.zeros(values.shape, np.bool_)
    for line in (REAL / "defect_locations.txt").read_text().splitlines()[1:]:
        x, y = (int(part) // 8 for part in line.split())
        assert values[y - 1 : y + 2, x - 1 : x + 2].max() > RULE.threshold
        around[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = True
    assert values[~around].max() < RULE.threshold
