"""Labelled crops: what heads are fitted on and judged by, cut as the daemon cuts them.

A head must see what the daemon will show it, so its crops come out of ``pipeline.search``, not out of the true masks.
What the search finds where nothing is wrong becomes the defect-free class. Only a planted defect that the search missed
is cut out along its true mask, so that rare types do not vanish from the head.

``of_samples`` cuts the defects of a data set on disk along their true masks; ``searched`` lets the daemon find them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from semwatch.defects import DEFECT_FREE, Micrograph
from semwatch.errors import ConfigError
from semwatch.line import inputs
from semwatch.line.classification import decide
from semwatch.line.marked import given
from semwatch.line.pipeline import Candidate, gate_threshold, search
from semwatch.models import crop_store
from semwatch.models.crop_store import KeptCrop
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe, UnknownRule
from semwatch_training.data.datasets import MAX_SEEDS, Sample, first_with_room, load_gray, load_mask, synthetic_set
from semwatch_training.discovery.fit_head import FitClassifier, HeadFit, fit_head
from semwatch_training.synthetic import DEFECT_TYPES, STAGES, SyntheticMicrograph

MIN_OVERLAP = 0.25
"""Share of the smaller of region and truth that must be common for the region to be that defect."""
NOT_A_DEFECT = -1
SIDES_PX = (512, 768, 1024)


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """Encoded crops with their labels, and which image each came from."""

    features: NDArray[np.float32]
    """(n, D)."""
    labels: tuple[str, ...]
    image_idx: NDArray[np.intp]
    """(n,) so that a split can keep an image's crops together."""
    area_px: NDArray[np.intp]
    """(n,)"""
    n_planted: dict[str, int]
    n_found: dict[str, int]
    views: tuple[KeptCrop, ...] = ()
    """n crops themselves, where they are kept."""


def collect(
    models: Embedded, recipe: Recipe, *, n_images: int, first_seed: int, progress: Callable[[str, int, int], None]
) -> Crops:
    """Search n synthetic images, one in eight defect-free, and encode what is found.

    The gate is open (threshold 0): the head must know the false alarms that a shut gate would hide.
    """
    recipe = recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"threshold": 0.0})})
    features, labels, image_idx, area_px, views = [], [], [], [], []
    planted: dict[str, int] = {}
    found: dict[str, int] = {}
    for index, image in enumerate(synthetic_images(n_images, first_seed=first_seed)):
        for label in image.labels:
            planted[label] = planted.get(label, 0) + 1
        height, width = image.pixels.shape
        page = Micrograph(image.pixels, (0, 0, width, height), 0, image.pixel_nm, None)
        candidates = search(page, recipe, models).candidates
        matched = match(candidates, image)
        for label in matched:
            found[label] = found.get(label, 0) + 1
        missed = [i for i, label in enumerate(image.labels) if label not in matched and image.masks[i].any()]
        candidates += tuple(given(image.masks[i], page, recipe, models) for i in missed)
        for candidate, label in zip(candidates, [*matched, *(image.labels[i] for i in missed)], strict=True):
            features.append(encode(candidate, models))
            labels.append(label)
            image_idx.append(index)
            area_px.append(candidate.region.area_px)
            of_detector = candidate.field_features, candidate.region_features
            views.append(KeptCrop(candidate.crop, candidate.soft_mask, candidate.size, None, *of_detector))
        progress("crops", index + 1, n_images)
    return Crops(
        np.stack(features), tuple(labels), np.array(image_idx), np.array(area_px), planted, found, tuple(views)
    )


def of_samples(
    models: Embedded, recipe: Recipe, samples: Sequence[Sample], *, progress: Callable[[str, int, int], None]
) -> Crops:
    """Cut the defect of each sample along its true mask and encode it; samples with an empty mask are left out.

    Defects of one image share its number, so that a split keeps them together.

    Raises:
        ConfigError: a normal sample, or no sample with a mask that marks anything.
    """
    features, labels, image_idx, area_px = [], [], [], []
    number_of = {path: number for number, path in enumerate(dict.fromkeys(sample.image for sample in samples))}
    for done, sample in enumerate(samples, start=1):
        if sample.label == DEFECT_FREE:
            raise ConfigError(f"{sample.image} is {DEFECT_FREE}: there is no mask to cut along; leave it out")
        page = _page(sample)
        truth = load_mask(sample, (page.field.shape[0], page.field.shape[1]))
        if truth.any():
            candidate = given(truth, page, recipe, models)
            features.append(encode(candidate, models))
            labels.append(sample.label)
            image_idx.append(number_of[sample.image])
            area_px.append(candidate.region.area_px)
        progress("crops", done, len(samples))
    if not features:
        raise ConfigError("no sample has a mask that marks anything: nothing to cut out")
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    return Crops(np.stack(features), tuple(labels), np.array(image_idx), np.array(area_px), counts, {})


def of_synthetic(
    models: Embedded, recipe: Recipe, *, n_per_type: int, first_seed: int, progress: Callable[[str, int, int], None]
) -> Crops:
    """Cut the defects of all three stages' synthetic images along their true masks and encode them."""
    features, labels, area_px = [], [], []
    total = n_per_type * sum(len(types) for types in DEFECT_TYPES.values())
    for stage in STAGES:
        for image in synthetic_set(stage, n_normal=0, n_per_type=n_per_type, first_seed=first_seed, side_px=768):
            height, width = image.pixels.shape
            page = Micrograph(image.pixels, (0, 0, width, height), 0, image.pixel_nm, None)
            candidate = given(image.masks[0], page, recipe, models)
            features.append(encode(candidate, models))
            labels.append(image.labels[0])
            area_px.append(candidate.region.area_px)
            progress("crops", len(labels), total)
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    return Crops(np.stack(features), tuple(labels), np.arange(len(labels)), np.array(area_px), counts, {})


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """What the daemon's search made of labelled images; an image whose gate stayed shut has no crop."""

    crops: Crops
    """Each with the label of its image."""
    labels: tuple[str, ...]
    """Of the images."""
    raw_scores: NDArray[np.float32]
    """Of the images."""
    gate_threshold: float


def searched(
    models: Embedded, recipe: Recipe, samples: Sequence[Sample], *, progress: Callable[[str, int, int], None]
) -> Searched:
    """Search the images of samples as the daemon does, gate included, and encode what is found; each image once.

    Raises:
        ConfigError: an image with two labels, the gate has no threshold, or it opened on no image.
    """
    samples = list({(sample.image, sample.label): sample for sample in samples}.values())
    counts = Counter(sample.image for sample in samples)
    if twice := [path for path, n in counts.items() if n > 1]:
        raise ConfigError(
            f"{len(twice)} images show defects of several classes, the first is {twice[0]}; here an image as a whole "
            f"gets one name: leave them out"
        )
    features, labels, image_idx, area_px, raw = [], [], [], [], []
    threshold = gate_threshold(recipe, models)
    for index, sample in enumerate(samples):
        found = search(_page(sample), recipe, models)
        raw.append(found.score_map.raw_score)
        for candidate in found.candidates:
            features.append(encode(candidate, models))
            labels.append(sample.label)
            image_idx.append(index)
            area_px.append(candidate.region.area_px)
        progress("search", index + 1, len(samples))
    if not features:
        raise ConfigError(f"the gate opened on none of {len(samples)} images at {threshold:.4f}; lower it")
    crops = Crops(np.stack(features), tuple(labels), np.array(image_idx), np.array(area_px), {}, {})
    return Searched(crops, tuple(sample.label for sample in samples), np.array(raw, np.float32), threshold)


def _page(sample: Sample) -> Micrograph:
    field = load_gray(sample)
    height, width = field.shape
    return Micrograph(field, (0, 0, width, height), 0, None, None)


def synthetic_images(n: int, *, first_seed: int) -> Iterator[SyntheticMicrograph]:
    """Yield n images: every stage's types in turn, one in eight without a defect."""
    kinds = [(stage, label) for stage in STAGES for label in DEFECT_TYPES[stage]]
    rng = np.random.default_rng(first_seed)
    for index in range(n):
        stage, label = kinds[index % len(kinds)]
        side = int(rng.choice(SIDES_PX))
        defects = () if index % 8 == 7 else (label,)
        seeds = range(first_seed + index, first_seed + index + MAX_SEEDS * n, n)
        yield first_with_room(stage, defects, seeds, (side, side))


def match(candidates: tuple[Candidate, ...], image: SyntheticMicrograph) -> list[str]:
    """Label each candidate with the true defect it overlaps most, or as defect-free."""
    numbers = (shown_defect(candidate, image.masks) for candidate in candidates)
    return [DEFECT_FREE if number == NOT_A_DEFECT else image.labels[number] for number in numbers]


def shown_defect(candidate: Candidate, masks: NDArray[np.bool_]) -> int:
    """Number of the true mask, of (d, H, W), that a candidate shares the largest part with, or ``NOT_A_DEFECT``."""
    height, width = masks.shape[1:]
    region = cv2.resize(candidate.region.mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    common = (masks & region).sum(axis=(1, 2))
    share = common / np.maximum(1, np.minimum(masks.sum(axis=(1, 2)), region.sum()))
    return int(share.argmax()) if share.size and share.max() >= MIN_OVERLAP else NOT_A_DEFECT


def encode(candidate: Candidate, models: Embedded) -> NDArray[np.float32]:
    """Features (D,) of one candidate."""
    asked = inputs.for_encoder(models.meta("encoder"), [candidate])
    features: NDArray[np.float32] = models.infer("encoder", asked).outputs["features"][0]
    return features


def save(crops: Crops, path: Path) -> None:
    """Keep crops and their features, so that a head can be fitted again in seconds."""
    shard = crop_store.encode(crops.views) if crops.views else b""
    counts = json.dumps([crops.n_planted, crops.n_found])
    with path.open("wb") as file:
        np.savez(
            file,
            features=crops.features,
            labels=np.array(crops.labels),
            image_idx=crops.image_idx,
            area_px=crops.area_px,
            counts=counts,
            shard=np.frombuffer(shard, np.uint8),
        )


def load(path: Path) -> Crops:
    """Read what ``save`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        planted, found = json.loads(str(file["counts"]))
        shard = file["shard"].tobytes() if "shard" in file.files else b""
        views = tuple(crop_store.decode(shard)) if shard else ()
        return Crops(
            file["features"], tuple(file["labels"].tolist()), file["image_idx"], file["area_px"], planted, found, views
        )


def hold_out_report(
    crops: Crops, fit: HeadFit, *, share: float = 0.25, classify: FitClassifier | None = None
) -> dict[str, float | int]:
    """Fit on three quarters of the images and judge the crops of the rest; ``classify``: see ``fit_head``.

    Returns:
        Accuracy of the logits alone, macro-F1, and what the default unknown rule does to true members:
        share called unknown, share decided (one class fits, or the head is sure), accuracy of the decided.
    """
    rng = np.random.default_rng(fit.seed)
    images = np.unique(crops.image_idx)
    held_out = np.isin(crops.image_idx, rng.choice(images, int(share * len(images)), replace=False))
    labels = np.array(crops.labels)
    head = fit_head(
        crops.features[~held_out],
        labels[~held_out].tolist(),
        fit,
        images=crops.image_idx[~held_out].tolist(),
        classify=classify,
    )
    with torch.no_grad():
        logits, p_values = (x.numpy() for x in head(torch.from_numpy(crops.features[held_out])))
    truth = labels[held_out]
    named = np.array(head.labels)[logits.argmax(axis=1)]
    rule = UnknownRule()
    verdicts = [decide(row, p, head.labels, rule) for row, p in zip(logits, p_values, strict=True)]
    decided = np.array([verdict.label is not None for verdict in verdicts])
    right = np.array([verdict.label == true for verdict, true in zip(verdicts, truth, strict=True)])
    return {
        "n_crops": len(labels),
        "n_held_out": int(held_out.sum()),
        "accuracy": round(float((named == truth).mean()), 4),
        "macro_f1": round(float(f1_score(truth, named, average="macro")), 4),
        "unknown_share": round(float(np.mean([verdict.kind == "unknown" for verdict in verdicts])), 4),
        "decided_share": round(float(decided.mean()), 4),
        "decided_accuracy": round(float(right[decided].mean()) if decided.any() else 0.0, 4),
    }
