"""What stands behind each ``evaluate`` command: a protocol run on named data; arguments in, tables and pictures out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from semwatch.defects import DEFECT_FREE
from semwatch.models.inference import Embedded
from semwatch_training.data import datasets
from semwatch_training.data.datasets import DataSet, checked
from semwatch_training.discovery import estimate_k, labelled_crops
from semwatch_training.discovery.fit_head import HeadFit
from semwatch_training.evaluation import (
    detectors,
    evaluate_detection,
    evaluate_discovery,
    evaluate_heads,
    evaluation_data,
    searched_crops,
)
from semwatch_training.evaluation.evaluation_data import SYNTHETIC, Source
from semwatch_training.evaluation.options import CACHE, Unknown
from semwatch_training.evaluation.report import Result
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.system.defaults import SHIPPED
from semwatch_training.system.progress_bars import Progress


def detection(
    data: str,
    *,
    weights: Path = SHIPPED,
    seeds: Sequence[int],
    per_type: int,
    false_alarm_rate: float,
    cache: Path = CACHE,
    progress: Progress,
) -> Result:
    """Judge the shipped detector beside the training-free ones; on a folder also the memory of its normal images.

    Raises:
        ConfigError: a defect to judge by has no mask, or what ``evaluate_detection.detection`` refuses.
    """
    if data == SYNTHETIC:
        return _synthetic_detection(weights, per_type, false_alarm_rate, cache, progress)
    data_set = evaluation_data.read_folder(data, require_masks=False)
    test = checked(DataSet(data_set.name, (), data_set.test), require_masks=True).test
    normals = [sample for sample in data_set.train if sample.label == DEFECT_FREE]
    trunks = detectors.trunks(cache)
    compared = detectors.support_set_free(trunks, weights, false_alarm_rate=false_alarm_rate) | detectors.with_normals(
        trunks, normals, data_set.name, seeds, false_alarm_rate=false_alarm_rate, progress=progress
    )
    return evaluate_detection.detection(
        compared,
        evaluate_detection.of_samples(test),
        len({sample.image for sample in test}),
        false_alarm_rate=false_alarm_rate,
        note=f"{data_set.name}, its test part.",
        progress=progress,
    )


def _synthetic_detection(
    weights: Path, per_type: int, false_alarm_rate: float, cache: Path, progress: Progress
) -> Result:
    compared = detectors.support_set_free(detectors.trunks(cache), weights, false_alarm_rate=false_alarm_rate)
    result: Result = [], {}
    for stage in STAGES:
        n_normal = 2 * per_type
        tables, figures = evaluate_detection.detection(
            compared,
            evaluate_detection.synthetic(
                stage, n_normal=n_normal, n_per_type=per_type, first_seed=datasets.SEED_EVALUATE
            ),
            n_normal + per_type * len(DEFECT_TYPES[stage]),
            false_alarm_rate=false_alarm_rate,
            note=f"Synthetic {stage}, seeds from {datasets.SEED_EVALUATE:,}.",
            progress=progress,
        )
        result[0].extend(replace(table, title=f"{table.title}, {stage}") for table in tables)
        result[1].update({f"{stage}: {caption}": figure for caption, figure in figures.items()})
    return result


def classification(
    source: Source,
    *,
    seeds: Sequence[int],
    searched: bool = True,
    false_alarm_rate: float | None = None,
    progress: Progress,
) -> Result:
    """Judge heads on what the daemon's search finds behind its gate, or, not ``searched``, on true masks.

    ``false_alarm_rate`` is the gate's; None: the recipe's.
    """
    if searched:
        found, threshold, width, recipe = evaluation_data.searched_of(source, false_alarm_rate, progress=progress)
        crops, outcome = found.crops, searched_crops.behind_gate(found, threshold)
    else:
        (crops, width, recipe), outcome = evaluation_data.crops_of(source, progress=progress), None
    return evaluate_heads.classification(
        crops,
        HeadFit(frozen_width=width),
        seeds=seeds,
        rule=recipe.unknown,
        outcome=outcome,
    )


def unknown(source: Source, *, seeds: Sequence[int], progress: Progress) -> Result:
    """Leave each class out in turn and tell strangers from known crops."""
    crops, width, recipe = evaluation_data.crops_of(source, progress=progress)
    return evaluate_heads.unknown_rule(
        crops,
        HeadFit(frozen_width=width),
        seeds=seeds,
        significance=recipe.unknown.significance,
        crop_width=width - evaluation_data.width_of_field(source.repository),
    )


def discovery(source: Source, *, seeds: Sequence[int], leave_out: Unknown = "type", progress: Progress) -> Result:
    """Find each class again, or with "stage" all classes of each process stage, with no label of it; true masks.

    Raises:
        ConfigError: a class of no process stage, or what ``discovery_in_turn`` refuses.
    """
    crops, width, _ = evaluation_data.crops_of(source, progress=progress)
    features, labels = evaluation_data.defects_only(crops, width)
    by_stage = leave_out == "stage"
    return evaluate_discovery.discovery_in_turn(
        features,
        labels,
        seeds=seeds,
        groups=evaluation_data.by_stage(labels) if by_stage else None,
        of="stage" if by_stage else "class",
        progress=progress,
    )


def discovery_of_images(
    source: Source, base: str, *, seeds: Sequence[int], false_alarm_rate: float, progress: Progress
) -> Result:
    """Discover the classes of a folder's test images from our own score maps, beside a labelled base."""
    judged = evaluation_data.read_folder(source.data, require_masks=False).test
    known, width, recipe = evaluation_data.crops_of(replace(source, data=base), progress=progress)
    gated = evaluation_data.with_rate(recipe, false_alarm_rate)
    with Embedded(source.repository, models=("detector", "encoder")) as models:
        found = labelled_crops.searched(models, gated, judged, progress=progress)
    return evaluate_discovery.discovery_of_images(known, found, frozen_width=width, seeds=seeds, progress=progress)


def k(source: Source, *, n_problems: int, seed: int, progress: Progress) -> Result:
    """Let every rule estimate the number of classes of problems drawn from the classes at hand."""
    crops, width, _ = evaluation_data.crops_of(source, progress=progress)
    return evaluate_discovery.number_of_classes(
        *evaluation_data.defects_only(crops, width),
        n_problems=n_problems,
        seed=seed,
        rules=get_args(estimate_k.Rule),
        progress=progress,
    )
