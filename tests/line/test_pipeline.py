import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from semwatch.defects import DEFECT_FREE, Box, Defect, Micrograph, PageReview, Review
from semwatch.errors import ConfigError, ImageError
from semwatch.intake import decoding
from semwatch.line import pipeline
from semwatch.line.binarization import conformal_threshold
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.synthetic import lot_images, render
from semwatch_training.synthetic.info_bar import draw_info_bar

WHEN = "2026-01-05T08:00:00Z"
OPEN = Recipe.model_validate({"name": "open", "gate": {"threshold": 0.0}})
SHUT = Recipe.model_validate({"name": "shut", "gate": {"threshold": 9.0}})  # a score is at most 2
NO_PLATEAU = Recipe.model_validate({"gate": {"threshold": 0.0}, "binarization": {"min_plateau": 64}})
SEVERAL = 4
"""Seed of a field in which the tiny detector finds several defects."""
VERDICTS = {"known", "unknown", "non-decidable", "defect-free"}


@pytest.fixture(scope="module")
def models(tiny_repository: Path) -> Iterator[Embedded]:
    with Embedded(tiny_repository, threads=1) as embedded:
        yield embedded


class Asked:
    """The models, and a note of which were asked."""

    def __init__(self, models: Embedded) -> None:
        self.models, self.names = models, list[str]()
        self.meta = models.meta

    def infer(self, model: str, inputs, *, backlog: bool = False):
        self.names.append(model)
        return self.models.infer(model, inputs, backlog=backlog)


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def tiff(*pages: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack", metadata=None)
    return buffer.getvalue()


def field(seed: int = 0, size_hw: tuple[int, int] = (192, 192), stage: str = "BEOL") -> np.ndarray:
    return render(stage, seed=seed, size_hw=size_hw).pixels


def review(data: bytes, models: Embedded | Asked, recipe: Recipe = OPEN, **limits: int) -> Review:
    sha256 = hashlib.sha256(data).hexdigest()
    return pipeline.review(
        data, source="sem1", path="lot/a.tif", sha256=sha256, recipe=recipe, models=models, reviewed_utc=WHEN, **limits
    )


def inside(box: Box, outer: Box) -> bool:
    return outer[0] <= box[0] < box[2] <= outer[2] and outer[1] <= box[1] < box[3] <= outer[3]


def check_frames(page: PageReview) -> None:
    """Everything that must hold of any defect of any page."""
    H, W = page.micrograph.field.shape
    assert [defect.defect_id for defect in page.defects] == list(range(1, len(page.defects) + 1))
    for defect in page.defects:
        assert inside(defect.box_xyxy, page.micrograph.field_xyxy)
        x0, y0, x1, y1 = defect.crop_xyxy
        assert x1 - x0 == y1 - y0 > 0
        assert inside(defect.box_xyxy, defect.crop_xyxy)
        assert (defect.crop.shape, defect.crop.dtype) == ((56, 56), np.uint8)
        assert (defect.soft_mask.shape, defect.soft_mask.dtype) == ((4, 4), np.float32)
        assert 0 <= defect.soft_mask.min() <= defect.soft_mask.max() <= 1
        assert (defect.features.shape, defect.features.dtype) == ((74,), np.float32)
        assert np.isfinite(defect.features).all()
        assert 0 < defect.area_px <= H * W
        assert 0 < defect.peak_score <= page.score_map.values.max()
        assert defect.verdict.kind in VERDICTS
        assert 0 <= defect.verdict.confidence <= 1


def same(a: Defect, b: Defect) -> bool:
    arrays = ("crop", "soft_mask", "features")
    plain = ("defect_id", "box_xyxy", "area_px", "area_nm2", "peak_score", "crop_xyxy", "verdict")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays) and all(
        getattr(a, name) == getattr(b, name) for name in plain
    )


# ---- the gate ----


def test_shut_gate_gives_no_defect_and_asks_only_the_detector(models) -> None:
    asked = Asked(models)
    found = review(png(field()), asked, SHUT)
    page = found.pages[0]
    assert found.n_defects == 0
    assert asked.names == ["detector"]
    assert found.model_versions == {"detector": 1}
    assert page.mask.shape == (112, 112)
    assert not page.mask.any()
    assert page.score_map.values.shape == (8, 8)
    assert (page.gate_threshold, found.recipe_name, found.recipe_id) == (9.0, "shut", SHUT.id)


def test_open_gate_asks_all_models_once_a_page(models) -> None:
    asked = Asked(models)
    found = review(png(field()), asked)
    assert found.n_defects > 0
    assert asked.names == ["detector", "encoder", "head"]
    assert found.model_versions == {"detector": 1, "encoder": 1, "head": 1}


def test_score_at_the_threshold_keeps_the_gate_shut(models) -> None:
    data = png(field())
    score = review(data, models, SHUT).pages[0].score_map.raw_score
    at = Recipe.model_validate({"gate": {"threshold": score}})
    below = Recipe.model_validate({"gate": {"threshold": score - 1e-6}})
    assert review(data, models, at).n_defects == 0
    assert review(data, models, below).n_defects > 0


def test_recipes_own_threshold_wins(models) -> None:
    assert pipeline.gate_threshold(Recipe.model_validate({"gate": {"threshold": 0.3}}), models) == 0.3
    assert pipeline.gate_threshold(OPEN, models) == 0.0  # 0 is a threshold too, not the lack of one


@pytest.mark.parametrize(("rate", "expected"), [(0.05, 0.057), (0.1, 0.054), (0.5, 0.030)])
def test_without_one_the_threshold_is_conformal_on_the_detectors_normals(models, rate, expected) -> None:
    recipe = Recipe.model_validate({"gate": {"false_alarm_rate": rate}})
    scores = np.array(models.meta("detector").normal_scores)
    assert pipeline.gate_threshold(recipe, models) == conformal_threshold(scores, false_alarm_rate=rate)
    assert pipeline.gate_threshold(recipe, models) == pytest.approx(expected)  # of 60: 0, 0.001, ... 0.059


def test_rate_that_so_few_normals_cannot_promise_names_the_remedy(models) -> None:
    recipe = Recipe.model_validate({"name": "strict", "gate": {"false_alarm_rate": 0.01}})
    with pytest.raises(ConfigError, match=r"recipe strict: 60 normal images .* 0.01; .*`semwatch recipe calibrate`"):
        review(png(field()), models, recipe)


def test_streams_threshold_goes_before_the_detectors_and_behind_the_recipes(models) -> None:
    own = Recipe.model_validate({"gate": {"threshold": 0.3}})
    assert pipeline.gate_of(Recipe(), models) == (pipeline.gate_threshold(Recipe(), models), "detector")
    assert pipeline.gate_of(Recipe(), models, stream_threshold=0.0) == (0.0, "stream")
    assert pipeline.gate_of(own, models, stream_threshold=0.1) == (0.3, "recipe")
    page = decoding.decode(png(field()), name="a.png")[0]
    found = pipeline.search(page, Recipe(), models, stream_threshold=9.0)
    assert (found.gate_threshold, found.gate_source, found.candidates) == (9.0, "stream", ())


# ---- what a defect holds ----


@pytest.mark.parametrize("size_hw", [(192, 192), (96, 320), (320, 96), (64, 64), (700, 450)])
def test_frames_are_consistent_on_a_field_of_any_shape(models, size_hw) -> None:
    found = review(png(field(size_hw=size_hw)), models)
    page = found.pages[0]
    assert page.micrograph.field_xyxy == (0, 0, size_hw[1], size_hw[0])
    assert found.n_defects == len(page.defects) > 0
    check_frames(page)


def test_boxes_are_those_of_the_mask_stretched_over_the_field(models) -> None:
    page = review(png(field(size_hw=(96, 320))), models).pages[0]
    rows, cols = np.flatnonzero(page.mask.any(axis=1)), np.flatnonzero(page.mask.any(axis=0))
    boxes = np.array([defect.box_xyxy for defect in page.defects])
    assert boxes[:, 0].min() == cols[0] * 320 // 112
    assert boxes[:, 1].min() == rows[0] * 96 // 112
    assert boxes[:, 2].max() == -(-(cols[-1] + 1) * 320 // 112)
    assert boxes[:, 3].max() == -(-(rows[-1] + 1) * 96 // 112)
    n_defect_px = sum(defect.area_px for defect in page.defects)
    assert n_defect_px == pytest.approx(page.mask.mean() * 96 * 320, abs=len(page.defects))


def test_crop_is_the_window_of_the_page(models) -> None:
    pixels = field(SEVERAL, (256, 256))
    page = review(png(pixels), models, Recipe.model_validate({"gate": {"threshold": 0.0}, "crop": {"context": 1.0}}))
    crops = [d for d in page.pages[0].defects if inside(d.crop_xyxy, (0, 0, 256, 256))]
    assert crops
    for defect in crops:
        x0, y0, x1, y1 = defect.crop_xyxy
        how = cv2.INTER_AREA if x1 - x0 > 56 else cv2.INTER_LINEAR
        assert np.array_equal(defect.crop, cv2.resize(pixels[y0:y1, x0:x1], (56, 56), interpolation=how))


def test_no_more_defects_than_the_recipe_keeps(models) -> None:
    many = review(png(field(SEVERAL, (256, 256))), models)
    assert many.n_defects > 1
    one = Recipe.model_validate({"gate": {"threshold": 0.0}, "binarization": {"max_defects": 1}})
    assert review(png(field(SEVERAL, (256, 256))), models, one).n_defects == 1


def test_defects_come_largest_first(models) -> None:
    areas = [defect.area_px for defect in review(png(field(SEVERAL, (256, 256))), models).pages[0].defects]
    assert areas == sorted(areas, reverse=True)


def test_area_in_nanometres_needs_the_size_of_a_pixel(models) -> None:
    image = next(iter(lot_images(n=1, seed=1, size_hw=(192, 256), info_bar_share=1, png_share=0)))
    page = review(image.content, models).pages[0]
    assert page.micrograph.pixel_nm == pytest.approx(image.micrograph.pixel_nm)
    assert page.defects
    for defect in page.defects:
        assert defect.area_nm2 == pytest.approx(defect.area_px * image.micrograph.pixel_nm**2)
    assert all(defect.area_nm2 is None for defect in review(png(field()), models).pages[0].defects)


# ---- info bars ----


@pytest.mark.parametrize("png_share", [0, 1])
def test_bar_below_the_field_is_no_part_of_the_search(models, png_share) -> None:
    image = next(iter(lot_images(n=1, seed=1, size_hw=(256, 320), info_bar_share=1, png_share=png_share)))
    barred, bare = review(image.content, models), review(png(image.micrograph.pixels), models)
    page = barred.pages[0]
    assert image.page_hw[0] > 256
    assert page.micrograph.pixels.shape == image.page_hw
    assert page.micrograph.field_xyxy == (0, 0, 320, 256)
    assert np.array_equal(page.score_map.values, bare.pages[0].score_map.values)
    check_frames(page)


def test_bar_above_the_field_shifts_boxes_and_nothing_else(models) -> None:
    pixels = field(1, (256, 320))
    bar = draw_info_bar(320, 2.0, "01/05/2026 08:00", "TLD", dark=True)[::-1]  # its frame line is next to the field
    above, bare = review(png(np.vstack([bar, pixels])), models), review(png(pixels), models)
    page, plain = above.pages[0], bare.pages[0]
    assert page.micrograph.field_xyxy == (0, len(bar), 320, len(bar) + 256)
    assert len(page.defects) == len(plain.defects) > 0
    check_frames(page)
    for found, expected in zip(page.defects, plain.defects, strict=True):
        for box, unmoved in ((found.box_xyxy, expected.box_xyxy), (found.crop_xyxy, expected.crop_xyxy)):
            assert box == (unmoved[0], unmoved[1] + len(bar), unmoved[2], unmoved[3] + len(bar))
        assert found.area_px == expected.area_px
        assert np.array_equal(found.crop, expected.crop)
        assert np.array_equal(found.features, expected.features)


def test_field_anywhere_in_the_page_shifts_boxes_along_both_axes(models, monkeypatch) -> None:
    pixels = field(1, (256, 320))
    framed = np.zeros((300, 400), np.uint8)
    framed[20:276, 50:370] = pixels
    plain = review(png(pixels), models).pages[0]
    page = Micrograph(framed, (50, 20, 370, 276), 0, None, None)
    monkeypatch.setattr(pipeline.decoding, "decode", lambda *_, **__: (page,))  # no decoder cuts at the left
    found = review(b"", models).pages[0]
    check_frames(found)
    for moved, expected in zip(found.defects, plain.defects, strict=True):
        for box, unmoved in ((moved.box_xyxy, expected.box_xyxy), (moved.crop_xyxy, expected.crop_xyxy)):
            assert np.subtract(box, unmoved).tolist() == [50, 20, 50, 20]
        assert np.array_equal(moved.crop, expected.crop)


# ---- pages ----


def test_every_page_of_a_tiff_is_reviewed_in_order(models) -> None:
    pages = [field(seed, (128 + 32 * seed, 160), stage) for seed, stage in enumerate(("BEOL", "DEP", "DPR"))]
    asked = Asked(models)
    found = review(tiff(*pages), asked)
    assert [page.micrograph.page for page in found.pages] == [0, 1, 2]
    assert asked.names == ["detector", "encoder", "head"] * 3
    assert found.n_defects == sum(len(page.defects) for page in found.pages)
    for page, pixels in zip(found.pages, pages, strict=True):
        alone = review(png(pixels), models).pages[0]
        assert np.array_equal(page.micrograph.pixels, pixels)
        assert len(page.defects) == len(alone.defects) > 0
        assert all(same(a, b) for a, b in zip(page.defects, alone.defects, strict=True))
        check_frames(page)


def test_page_behind_a_shut_gate_does_not_hide_the_versions_of_another(models) -> None:
    first, second = field(0), field(1)
    scores = [review(png(pixels), models, SHUT).pages[0].score_map.raw_score for pixels in (first, second)]
    between = Recipe.model_validate({"gate": {"threshold": sum(scores) / 2}})
    pages = (first, second) if scores[0] > scores[1] else (second, first)
    found = review(tiff(*pages), models, between)
    assert [bool(page.defects) for page in found.pages] == [True, False]
    assert found.model_versions == {"detector": 1, "encoder": 1, "head": 1}


# ---- nothing stands out ----


@pytest.mark.parametrize("size_hw", [(192, 192), (96, 320)])
def test_open_gate_over_an_empty_mask_judges_the_whole_field(models, size_hw) -> None:
    H, W = size_hw
    page = review(png(field(size_hw=size_hw)), models, NO_PLATEAU).pages[0]
    assert not page.mask.any()
    assert len(page.defects) == 1
    assert page.defects[0].box_xyxy == (0, 0, W, H)
    assert page.defects[0].area_px == H * W
    assert page.defects[0].peak_score == page.score_map.values.max()
    check_frames(page)


# ---- no image, or a bad one ----


@pytest.mark.parametrize("level", [0, 128, 255])
def test_page_of_one_level_is_no_image_and_no_model_is_asked(models, level) -> None:
    asked = Asked(models)
    found = review(png(np.full((128, 128), level, np.uint8)), asked)
    page = found.pages[0]
    assert asked.names == []
    assert not page.quality.is_image
    assert (page.score_map, page.defects, found.model_versions) == (None, (), {})
    assert not page.mask.any()


def test_blank_page_does_not_hide_the_defects_of_another(models) -> None:
    asked = Asked(models)
    found = review(tiff(np.zeros((192, 192), np.uint8), field()), asked)
    assert [page.quality.is_image for page in found.pages] == [False, True]
    assert asked.names == ["detector", "encoder", "head"]
    assert len(found.pages[1].defects) > 0
    assert found.model_versions == {"detector": 1, "encoder": 1, "head": 1}


def test_bad_image_is_judged_and_flagged(models) -> None:
    streaked = np.clip(field() + np.random.default_rng(0).normal(0, 40, (192, 1)), 0, 255).astype(np.uint8)
    page = review(png(streaked), models).pages[0]
    assert "streaks" in [flag.name for flag in page.quality.flags]
    assert page.quality.is_image
    assert page.score_map is not None


def test_recipe_may_refuse_files_with_a_blank_page(models) -> None:
    strict = Recipe.model_validate({"quality": {"no_image": "quarantine"}})
    with pytest.raises(ImageError, match="page 1 holds no image: blank 0"):
        review(tiff(field(), np.zeros((192, 192), np.uint8)), models, strict)


# ---- the page's process ----


class OfDomain(Asked):
    """The models, with a detector that says how ordinary the field is."""

    def __init__(self, models: Embedded, domain_p: float) -> None:
        super().__init__(models)
        self.domain_p = domain_p

    def infer(self, model: str, inputs, *, backlog: bool = False):
        answer = super().infer(model, inputs)
        if model != "detector":
            return answer
        return replace(answer, outputs={**answer.outputs, "domain_p": np.float32([self.domain_p])})


def test_detector_that_cannot_say_leaves_the_process_unjudged(models) -> None:
    page = review(png(field()), models).pages[0]
    assert (page.score_map.domain_p, page.domain) == (None, "not judged")


@pytest.mark.parametrize(("domain_p", "domain"), [(0.5, "known process"), (0.015, "known process")])
def test_field_above_the_significance_is_judged_as_if_nothing_were_said(models, domain_p, domain) -> None:
    data = png(field(SEVERAL, (256, 256)))
    page, plain = (review(data, m).pages[0] for m in (OfDomain(models, domain_p), models))
    assert page.domain == domain
    assert page.score_map.domain_p == pytest.approx(domain_p)
    assert [defect.verdict for defect in page.defects] == [defect.verdict for defect in plain.defects]


def test_nothing_is_dismissed_on_a_field_of_an_unknown_process(models) -> None:
    data = png(field(SEVERAL, (256, 256)))
    assert {d.verdict.kind for d in review(data, SureOfNothing(models)).pages[0].defects} == {"defect-free"}
    foreign = review(data, SureOfNothing(OfDomain(models, 0.01))).pages[0]
    assert foreign.domain == "unknown process"
    assert {d.verdict.kind for d in foreign.defects} == {"unknown"}
    lax = Recipe.model_validate({"gate": {"threshold": 0.0}, "domain": {"significance": 0.005}})
    assert review(data, SureOfNothing(OfDomain(models, 0.01)), lax).pages[0].domain == "known process"


class SureOfNothing:
    """The models, with a head that is sure of *defect-free* whatever it sees."""

    def __init__(self, models) -> None:
        self.models, self.meta = models, models.meta

    def infer(self, model: str, inputs, *, backlog: bool = False):
        answer = self.models.infer(model, inputs)
        if model != "head":
            return answer
        sure = np.float32([[20 * (label == DEFECT_FREE) for label in answer.meta.labels]])
        n = len(answer.outputs["logits"])
        return replace(answer, outputs={"logits": np.repeat(sure, n, 0), "p_values": np.full((n, sure.size), 0.9)})


def test_process_is_judged_where_the_gate_stays_shut_too(models) -> None:
    page = review(png(field()), OfDomain(models, 0.001), SHUT).pages[0]
    assert (page.domain, page.defects) == ("unknown process", ())


# ---- the review as a whole ----


def test_same_bytes_give_the_same_review(models) -> None:
    data = png(field(2, (256, 256)))
    first, second = review(data, models), review(data, models)
    a, b = first.pages[0], second.pages[0]
    assert np.array_equal(a.score_map.values, b.score_map.values)
    assert a.score_map.raw_score == b.score_map.raw_score
    assert np.array_equal(a.mask, b.mask)
    assert len(a.defects) > 0
    assert all(same(x, y) for x, y in zip(a.defects, b.defects, strict=True))
    assert first.model_versions == second.model_versions


def test_content_hashes_of_the_models_that_answered_stand_beside_their_numbers(models) -> None:
    opened, shut = review(png(field()), models), review(png(field()), models, SHUT)
    assert opened.model_hashes == models.hashes()
    assert shut.model_hashes == {"detector": models.hashes()["detector"]}


def test_review_carries_what_it_was_given(models) -> None:
    data = png(field())
    found = review(data, models)
    assert (found.source, found.path, found.reviewed_utc) == ("sem1", "lot/a.tif", WHEN)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert (found.recipe_name, found.recipe_id) == (OPEN.name, OPEN.id)


def test_every_stage_is_timed_in_the_order_of_the_line(models) -> None:
    opened, shut = review(png(field()), models).timings_ms, review(png(field()), models, SHUT).timings_ms
    assert list(opened) == list(shut) == ["decode", "quality", "detect", "binarize", "crop", "classify"]
    assert min(opened.values()) > 0
    assert shut["binarize"] == shut["crop"] == 0


def test_search_adds_its_time_to_that_of_earlier_pages(models) -> None:
    timings = dict.fromkeys(pipeline.STAGES, 1000.0)
    page = Micrograph(field(), (0, 0, 192, 192), 0, None, None)
    pipeline.search(page, OPEN, models, timings_ms=timings)
    assert {stage for stage, spent in timings.items() if spent > 1000} == {"detect", "binarize", "crop"}


# ---- files that cannot be reviewed ----


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image at all",
        png(np.zeros((128, 128), np.uint8))[:-20],
        tiff(np.zeros((128, 128), np.uint8))[:-20],
        png(np.zeros((24, 24), np.uint8)),
    ],
    ids=["empty", "foreign", "cut-png", "cut-tiff", "tiny"],
)
def test_broken_file_is_an_image_error_that_names_it_and_asks_no_model(models, data) -> None:
    asked = Asked(models)
    with pytest.raises(ImageError, match=r"lot/a\.tif: "):
        review(data, asked)
    assert asked.names == []


def test_limits_of_the_caller_hold(models) -> None:
    with pytest.raises(ImageError, match="max_image_mpx"):
        review(png(np.zeros((128, 128), np.uint8)), models, max_pixels=128 * 127)
    with pytest.raises(ImageError, match="more than 1 pages"):
        review(tiff(field(), field()), models, max_pages=1)
