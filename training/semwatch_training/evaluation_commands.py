"""The commands ``semwatch-train evaluate`` and ``semwatch-train experiment``: arguments -> protocol -> report."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from matplotlib.figure import Figure

from semwatch import binarization
from semwatch.config import Recipe
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.inference import Embedded
from semwatch_training import (
    backbone,
    build_repository,
    data_folders,
    datasets,
    estimate_k,
    evaluate,
    evaluate_detection,
    experiments,
    labelled_crops,
    memory_detector,
    report,
    train_detector,
)
from semwatch_training.datasets import DataSet, Sample
from semwatch_training.evaluate_detection import Engine
from semwatch_training.head import HeadFit
from semwatch_training.labelled_crops import Crops
from semwatch_training.memory_detector import MemoryForm, MemoryGraph, SelfMatchingGraph, Trunks
from semwatch_training.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.progress_bars import Bars, console
from semwatch_training.public_sets import mtd_tiles
from semwatch_training.report import Provenance, Table
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.train_branch import BranchSchedule
from semwatch_training.train_detector import Schedule

evaluate_app = typer.Typer(
    no_args_is_help=True,
    help="Judge detectors, heads and discovery on labelled images; every table has its baselines in the same run.",
)
experiment_app = typer.Typer(
    no_args_is_help=True, help="The paper's experiments; each prints a table like the paper's."
)

SYNTHETIC = "synthetic"
NORMALS_ON_DISK = 99
"""Held-out normal images a 1 % gate needs."""

DataArgument = Annotated[
    str,
    typer.Argument(
        help="Folder of labelled images (images, masks, labels.csv; a folder per class; Magnetic-Tile; "
        "SD-saliency-900; a synthetic lot), or 'synthetic'."
    ),
]
OutOption = Annotated[Path, typer.Option(help="Folder of the report: report.md, report.json, pictures.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")]
RepositoryOption = Annotated[Path, typer.Option(help="Model repository whose models are judged.")]
CacheOption = Annotated[Path, typer.Option(help="Where backbones, features and crops are kept.")]
RateOption = Annotated[float, typer.Option(min=0.0001, max=0.5, help="Stated false alarm rate of the gate.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Tables as JSON on standard output.")]
PerTypeOption = Annotated[int, typer.Option(min=2, help="Synthetic images of each defect type.")]

REPOSITORY, CACHE = Path("model_repository"), Path(".cache")


# ---- evaluate ----


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
            data_set = data_folders.read(Path(data))
            normals = [sample for sample in data_set.train if sample.label == DEFECT_FREE]
            engines |= _with_normals(trunks, normals, data_set, range(seeds), false_alarm_rate, progress)
            test = data_set.test
            tables, figures = evaluate_detection.detection(
                engines,
                evaluate_detection.of_samples(test),
                len({sample.image for sample in test}),
                false_alarm_rate=false_alarm_rate,
                note=f"{data_set.name}, its test part.",
                progress=progress,
            )
    _finish(out, "Detection", tables, figures, data, range(seeds), as_json)


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
    crops, width, recipe = _crops(data, repository, per_type, cache)
    tables, figures = evaluate.classification(
        crops,
        HeadFit(frozen_width=width),
        seeds=range(seeds),
        significance=recipe.unknown.significance,
        decide_confidence=recipe.unknown.decide_confidence,
    )
    _finish(out, "Classification", tables, figures, data, range(seeds), as_json)


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
    crops, width, recipe = _crops(data, repository, per_type, cache)
    tables, figures = evaluate.unknown_rule(
        crops, HeadFit(frozen_width=width), seeds=range(seeds), significance=recipe.unknown.significance
    )
    _finish(out, "Unknown rule", tables, figures, data, range(seeds), as_json)


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
        crops, width, _ = _crops(data, repository, per_type, cache)
        kept = np.array(crops.labels) != DEFECT_FREE
        with Bars() as progress:
            tables, figures = evaluate.discovery_in_turn(
                crops.features[kept, :width],
                np.array(crops.labels)[kept].tolist(),
                seeds=range(seeds),
                progress=progress,
            )
    else:
        known, width, recipe = _crops(base, repository, per_type, cache)
        gate = recipe.gate.model_copy(update={"false_alarm_rate": false_alarm_rate})
        with Embedded(repository, models=("detector", "encoder")) as models, Bars() as progress:
            found = labelled_crops.searched(
                models, recipe.model_copy(update={"gate": gate}), _data_set(data).test, progress=progress
            )
            tables, figures = evaluate.discovery_of_images(
                known, found, frozen_width=width, seeds=range(seeds), progress=progress
            )
    _finish(out, "Discovery", tables, figures, data, range(seeds), as_json)


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
    crops, width, _ = _crops(data, repository, per_type, cache)
    kept = np.array(crops.labels) != DEFECT_FREE
    with Bars() as progress:
        tables, figures = evaluate.number_of_classes(
            crops.features[kept, :width],
            np.array(crops.labels)[kept].tolist(),
            n_problems=problems,
            seed=seed,
            rules=get_args(estimate_k.Rule),
            progress=progress,
        )
    _finish(out, "Number of classes", tables, figures, data, (seed,), as_json)


# ---- experiment ----


@experiment_app.command("cross-process")
def cross_process(
    out: OutOption = Path("report-cross-process"),
    n_normal: Annotated[int, typer.Option(min=8, help="Normal fields of the training stage.")] = 150,
    n_labelled: Annotated[int, typer.Option(min=8, help="Labelled defects of the training stage.")] = 200,
    n_backgrounds: Annotated[int, typer.Option(min=0, help="Procedural backgrounds beside them.")] = 150,
    steps: Annotated[int, typer.Option(min=10)] = 900,
    seeds: SeedsOption = 2,
    per_type: PerTypeOption = 12,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Train on one process stage, judge on the two others, in all three directions (the paper's table 1)."""
    with Bars() as progress:
        table = experiments.cross_process(
            backbone.load_efficientnet(cache),
            out / "work",
            n_normal=n_normal,
            n_labelled=n_labelled,
            n_backgrounds=n_backgrounds,
            schedule=BranchSchedule(steps=steps),
            seeds=range(seeds),
            n_test_normal=3 * per_type,
            n_test_per_type=per_type,
            progress=progress,
        )
    _finish(out, "Cross-process detection", [table], {}, SYNTHETIC, range(seeds), as_json)


@experiment_app.command("k-shot")
def k_shot(
    data: DataArgument,
    out: OutOption = Path("report-k-shot"),
    shots: Annotated[list[int] | None, typer.Option(help="Normal images shown; repeat the option.")] = None,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 8,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Few-shot detection: 1 and 4 normal images for the memory (the paper's table 3)."""
    trunks = Trunks(backbone.load(cache), backbone.load_efficientnet(cache))
    normals, fields = _normals_and_fields(data, per_type)
    with Bars() as progress:
        table = experiments.k_shot(
            trunks, normals, fields, shots=shots or [1, 4], seeds=range(seeds), progress=progress
        )
    _finish(out, "Few-shot detection", [table], {}, data, range(seeds), as_json)


@experiment_app.command("tokens")
def tokens(
    data: DataArgument,
    out: OutOption = Path("report-tokens"),
    m: Annotated[list[int] | None, typer.Option(help="Numbers of normal tokens; repeat the option.")] = None,
    n: Annotated[int, typer.Option(min=8, help="Normal images to train on.")] = 60,
    epochs: Annotated[int, typer.Option(min=1)] = 4,
    seeds: SeedsOption = 1,
    per_type: PerTypeOption = 4,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Number of normal tokens, by reconstruction and by direct matching (the paper's figure 10 and table 4)."""
    vit = backbone.load(cache)
    normals, fields = _normals_and_fields(data, per_type)
    size = DetectorForm().input_px

    def graph_of(form: DetectorForm) -> DetectorGraph:
        return DetectorGraph(vit, NIDetector(form))

    with Bars() as progress:
        table = experiments.normal_tokens(
            graph_of,
            list(experiments.squares(normals[:n], size)),
            fields,
            out / "work",
            tokens=m or [1, 2, 4, 6, 8],
            schedule=Schedule(epochs=epochs),
            seeds=range(seeds),
            progress=progress,
        )
    _finish(out, "Normal tokens", [table], {}, data, range(seeds), as_json)


@experiment_app.command("mask-and-crop")
def mask_and_crop(
    data: Annotated[str, typer.Argument(help="Folder of labelled images with masks.")],
    out: OutOption = Path("report-mask-and-crop"),
    repository: RepositoryOption = REPOSITORY,
    seeds: SeedsOption = 3,
    limit: Annotated[int, typer.Option(min=10, help="Images, drawn at random.")] = 240,
    as_json: JsonOption = False,
) -> None:
    """What crop and mask are worth to discovery (the paper's table 7)."""
    test = [sample for sample in _data_set(data).test if sample.label != DEFECT_FREE]
    drawn = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:limit]]
    with Embedded(repository, models=("encoder",)) as models, Bars() as progress:
        table = experiments.mask_and_crop(
            drawn, models, Recipe(), frozen_width=_frozen_width(models), seeds=range(seeds), progress=progress
        )
    _finish(out, "Mask and crop", [table], {}, data, range(seeds), as_json)


@experiment_app.command("k")
def k_per_stage(
    out: OutOption = Path("report-k-stages"),
    repository: RepositoryOption = REPOSITORY,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 40,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Number of classes of each synthetic stage, the other two labelled (the paper's table 5)."""
    crops, width, _ = _crops(SYNTHETIC, repository, per_type, cache)
    of_type = {name: stage for stage in STAGES for name in DEFECT_TYPES[stage]}
    kept = np.array(crops.labels) != DEFECT_FREE
    labels = np.array(crops.labels)[kept].tolist()
    table = experiments.k_per_stage(
        crops.features[kept, :width],
        labels,
        [of_type[label] for label in labels],
        seeds=range(seeds),
        rules=get_args(estimate_k.Rule),
    )
    _finish(out, "Number of classes by stage", [table], {}, SYNTHETIC, range(seeds), as_json)


# ---- parts ----


def _data_set(data: str) -> DataSet:
    if data == SYNTHETIC:
        raise ConfigError("this command reads images from a folder; make a synthetic one with `semwatch-train synth`")
    return data_folders.read(Path(data), require_masks=True)


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
    patches = memory_detector.look(images, trunks, form, groups=groups, progress=progress)
    memories = [memory_detector.remember(patches, form, seed=seed, progress=progress) for seed in seeds]
    graphs = tuple(MemoryGraph(trunks, memory).eval() for memory in memories)
    thresholds = _thresholds([memory.normal_scores for memory in memories], rate)
    return {"memory": Engine(graphs, form.input_px, str(len(images)), thresholds)}


def _thresholds(scores: Sequence[Sequence[float]], rate: float) -> tuple[float, ...]:
    """The gates' conformal thresholds, or none where too few normal scores are known for the rate."""
    found = [binarization.conformal_threshold(np.array(s), false_alarm_rate=rate) for s in scores if len(s)]
    return tuple(found) if len(found) == len(scores) and np.isfinite(found).all() else ()


def _crops(data: str, repository: Path, per_type: int, cache: Path) -> tuple[Crops, int, Recipe]:
    """Labelled crops of a data set, encoded once per encoder and kept; the width of the frozen features."""
    recipe = Recipe()
    with Embedded(repository, models=("encoder",)) as models, Bars() as progress:
        encoder = models.meta("encoder").weights_sha256[:12]
        width = _frozen_width(models)
        name = f"{SYNTHETIC}-{per_type}" if data == SYNTHETIC else Path(data).resolve().name
        kept = cache / "crops" / f"{name}-{encoder}.npz"
        if kept.exists():
            return labelled_crops.load(kept), width, recipe
        if data == SYNTHETIC:
            crops = labelled_crops.of_synthetic(
                models, recipe, n_per_type=per_type, first_seed=datasets.SEED_EVALUATE, progress=progress
            )
        else:
            data_set = data_folders.read(Path(data), require_masks=True)
            defective = [s for s in (*data_set.train, *data_set.test) if s.label != DEFECT_FREE]
            crops = labelled_crops.of_samples(models, recipe, datasets.distinct(defective), progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    labelled_crops.save(crops, kept)
    return crops, width, recipe


def _frozen_width(models: Embedded) -> int:
    width = models.meta("encoder").provenance.get("frozen_width")
    if not isinstance(width, int):
        raise ConfigError("the encoder's meta.json names no frozen_width; build the model repository again")
    return width


def _normals_and_fields(data: str, per_type: int) -> tuple[list[experiments.Image], list[evaluate_detection.Field]]:
    """Normal images to learn from, and fields to judge."""
    if data == SYNTHETIC:
        made = [
            list(evaluate_detection.synthetic(s, n_normal=40, n_per_type=0, first_seed=datasets.SEED_TRAIN))
            for s in STAGES
        ]
        normals = [field.image for turn in zip(*made, strict=True) for field in turn]
        judged = [
            field
            for stage in STAGES
            for field in evaluate_detection.synthetic(
                stage, n_normal=2 * per_type, n_per_type=per_type, first_seed=datasets.SEED_EVALUATE
            )
        ]
        return normals, judged
    data_set = data_folders.read(Path(data))
    learnt = [datasets.load_gray(s) for s in data_set.train if s.label == DEFECT_FREE]
    if not learnt:
        raise ConfigError(f"{data_set.name} has no normal image to learn from; put some in train")
    fields = evaluate_detection.of_samples(data_set.test)
    return learnt, [field for field in fields if field.label == DEFECT_FREE or field.mask.any()]


def _titled(table: Table, stage: str) -> Table:
    return Table(f"{table.title}, {stage}", table.columns, table.rows, table.note, table.command)


def _finish(
    out: Path,
    title: str,
    tables: Sequence[Table],
    figures: Mapping[str, Figure],
    data: str,
    seeds: Sequence[int],
    as_json: bool,
) -> None:
    command = shlex.join(["semwatch-train", *sys.argv[1:]])
    report.write(out, title, tables, figures, Provenance(command, tuple(seeds), Path(data).name))
    for table in tables:
        console.print(report.rich_table(table))
    console.print(f"report in {out}/report.md", highlight=False)
    if as_json:
        typer.echo(json.dumps([report.as_dict(table) for table in tables]))
