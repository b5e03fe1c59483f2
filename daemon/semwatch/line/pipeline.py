"""The line, from an image file's bytes to its review: the only file that knows every stage.

    bytes -> micrograph -> detection -> gate -> binarization -> crops -> classification -> Review

Straight code without threads, folders, Redis or ledger: the daemon, ``semwatch review`` and training all call it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box, Defect, Micrograph, PageReview, Review, ScoreMap
from semwatch.errors import ConfigError, ServiceUnavailable
from semwatch.intake import decoding
from semwatch.intake.decoding import LIMITS
from semwatch.line import binarization, detection, inputs
from semwatch.line.binarization import Region
from semwatch.line.classification import classify, size_feature
from semwatch.models.inference import ModelId, Models
from semwatch.models.model_repository import Meta
from semwatch.settings.recipe import Recipe

MAX_SWAPS = 3
STAGES = ("decode", "detect", "binarize", "crop", "classify")
"""Keys of ``Review.timings_ms``; detect and classify hold the networks."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A region of one page, cut out and ready for the encoder; boxes in the field frame."""

    region: Region
    window_xyxy: Box
    crop: NDArray[np.uint8]
    soft_mask: NDArray[np.float32]
    size: NDArray[np.float32]
    field: NDArray[np.uint8] | None = None
    """The whole field at the size that the encoder asks for; None where it does not ask."""
    field_features: NDArray[np.float32] | None = None
    """What the detector says of the whole field; None where the encoder does not ask."""


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """What detection and binarization found on one page."""

    score_map: ScoreMap
    detector: ModelId
    gate_threshold: float
    mask: NDArray[np.bool_]
    candidates: tuple[Candidate, ...]


def review(
    data: bytes,
    *,
    source: str,
    path: str,
    sha256: str,
    recipe: Recipe,
    models: Models,
    reviewed_utc: str,
    site: str = "",
    max_pixels: int = LIMITS.max_image_px,
    max_pages: int = LIMITS.max_pages,
) -> Review:
    """Review one image file.

    Args:
        data: the file's content; the same bytes that were hashed.
        source: name of the tool, as its drop folder has it.
        path: relative to the drop folder, POSIX.
        sha256: of ``data``.
        recipe: how to judge.
        models: who answers.
        reviewed_utc: the time to write down.
        site: name of the site that reviews, if any does.
        max_pixels: of one page.
        max_pages: of one file.

    Raises:
        ImageError: the file cannot be reviewed, now or later.
        ServiceUnavailable: the models are away; try the same file again.
        ConfigError: the recipe asks for a false alarm rate that the detector's calibration cannot promise.
    """
    timings = dict.fromkeys(STAGES, 0.0)
    with _timed(timings, "decode"):
        micrographs = decoding.decode(data, name=path, max_pixels=max_pixels, max_pages=max_pages)
    pages, answered = _review_pages(micrographs, recipe, models, timings)
    return Review(
        source=source,
        path=path,
        sha256=sha256,
        reviewed_utc=reviewed_utc,
        recipe_name=recipe.name,
        recipe_id=recipe.id,
        model_versions={model: one.version for model, one in answered.items()},
        model_hashes={model: one.content_hash for model, one in answered.items()},
        pages=pages,
        timings_ms=timings,
        site=site,
    )


def search(page: Micrograph, recipe: Recipe, models: Models, *, timings_ms: dict[str, float] | None = None) -> Search:
    """Detect and binarize one page; training uses it too, so that heads see the crops that the daemon cuts.

    Raises:
        ServiceUnavailable: the models are away.
        ImageError: the detector cannot judge the page.
        ConfigError: see ``gate_threshold``.
    """
    timings = timings_ms if timings_ms is not None else dict.fromkeys(STAGES, 0.0)
    threshold = gate_threshold(recipe, models)
    with _timed(timings, "detect"):
        asked = inputs.for_detector(models.meta("detector"), page.field)
        score_map, detector = detection.detect(asked, models)
    settings = recipe.binarization
    if not binarization.gate(score_map.raw_score, threshold=threshold):
        return Search(score_map, detector, threshold, np.zeros((settings.grid_px, settings.grid_px), bool), ())
    size_hw = page.field.shape[0], page.field.shape[1]
    with _timed(timings, "binarize"):
        found = binarization.binarize(
            score_map.values,
            method=settings.method,
            grid_px=settings.grid_px,
            percentiles=settings.percentiles,
            n_thresholds=settings.n_thresholds,
            epsilon=settings.epsilon,
            min_length=settings.min_plateau,
            max_mask_fraction=settings.max_mask_fraction,
            max_defects=binarization.BEFORE_MERGING * settings.max_defects,
        )
        regions = binarization.regions(
            found.mask,
            score_map.values,
            size_hw=size_hw,
            merge_fraction=settings.merge_fraction,
            max_regions=settings.max_defects,
        ) or [_whole_field(score_map, found.mask, size_hw)]
    with _timed(timings, "crop"):
        candidates = cut_out(regions, page, found.saliency, recipe, models, score_map)
    return Search(score_map, detector, threshold, found.mask, candidates)


def gate_threshold(recipe: Recipe, models: Models) -> float:
    """The raw score above which a page is searched: the recipe's own, or the conformal one of the detector's normals.

    Raises:
        ConfigError: too few normal images are known for the rate that the recipe asks.
    """
    if recipe.gate.threshold is not None:
        return recipe.gate.threshold
    normal_scores = np.array(models.meta("detector").normal_scores)
    threshold = binarization.conformal_threshold(normal_scores, false_alarm_rate=recipe.gate.false_alarm_rate)
    if not np.isfinite(threshold):
        raise ConfigError(
            f"recipe {recipe.name}: {len(normal_scores)} normal images cannot promise a false alarm rate of "
            f"{recipe.gate.false_alarm_rate}; raise gate.false_alarm_rate, or set gate.threshold from more of your own "
            f"normal images with `semwatch recipe calibrate`"
        )
    return threshold


def _whole_field(score_map: ScoreMap, mask: NDArray[np.bool_], size_hw: tuple[int, int]) -> Region:
    """The region of a page whose gate is open and whose mask is empty.

    Something is unusual and nothing stands out: the encoder judges the whole field rather than the page passing in
    silence as defect-free.
    """
    height, width = size_hw
    return Region((0, 0, width, height), height * width, float(score_map.values.max()), np.ones_like(mask))


def _review_pages(
    micrographs: Sequence[Micrograph], recipe: Recipe, models: Models, timings: dict[str, float]
) -> tuple[tuple[PageReview, ...], dict[str, ModelId]]:
    """Review every page by the same versions: where a model was swapped between two pages, all are read once more."""
    for _ in range(MAX_SWAPS):
        by_page: list[dict[str, ModelId]] = []
        pages = []
        for page in micrographs:
            by_page.append({})
            pages.append(_review_page(page, recipe, models, timings, by_page[-1]))
        answered = {model: one for of_page in by_page for model, one in of_page.items()}
        if all(answered[model] == one for of_page in by_page for model, one in of_page.items()):
            return tuple(pages), answered
    raise ServiceUnavailable(f"a model changed {MAX_SWAPS} times within one file")


def _review_page(
    page: Micrograph, recipe: Recipe, models: Models, timings: dict[str, float], answered: dict[str, ModelId]
) -> PageReview:
    found = search(page, recipe, models, timings_ms=timings)
    answered["detector"] = found.detector
    with _timed(timings, "classify"):
        defects, asked = _name_defects(found, page, recipe, models)
    answered.update(asked)
    return PageReview(page, found.score_map, found.gate_threshold, found.mask, defects)


def _name_defects(
    found: Search, page: Micrograph, recipe: Recipe, models: Models
) -> tuple[tuple[Defect, ...], Mapping[str, ModelId]]:
    if not found.candidates:
        return (), {}
    features, verdicts, answered = classify(
        found.candidates,
        models,
        significance=recipe.unknown.significance,
        decide_confidence=recipe.unknown.decide_confidence,
    )
    defects = []
    for index, (candidate, verdict) in enumerate(zip(found.candidates, verdicts, strict=True)):
        area_px = candidate.region.area_px
        defects.append(
            Defect(
                defect_id=index + 1,
                box_xyxy=_to_micrograph(candidate.region.box_xyxy, page),
                area_px=area_px,
                area_nm2=None if page.pixel_nm is None else area_px * page.pixel_nm**2,
                peak_score=candidate.region.peak_score,
                crop_xyxy=_to_micrograph(candidate.window_xyxy, page),
                crop=candidate.crop,
                soft_mask=candidate.soft_mask,
                features=features[index],
                verdict=verdict,
                field_features=candidate.field_features,
            )
        )
    return tuple(defects), answered


def cut_out(
    regions: Sequence[Region],
    page: Micrograph,
    saliency: NDArray[np.float32],
    recipe: Recipe,
    models: Models,
    score_map: ScoreMap | None = None,
) -> tuple[Candidate, ...]:
    """Cut regions of a page out, as large and as sharp as the encoder wants them.

    ``score_map`` is the detector's answer, for an encoder that asks what it says of the field.
    """
    encoder = models.meta("encoder")
    field = inputs.whole_field(encoder, page.field)
    said = None if score_map is None else inputs.field_features(encoder, score_map)
    cut = (_cut_out(region, page, saliency, field, recipe, encoder) for region in regions)
    return tuple(replace(candidate, field_features=said) for candidate in cut)


def _cut_out(
    region: Region,
    page: Micrograph,
    saliency: NDArray[np.float32],
    field: NDArray[np.uint8] | None,
    recipe: Recipe,
    encoder: Meta,
) -> Candidate:
    size_hw = page.field.shape[0], page.field.shape[1]
    window = binarization.crop_window(
        region.box_xyxy,
        size_hw=size_hw,
        context=recipe.crop.context,
        min_side_fraction=recipe.crop.min_side_fraction,
    )
    return Candidate(
        region=region,
        window_xyxy=window,
        crop=binarization.cut(page.field, window, side_px=inputs.crop_px(encoder)),
        soft_mask=binarization.soft_mask(saliency, region.mask, window, size_hw=size_hw, tokens=inputs.tokens(encoder)),
        size=size_feature(window[2] - window[0], region.area_px, size_hw),
        field=field,
    )


def _to_micrograph(box_xyxy: Box, page: Micrograph) -> Box:
    left, top = page.field_xyxy[:2]
    x0, y0, x1, y1 = box_xyxy
    return x0 + left, y0 + top, x1 + left, y1 + top


@contextmanager
def _timed(timings_ms: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings_ms[stage] += (time.perf_counter() - start) * 1000
