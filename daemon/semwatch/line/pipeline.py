"""The line, from an image file's bytes to its review: the only file that knows every stage.

    bytes -> micrograph -> quality -> detection -> gate -> binarization -> crops -> classification -> Review

Where there is a reference of the same place, its difference stands in for detection, see ``reference``.

Straight code without threads, folders, Redis or ledger: the daemon, ``semwatch review`` and training all call it.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import Box, Defect, Domain, GateSource, Micrograph, PageReview, Reference, Review, ScoreMap
from semwatch.errors import ConfigError, ImageError, ServiceUnavailable
from semwatch.intake import decoding, quality
from semwatch.intake.decoding import LIMITS, Decode
from semwatch.line import binarization, detection, inputs, reference
from semwatch.line.binarization import Region
from semwatch.line.classification import classify, domain_of, size_feature
from semwatch.line.reference import Compared
from semwatch.models.contract import FIELD_FEATURES, REGION_FEATURES
from semwatch.models.inference import ModelId, Models
from semwatch.models.model_repository import Meta
from semwatch.settings.recipe import Recipe

MAX_SWAPS = 3
STAGES = ("decode", "quality", "detect", "binarize", "crop", "classify")
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
    """What the detector says of the whole field; as above."""
    region_features: NDArray[np.float32] | None = None
    """What the detector says of the region's places; as above."""


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """What detection and binarization found on one page."""

    score_map: ScoreMap
    detector: ModelId
    gate_threshold: float
    mask: NDArray[np.bool_]
    candidates: tuple[Candidate, ...]
    gate_source: GateSource = "detector"


@dataclass(frozen=True, slots=True)
class ReferenceFile:
    """The file of a reference, read; or why there is none."""

    name: str
    data: bytes | None
    reason: str = ""
    """Where ``data`` is None."""
    pages: tuple[Micrograph, ...] | None = None
    """``data``, where it has been decoded already."""


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
    stream_threshold: float | None = None,
    max_pixels: int = LIMITS.max_image_px,
    max_pages: int = LIMITS.max_pages,
    reference_file: ReferenceFile | None = None,
    named_pages: Mapping[int, int | None] | None = None,
    decode: Decode | None = None,
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
        stream_threshold: what the stream's own scores give for the gate, see ``gate_of``.
        max_pixels: of one page.
        max_pages: of one file.
        reference_file: picture of the same place to compare with; None where the recipe names none. A file with as many
            pages gives each its own, another file its first page.
        named_pages: the pages to review, each with the page of its reference, of ``reference_file`` where that is
            given, else of this file; None for a page without. No mapping: every page, by the recipe's ``reference``.
        decode: what decodes; None: this process.

    Raises:
        ImageError: the file cannot be reviewed, now or later.
        ServiceUnavailable: the models are away; try the same file again.
        ConfigError: the recipe asks for a false alarm rate that the detector's calibration cannot promise.
    """
    timings = dict.fromkeys(STAGES, 0.0)
    with _timed(timings, "decode"):
        decoded = partial(decode or decoding.decode, max_pixels=max_pixels, max_pages=max_pages)
        micrographs = decoded(data, name=path)
        if named_pages is None:
            micrographs, references = _with_references(micrographs, reference_file, recipe, decoded)
        else:
            micrographs, references = _as_named(micrographs, reference_file, named_pages, decoded)
    with _timed(timings, "detect"):
        compared = [reference.compared(*pair, recipe.reference) for pair in zip(micrographs, references, strict=True)]
    pairs = list(zip(micrographs, compared, strict=True))
    pages, answered = _review_pages(pairs, recipe, models, timings, stream_threshold)
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


def search(
    page: Micrograph,
    recipe: Recipe,
    models: Models,
    *,
    timings_ms: dict[str, float] | None = None,
    stream_threshold: float | None = None,
    difference: ScoreMap | None = None,
) -> Search:
    """Detect and binarize one page; training uses it too, so that heads see the crops that the daemon cuts.

    With a ``difference`` from a reference no detector says where a defect is: what both images show is none.

    Raises:
        ServiceUnavailable: the models are away.
        ImageError: the detector cannot judge the page.
        ConfigError: see ``gate_threshold``.
    """
    timings = timings_ms if timings_ms is not None else dict.fromkeys(STAGES, 0.0)
    if difference is not None:
        return _search_difference(page, difference, recipe, models, timings)
    threshold, gate_source = gate_of(recipe, models, stream_threshold=stream_threshold)
    with _timed(timings, "detect"):
        score_map, detector = detection.detect(page.field, models, coarser=recipe.detection.coarser)
    settings = recipe.binarization
    if not binarization.gate(score_map.raw_score, threshold=threshold):
        nothing = np.zeros(binarization.grid_hw(score_map.values.shape, grid_px=settings.grid_px), bool)
        return Search(score_map, detector, threshold, nothing, (), gate_source)
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
            hot_score=math.inf if settings.hot is None else settings.hot * threshold,
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
    return Search(score_map, detector, threshold, found.mask, candidates, gate_source)


def gate_of(recipe: Recipe, models: Models, *, stream_threshold: float | None = None) -> tuple[float, GateSource]:
    """The gate's threshold, and where it came from: the recipe's own goes first, then the stream's where there is one.

    Raises:
        ConfigError: see ``gate_threshold``.
    """
    if recipe.gate.threshold is None and stream_threshold is not None:
        return stream_threshold, "stream"
    return gate_threshold(recipe, models), "detector" if recipe.gate.threshold is None else "recipe"


def _search_difference(
    page: Micrograph, difference: ScoreMap, recipe: Recipe, models: Models, timings: dict[str, float]
) -> Search:
    """Cut out what differs from the reference by more than the threshold.

    The detector still says what the whole field is like: of which process, and what the encoder may ask.
    """
    settings, threshold = recipe.binarization, recipe.reference.threshold
    with _timed(timings, "detect"):
        own, detector = detection.detect(page.field, models, coarser=recipe.detection.coarser)
    difference = replace(difference, domain_p=own.domain_p)
    with _timed(timings, "binarize"):
        found = reference.binarize(difference.values, threshold=threshold, grid_px=settings.grid_px)
        regions = binarization.regions(
            found.mask,
            found.values,
            size_hw=(page.field.shape[0], page.field.shape[1]),
            merge_fraction=settings.merge_fraction,
            max_regions=settings.max_defects,
        )
    with _timed(timings, "crop"):
        candidates = cut_out(regions, page, found.saliency, recipe, models, own) if regions else ()
    return Search(difference, detector, threshold, found.mask, candidates, "reference")


def _with_references(
    micrographs: tuple[Micrograph, ...],
    given: ReferenceFile | None,
    recipe: Recipe,
    decode: Decode,
) -> tuple[tuple[Micrograph, ...], list[tuple[str, Micrograph | None, str] | None]]:
    """Return the pages to review, and for each the name of its reference, the reference, and why there is none."""
    n_reference = recipe.reference.page
    if given is not None:
        if given.data is None:
            return micrographs, [(given.name, None, given.reason)] * len(micrographs)
        try:
            pages = given.pages or decode(given.data, name=given.name)
        except ImageError as error:
            return micrographs, [(given.name, None, f"the reference cannot be read: {error}")] * len(micrographs)
        is_page_by_page = len(pages) == len(micrographs)
        return micrographs, [(given.name, pages[i if is_page_by_page else 0], "") for i in range(len(micrographs))]
    if n_reference is None:
        return micrographs, [None] * len(micrographs)
    name = f"page {n_reference}"
    own = [page for page in micrographs if page.page == n_reference]
    others = tuple(page for page in micrographs if page.page != n_reference)
    if not own or not others:
        reason = f"the file has no page {n_reference}" if not own else "the file has no page beside the reference"
        return micrographs, [(name, None, reason)] * len(micrographs)
    return others, [(name, own[0], "")] * len(others)


def _as_named(
    micrographs: tuple[Micrograph, ...],
    given: ReferenceFile | None,
    named: Mapping[int, int | None],
    decode: Decode,
) -> tuple[tuple[Micrograph, ...], list[tuple[str, Micrograph | None, str] | None]]:
    """Return the pages that are named, each with its reference as ``_with_references`` has it.

    Raises:
        ImageError: the file has none of these pages.
    """
    chosen = tuple(page for page in micrographs if page.page in named)
    if not chosen:
        wanted = ", ".join(map(str, sorted(named)[:10]))
        raise ImageError(f"its KLARF names the pages {wanted} (from 0); the file has {len(micrographs)}")
    pool, why = micrographs, ""
    if given is not None and any(page is not None for page in named.values()):
        try:
            pool, why = (given.pages or decode(given.data, name=given.name), "") if given.data else ((), given.reason)
        except ImageError as error:
            pool, why = (), f"the reference cannot be read: {error}"
    by_page = {page.page: page for page in pool}
    references: list[tuple[str, Micrograph | None, str] | None] = []
    for page in chosen:
        of = named[page.page]
        name = f"page {of}" if given is None else f"{given.name}, page {of}"
        missing = "" if of in by_page else why or f"the file has no page {of}"
        references.append(None if of is None else (name, by_page.get(of), missing))
    return chosen, references


def gate_threshold(recipe: Recipe, models: Models) -> float:
    """The raw score above which a page is searched; see ``threshold_of``.

    Raises:
        ConfigError: too few normal images are known for the rate that the recipe asks.
    """
    return threshold_of(recipe, models.meta("detector"))


def threshold_of(recipe: Recipe, detector: Meta) -> float:
    """The recipe's own threshold of the gate, or the conformal one of the detector's normal images.

    Raises:
        ConfigError: too few normal images are known for the rate that the recipe asks.
    """
    if recipe.gate.threshold is not None:
        return recipe.gate.threshold
    normal_scores = np.array(detector.normal_scores)
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
    compared: Sequence[tuple[Micrograph, Compared]],
    recipe: Recipe,
    models: Models,
    timings: dict[str, float],
    stream_threshold: float | None,
) -> tuple[tuple[PageReview, ...], dict[str, ModelId]]:
    """Review every page by the same versions: where a model was swapped between two pages, all are read once more."""
    for _ in range(MAX_SWAPS):
        by_page: list[dict[str, ModelId]] = []
        pages = []
        for page, (difference, met) in compared:
            by_page.append({})
            pages.append(_review_page(page, difference, met, recipe, models, timings, by_page[-1], stream_threshold))
        answered = {model: one for of_page in by_page for model, one in of_page.items()}
        if all(answered[model] == one for of_page in by_page for model, one in of_page.items()):
            return tuple(pages), answered
    raise ServiceUnavailable(f"a model changed {MAX_SWAPS} times within one file")


def _review_page(
    page: Micrograph,
    difference: ScoreMap | None,
    met: Reference | None,
    recipe: Recipe,
    models: Models,
    timings: dict[str, float],
    answered: dict[str, ModelId],
    stream_threshold: float | None,
) -> PageReview:
    with _timed(timings, "quality"):
        seen = quality.admit(page, recipe.quality)
    if not seen.is_image:  # no model is asked: there is nothing to find a defect on
        nothing = np.zeros((recipe.binarization.grid_px, recipe.binarization.grid_px), bool)
        threshold, source = gate_of(recipe, models, stream_threshold=stream_threshold)
        return PageReview(page, None, threshold, nothing, (), gate_source=source, quality=seen, reference=met)
    found = search(page, recipe, models, timings_ms=timings, stream_threshold=stream_threshold, difference=difference)
    answered["detector"] = found.detector
    with _timed(timings, "classify"):
        domain = domain_of(found.score_map.domain_p, significance=recipe.domain.significance)
        defects, asked = _name_defects(found, page, recipe, models, domain)
    answered.update(asked)
    return PageReview(
        page, found.score_map, found.gate_threshold, found.mask, defects, domain, seen, found.gate_source, met
    )


def _name_defects(
    found: Search, page: Micrograph, recipe: Recipe, models: Models, domain: Domain
) -> tuple[tuple[Defect, ...], Mapping[str, ModelId]]:
    if not found.candidates:
        return (), {}
    features, verdicts, answered = classify(found.candidates, models, recipe.unknown, domain=domain)
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
                region_features=candidate.region_features,
            )
        )
    return tuple(defects), answered


def cut_out(
    regions: Sequence[Region],
    page: Micrograph,
    saliency: NDArray[np.float32],
    recipe: Recipe,
    models: Models,
    answer: ScoreMap | None = None,
) -> tuple[Candidate, ...]:
    """Cut regions of a page out, as large and as sharp as the encoder wants them.

    ``answer`` is the detector's answer for this page, for an encoder that listens (``inputs.listens``).
    """
    encoder = models.meta("encoder")
    field = inputs.whole_field(encoder, page.field)
    of_field = answer.field_features if answer is not None and FIELD_FEATURES in encoder.inputs else None
    patches = answer.patch_features if answer is not None and REGION_FEATURES in encoder.inputs else None
    candidates = []
    for region in regions:
        of_region = None if patches is None else binarization.region_features(patches, saliency, region.mask)
        cut = _cut_out(region, page, saliency, field, recipe, encoder)
        candidates.append(replace(cut, field_features=of_field, region_features=of_region))
    return tuple(candidates)


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
