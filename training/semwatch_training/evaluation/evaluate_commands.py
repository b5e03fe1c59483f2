"""The commands ``semwatch-train evaluate``: arguments -> protocol -> report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from matplotlib.figure import Figure

from semwatch import binarization
from semwatch.defects import DEFECT_FREE
from semwatch.inference import Embedded
from semwatch_training import build_repository
from semwatch_training.data import datasets
from semwatch_training.data.datasets import DataSet, Sample, checked
from semwatch_training.data.public_sets import mtd_tiles
from semwatch_training.detection import fit_memory, train_detector
from semwatch_training.detection.memory_detector import MemoryForm, MemoryGraph, SelfMatchingGraph, Trunks
from semwatch_training.discovery import estimate_k, labelled_crops
from semwatch_training.discovery.fit_head import HeadFit
from semwatch_training.evaluation import evaluate, evaluate_detection
from semwatch_training.evaluation.evaluate_detection import Engine
from semwatch_training.evaluation.evaluation_data import (
    CACHE,
    REPOSITORY,
    SYNTHETIC,
    CacheOption,
    DataArgument,
    JsonOption,
    OutOption,
    PerTypeOption,
    RateOption,
    RepositoryOption,
    SeedsOption,
    crops_of,
    defects_only,
    finish,
    read_folder,
)
from semwatch_training.evaluation.report import Table
from semwatch_training.progress_bars import Bars
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.trunks import backbone

evaluate_app = typer.Typer(
    no_args_is_help=True,
    help="Judge detectors, heads and discovery on labelled images; every table has its baselines in the same run.",
)


@evaluate_app.command()
def detection(
    data: DataArgument,
    out: OutOption = Path("report-detection"),
    weights: Annotated[Path, typer.Option(help="Folder with detector.safetensors.")] = build_repository.SHIPPED,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 12,
    false_alarm_rate: RateOption = 0.01,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Detection: image and pixel AUROC, AUPRO, F1-max, false alarms of the gate; beside the training-free engines."""
    trunks = Trunks(backbone.load(cache), backbone.load_efficientnet(cache))
    engines = _support_set_free(trunks, weights, false_alarm_rate)
    with Bars() as progress:
        if data == SYNTHETIC:
            tables: list[Table] = []
            figures: dict[str, Figure] = {}
            n_normal = 2 * per_type
            for stage in STAGES:
                fields = evaluate_detection.synthetic(
                    stage, n_normal=n_normal, n_per_type=per_type, first_seed=datasets.SEED_EVALUATE
                )
                found, drawn = evaluate_detection.detection(
                    engines,
                    fields,
                    n_normal + per_type * len(DEFECT_TYPES[stage]),
                    false_alarm_rate=false_alarm_rate,
                    note=f"Synthetic {stage}, seeds from {datasets.SEED_EVALUATE:,}.",
                    progress=progress,
                )
                tables += [_titled(table, stage) for table in found]
                figures |= {f"{stage}: {caption}": figure for caption, figure in drawn.items()}
        else:
            data_set = read_folder(data, require_masks=False)
            test = checked(DataSet(data_set.name, (), data_set.test), require_masks=True).test
            normals = [sample for sample in data_set.train if sample.label == DEFECT_FREE]
            engines |= _with_normals(trunks, normals, data_set, range(seeds), false_alarm_rate, progress)
            tables, figures = evaluate_detection.detection(
                engines,
                evaluate_detection.of_samples(test),
                len({sample.image for sample in test}),
                false_alarm_rate=false_alarm_rate,
                note=f"{data_set.name}, its test part.",
                progress=progress,
            )
    finish(out, "Detection", tables, figures, data, range(seeds), as_json)


@evaluate_app.command()
def classification(
    data: DataArgument,
    out: OutOption = Path("report-classification"),
    repository: RepositoryOption = REPOSITORY,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 40,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Classification as fabs judge it: accuracy, purity, contribution, escapes; cross-validated over images."""
    crops, width, recipe = crops_of(data, repository, per_type, cache)
    tables, figures = evaluate.classification(
        crops,
        HeadFit(frozen_width=width),
        seeds=range(seeds),
        significance=recipe.unknown.significance,
        decide_confidence=recipe.unknown.decide_confidence,
    )
    finish(out, "Classification", tables, figures, data, range(seeds), as_json)


@evaluate_app.command()
def unknown(
    data: DataArgument,
    out: OutOption = Path("report-unknown"),
    repository: RepositoryOption = REPOSITORY,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 40,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """The unknown rule: each class left out in turn; AUROC of strangers against known, false-unknown rate."""
    crops, width, recipe = crops_of(data, repository, per_type, cache)
    tables, figures = evaluate.unknown_rule(
        crops, HeadFit(frozen_width=width), seeds=range(seeds), significance=recipe.unknown.significance
    )
    finish(out, "Unknown rule", tables, figures, data, range(seeds), as_json)


@evaluate_app.command()
def discovery(
    data: DataArgument,
    out: OutOption = Path("report-discovery"),
    base: Annotated[
        str | None,
        typer.Option(
            help="Labelled base of other material (a folder or 'synthetic'): our own score maps find the defects."
        ),
    ] = None,
    repository: RepositoryOption = REPOSITORY,
    false_alarm_rate: RateOption = 0.05,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 40,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Discovery against k-means, GCD and SimGCD on the same features.

    Without --base each class is unknown in turn, cut along true masks. With --base the repository's detector searches
    the test images, all of whose classes are to be discovered.
    """
    if base is None:
        crops, width, _ = crops_of(data, repository, per_type, cache)
        with Bars() as progress:
            tables, figures = evaluate.discovery_in_turn(
                *defects_only(crops, width), seeds=range(seeds), progress=progress
            )
    else:
        judged = read_folder(data, require_masks=False).test
        known, width, recipe = crops_of(base, repository, per_type, cache)
        gate = recipe.gate.model_copy(update={"false_alarm_rate": false_alarm_rate})
        with Embedded(repository, models=("detector", "encoder")) as models, Bars() as progress:
            found = labelled_crops.searched(models, recipe.model_copy(update={"gate": gate}), judged, progress=progress)
            tables, figures = evaluate.discovery_of_images(
                known, found, frozen_width=width, seeds=range(seeds), progress=progress
            )
    finish(out, "Discovery", tables, figures, data, range(seeds), as_json)


@evaluate_app.command()
def k(
    data: DataArgument,
    out: OutOption = Path("report-k"),
    repository: RepositoryOption = REPOSITORY,
    problems: Annotated[int, typer.Option(min=2, help="Problems drawn from the classes.")] = 60,
    per_type: PerTypeOption = 40,
    seed: int = 0,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """The number of classes: every rule over problems drawn from the classes at hand."""
    crops, width, _ = crops_of(data, repository, per_type, cache)
    with Bars() as progress:
        tables, figures = evaluate.number_of_classes(
            *defects_only(crops, width),
            n_problems=problems,
            seed=seed,
            rules=get_args(estimate_k.Rule),
            progress=progress,
        )
    finish(out, "Number of classes", tables, figures, data, (seed,), as_json)


# ---- engines ----


def _support_set_free(trunks: Trunks, weights: Path, rate: float) -> dict[str, Engine]:
    """Engines that see nothing but the image they judge."""
    detector, normal_scores, _ = train_detector.load(weights / "detector.safetensors")
    graph = train_detector.with_trunk(trunks.vit, detector, trunks.efficientnet)
    form = MemoryForm()
    return {
        "shipped": Engine((graph,), detector.form.input_px, "none", _thresholds([normal_scores], rate)),
        "self-matching": Engine((SelfMatchingGraph(trunks, form).eval(),), form.input_px, "none"),
    }


def _with_normals(
    trunks: Trunks, normals: Sequence[Sample], data_set: DataSet, seeds: Sequence[int], rate: float, progress: Bars
) -> dict[str, Engine]:
    """The memory, fitted on the data set's normal training images with every seed; nothing where it has none."""
    if not normals:
        return {}
    images = [datasets.load_gray(sample) for sample in normals]
    groups = mtd_tiles(normals).tolist() if data_set.name == "MTD" else None
    form = MemoryForm()
    patches = fit_memory.look(images, trunks, form, groups=groups, progress=progress)
    memories = [fit_memory.remember(patches, form, seed=seed, progress=progress) for seed in seeds]
    graphs = tuple(MemoryGraph(trunks, memory).eval() for memory in memories)
    thresholds = _thresholds([memory.normal_scores for memory in memories], rate)
    return {"memory": Engine(graphs, form.input_px, str(len(images)), thresholds)}


def _thresholds(scores: Sequence[Sequence[float]], rate: float) -> tuple[float, ...]:
    """The gates' conformal thresholds, or none where too few normal scores are known for the rate."""
    found = [binarization.conformal_threshold(np.array(s), false_alarm_rate=rate) for s in scores if len(s)]
    return tuple(found) if len(found) == len(scores) and np.isfinite(found).all() else ()


def _titled(table: Table, stage: str) -> Table:
    return Table(f"{table.title}, {stage}", table.columns, table.rows, table.note, table.command)
