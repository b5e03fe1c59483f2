"""A user's labelled images as the line sees them: searched once with an open gate, then judged by any gate and head.

An image is judged by the region that shows its defect: the one that shares most with its mask or box; where nobody drew
one, the hottest. The verdict on a defect that no region shows, or behind a shut gate, is defect-free: an escape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, Domain, Micrograph, Verdict
from semwatch.intake import decoding
from semwatch.line import inputs
from semwatch.line.classification import decide, domain_of
from semwatch.line.marked import given
from semwatch.line.pipeline import Candidate, search
from semwatch.models.crop_store import KeptCrop
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data.datasets import Sample, load_mask
from semwatch_training.discovery.labelled_crops import NOT_A_DEFECT, shown_defect
from semwatch_training.system.progress_bars import Progress

MOST_REGIONS = 3
"""Of an image, hottest first: what a defect-free image teaches is told by its worst regions."""

Answers = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits and p-values (n, K)."""
Head = Callable[[NDArray[np.float32]], Answers]
"""A head as a function of features (n, D)."""


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One region of an image, encoded."""

    features: NDArray[np.float32]
    """(D,)"""
    view: KeptCrop
    is_truth: bool
    """Whether it shows the labelled defect, as far as anybody said where that is."""
    by_search: bool = True
    """False: cut along the mask, because the search found nothing there."""


@dataclass(frozen=True, slots=True, eq=False)
class Looked:
    """One labelled defect, or one defect-free image, after the search."""

    sample: Sample
    field: NDArray[np.uint8]
    raw_score: float
    domain_p: float | None
    regions: tuple[Region, ...]
    """The region that is judged first, then the others by heat."""
    is_drawn: bool
    """Whether a mask or box says where the defect is."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one labelled image."""

    truth: str
    kind: str
    """As ``Verdict.kind``; or ``gate shut``, ``not found``, ``nothing found`` where no head was asked."""
    label: str | None
    """None: not decided."""
    confidence: float


def look(
    models: Embedded, recipe: Recipe, samples: Sequence[Sample], *, what: str = "labelled images", progress: Progress
) -> list[Looked]:
    """Search images with an open gate and encode their regions.

    Raises:
        ConfigError: a mask or box that does not fit its image.
        ImageError: a file is not a whole image.
    """
    opened = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    found = []
    for done, sample in enumerate(samples, start=1):
        found.append(_look(models, opened, sample))
        progress(what, done, len(samples))
    return found


def _look(models: Embedded, opened: Recipe, sample: Sample) -> Looked:
    field = decoding.read(sample.image)[0].field
    height, width = field.shape
    page = Micrograph(field, (0, 0, width, height), 0, None, None)
    result = search(page, opened, models)
    candidates = sorted(result.candidates, key=lambda one: -one.region.peak_score)
    is_drawn = sample.label != DEFECT_FREE and sample.mask is not None
    if is_drawn:
        mask = load_mask(sample, (height, width))
        shown = [shown_defect(one, mask[None]) != NOT_A_DEFECT for one in candidates]
        order = sorted(range(len(candidates)), key=lambda k: (not shown[k], -candidates[k].region.area_px * shown[k]))
        chosen = [(candidates[k], shown[k], True) for k in order[:MOST_REGIONS]]
        if not any(shown) and mask.any():
            chosen.insert(0, (given(mask, page, opened, models), True, False))
    else:
        chosen = [(one, k == 0, True) for k, one in enumerate(candidates[:MOST_REGIONS])]
    features = _encoded([one for one, _, _ in chosen], models)
    regions = [
        Region(row, _kept(one), is_truth, by_search)
        for row, (one, is_truth, by_search) in zip(features, chosen, strict=True)
    ]
    answer = result.score_map
    return Looked(sample, field, answer.raw_score, answer.domain_p, tuple(regions), is_drawn)


def _encoded(candidates: Sequence[Candidate], models: Embedded) -> NDArray[np.float32]:
    meta = models.meta("encoder")
    if not candidates:
        return np.zeros((0, *meta.outputs["features"].shape), np.float32)
    return models.infer("encoder", inputs.for_encoder(meta, list(candidates))).outputs["features"]


def _kept(one: Candidate) -> KeptCrop:
    return KeptCrop(one.crop, one.soft_mask, one.size, None, one.field_features, one.region_features)


def head_of(models: Embedded) -> tuple[Head, tuple[str, ...]]:
    """The head of a repository as a function, and its labels."""

    def ask(features: NDArray[np.float32]) -> Answers:
        outputs = models.infer("head", inputs.for_head(features)).outputs
        return outputs["logits"], outputs["p_values"]

    return ask, models.meta("head").labels


def judge(
    looked: Sequence[Looked], head: Head, labels: Sequence[str], recipe: Recipe, threshold: float
) -> list[Judgement]:
    """Judge images by a gate and a head, as the line would.

    Args:
        looked: images after the search.
        head: answers.
        labels: of the head.
        recipe: the unknown rule, and what counts as a known process.
        threshold: of the gate.
    """
    return [_judge(one, head, labels, recipe, threshold) for one in looked]


def _judge(one: Looked, head: Head, labels: Sequence[str], recipe: Recipe, threshold: float) -> Judgement:
    truth = one.sample.label
    seen = [region for region in one.regions if region.by_search]
    if not one.raw_score > threshold:
        return Judgement(truth, "gate shut", DEFECT_FREE, 1.0)
    if not seen or (one.is_drawn and not any(region.is_truth for region in seen)):
        return Judgement(truth, "not found" if truth != DEFECT_FREE else "nothing found", DEFECT_FREE, 1.0)
    domain = domain_of(one.domain_p, significance=recipe.domain.significance)
    verdicts = _verdicts(seen if truth == DEFECT_FREE else seen[:1], head, labels, recipe, domain)
    # A defect-free image is called so where all of its regions are dismissed.
    worst = next((verdict for verdict in verdicts if verdict.label != DEFECT_FREE), verdicts[0])
    return Judgement(truth, worst.kind, worst.label, worst.confidence)


def _verdicts(
    regions: Sequence[Region], head: Head, labels: Sequence[str], recipe: Recipe, domain: Domain
) -> list[Verdict]:
    logits, p_values = head(np.stack([region.features for region in regions]))
    return [decide(row, p, labels, recipe.unknown, domain=domain) for row, p in zip(logits, p_values, strict=True)]


def renamed(judgements: Sequence[Judgement], names: dict[str, str]) -> list[Judgement]:
    """The same with true labels as a head calls them."""
    return [replace(one, truth=names.get(one.truth, one.truth)) for one in judgements]
