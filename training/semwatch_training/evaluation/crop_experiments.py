"""The paper's experiments of masks, crops and classes, each a function that gives a table like the paper's.

Source: IC-DefectNCD, tables 5 (k) and 7 (mask and crop), and its comparison of binarisation rules (section 3.3).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE, Micrograph
from semwatch.errors import ConfigError
from semwatch.line import inputs
from semwatch.line.detection import detect
from semwatch.line.marked import given
from semwatch.line.scaling import resize
from semwatch.models.inference import Embedded
from semwatch.settings.recipe import Recipe
from semwatch_training.data import datasets
from semwatch_training.discovery import clustering, estimate_k
from semwatch_training.discovery.labelled_crops import encode
from semwatch_training.evaluation.binarization_rules import mask_table
from semwatch_training.evaluation.evaluate_detection import Field, of_samples
from semwatch_training.evaluation.evaluate_discovery import labelled_half
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.metrics import class_metrics
from semwatch_training.metrics.uncertainty import Spread
from semwatch_training.system.progress_bars import Progress

# ---- binarisation ----


def binarization(models: Embedded, fields: Mapping[str, Iterable[Field]], n: int, *, progress: Progress) -> Table:
    """Compare rules that turn score maps into masks, on the maps of the repository's detector.

    Args:
        models: with a detector.
        fields: n in all, by name of their group, such as a process stage; those without a true mask are left out.
        n: for the progress.
        progress: called after every field.

    Raises:
        ConfigError: no field of a group has a true mask.
    """
    done = 0
    groups: dict[str, tuple[list[NDArray[np.float32]], list[NDArray[np.bool_]]]] = {}
    for group, members in fields.items():
        maps, truths = groups.setdefault(group, ([], []))
        for field in members:
            done += 1
            if field.mask.any():
                maps.append(detect(_page(field).field, models)[0].values)
                truths.append(field.mask)
            progress("fields", done, n)
    return mask_table(groups, title="Binarisation of score maps")


def _page(field: Field) -> Micrograph:
    height, width = field.mask.shape
    return Micrograph(field.image, (0, 0, width, height), 0, None, None)


# ---- mask and crop ----

MASKINGS = ("whole image", "crop alone", "crop, binary mask", "crop, soft mask")


def mask_and_crop(
    samples: Sequence[datasets.Sample],
    models: Embedded,
    recipe: Recipe,
    *,
    frozen_width: int,
    seeds: Sequence[int],
    progress: Progress,
) -> Table:
    """Cluster a data set's defects by what the encoder says of the whole image, of the crop, and of the masked crop.

    Raises:
        ConfigError: no sample has a mask that marks anything.
    """
    labels: list[str] = []
    features: dict[str, list[NDArray[np.float32]]] = {name: [] for name in MASKINGS}
    for done, field in enumerate(of_samples(samples), start=1):
        if field.label == DEFECT_FREE or not field.mask.any():
            continue
        labels.append(field.label)
        for name, vector in _by_masking(field, models, recipe).items():
            features[name].append(vector)
        progress("crops", done, len(samples))
    if not labels:
        raise ConfigError("no sample has a mask that marks anything: there is no defect to cluster")
    truth = np.array(labels)
    k = len(set(labels))
    rows: list[tuple[Cell, ...]] = []
    for name, vectors in features.items():
        stacked = np.stack(vectors)[:, :frozen_width]
        runs = [clustering.plain_kmeans(stacked, k, seed=seed).assignment for seed in seeds]
        figures = [
            (class_metrics.nmi(truth, a), class_metrics.ari(truth, a), class_metrics.accuracy(truth, a)) for a in runs
        ]
        rows.append((name, *(Spread.of(column) for column in zip(*figures, strict=True))))
    note = f"{len(labels)} defects of {k} classes, true masks, plain k-means, k given, seeds {list(seeds)}."
    return Table("Mask and crop", ("the encoder sees", "NMI", "ARI", "accuracy"), tuple(rows), note)


def _by_masking(field: Field, models: Embedded, recipe: Recipe) -> Mapping[str, NDArray[np.float32]]:
    cropped = given(field.mask, _page(field), recipe, models)
    side = inputs.crop_px(models.meta("encoder"))
    blank = np.zeros_like(cropped.soft_mask)
    whole = replace(cropped, crop=resize(field.image, (side, side)), soft_mask=blank)
    return {
        "whole image": encode(whole, models),
        "crop alone": encode(replace(cropped, soft_mask=blank), models),
        "crop, binary mask": encode(replace(cropped, soft_mask=(cropped.soft_mask >= 0.5).astype(np.float32)), models),
        "crop, soft mask": encode(cropped, models),
    }


# ---- number of classes per stage ----


def k_per_stage(
    features: NDArray[np.float32],
    labels: Sequence[str],
    stages: Sequence[str],
    *,
    seeds: Sequence[int],
    rules: Sequence[estimate_k.Rule],
) -> Table:
    """Estimate k of each stage's defects, the other stages' classes labelled (half of their samples).

    Raises:
        ConfigError: fewer than two stages, or features that are not finite.
    """
    truth, of_stage = np.array(labels), np.array(stages)
    if len(set(stages)) < 2:
        raise ConfigError(f"one stage is novel and the others are known; there is only {sorted(set(stages))}")
    rows: list[tuple[Cell, ...]] = []
    for stage in sorted(set(stages)):
        known = sorted(set(truth[of_stage != stage].tolist()))
        elsewhere = np.where(of_stage != stage, truth, "")  # the novel stage's samples are never labelled
        answers: dict[str, list[float]] = {rule: [] for rule in rules}
        for seed in seeds:
            checked = clustering.checked(features, labelled_half(elsewhere, known, seed))
            measured = estimate_k.measure(*checked, estimate_k.feasible(*checked), seed=seed)
            for rule in rules:
                answers[rule].append(float(estimate_k.decide(measured, rule).k))
        rows.append((stage, len(known), len(set(labels)), *(Spread.of(answers[rule]) for rule in rules)))
    note = (
        f"{len(truth)} crops; seeds {list(seeds)}; k counts labelled and novel classes, defect-free not among them. "
        f"The nearer to true k, the better."
    )
    return Table("Number of classes by stage", ("novel stage", "labelled", "true k", *rules), tuple(rows), note)
