"""The commands ``semwatch-train experiment``: the paper's experiments, arguments -> table -> report."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer

from semwatch.config import Recipe
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.inference import Embedded
from semwatch_training.data import datasets
from semwatch_training.detection.memory_detector import Trunks
from semwatch_training.detection.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.detection.train_branch import BranchSchedule
from semwatch_training.detection.train_detector import Schedule
from semwatch_training.discovery import estimate_k
from semwatch_training.evaluation import evaluate_detection, experiments
from semwatch_training.evaluation.evaluation_data import (
    CACHE,
    REPOSITORY,
    SYNTHETIC,
    CacheOption,
    DataArgument,
    JsonOption,
    OutOption,
    PerTypeOption,
    RepositoryOption,
    SeedsOption,
    crops_of,
    defects_only,
    finish,
    frozen_width,
    read_folder,
)
from semwatch_training.progress_bars import Bars
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.trunks import backbone

experiment_app = typer.Typer(
    no_args_is_help=True, help="The paper's experiments; each prints a table like the paper's."
)


@experiment_app.command("cross-process")
def cross_process(
    out: OutOption = Path("report-cross-process"),
    n_normal: Annotated[int, typer.Option(min=8, help="Normal fields of the training stage.")] = 150,
    n_labelled: Annotated[int, typer.Option(min=8, help="Labelled defects of the training stage.")] = 200,
    n_backgrounds: Annotated[int, typer.Option(min=0, help="Procedural backgrounds beside them.")] = 150,
    steps: Annotated[int, typer.Option(min=10)] = 900,
    seeds: SeedsOption = 2,
    per_type: PerTypeOption = 12,
    stage: Annotated[list[str] | None, typer.Option(help="Stage to train on; repeat. Default: each in turn.")] = None,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Train on one process stage, judge on the two others, in all three directions (the paper's table 1)."""
    if unknown := set(stage or ()) - set(STAGES):
        raise ConfigError(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    with Bars() as progress:
        table = experiments.cross_process(
            backbone.load_efficientnet(cache),
            out / "work" / f"{n_normal}-{n_labelled}-{n_backgrounds}",
            n_normal=n_normal,
            n_labelled=n_labelled,
            n_backgrounds=n_backgrounds,
            schedule=BranchSchedule(steps=steps),
            seeds=range(seeds),
            n_test_normal=3 * per_type,
            n_test_per_type=per_type,
            stages=tuple(stage or STAGES),
            progress=progress,
        )
    finish(out, "Cross-process detection", [table], {}, SYNTHETIC, range(seeds), as_json)


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
    finish(out, "Few-shot detection", [table], {}, data, range(seeds), as_json)


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
    learnt = list(experiments.squares(normals[:n], size := 32 * vit.shape.patch))
    # Cached features are taken for those of the same images: another data set works in another folder.
    work = out / "work" / hashlib.sha256(b"".join(image.tobytes() for image in learnt)).hexdigest()[:12]

    def graph_of(form: DetectorForm) -> DetectorGraph:
        fitting = replace(form, width=vit.shape.width, heads=vit.shape.heads, input_px=size)
        return DetectorGraph(vit, NIDetector(fitting))

    with Bars() as progress:
        table = experiments.normal_tokens(
            graph_of,
            learnt,
            fields,
            work,
            tokens=m or [1, 2, 4, 6, 8],
            schedule=Schedule(epochs=epochs),
            seeds=range(seeds),
            progress=progress,
        )
    finish(out, "Normal tokens", [table], {}, data, range(seeds), as_json)


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
    test = [sample for sample in read_folder(data, require_masks=True).test if sample.label != DEFECT_FREE]
    drawn = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:limit]]
    with Embedded(repository, models=("encoder",)) as models, Bars() as progress:
        table = experiments.mask_and_crop(
            drawn, models, Recipe(), frozen_width=frozen_width(models), seeds=range(seeds), progress=progress
        )
    finish(out, "Mask and crop", [table], {}, data, range(seeds), as_json)


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
    crops, width, _ = crops_of(SYNTHETIC, repository, per_type, cache)
    of_type = {name: stage for stage in STAGES for name in DEFECT_TYPES[stage]}
    features, labels = defects_only(crops, width)
    table = experiments.k_per_stage(
        features,
        labels,
        [of_type[label] for label in labels],
        seeds=range(seeds),
        rules=get_args(estimate_k.Rule),
    )
    finish(out, "Number of classes by stage", [table], {}, SYNTHETIC, range(seeds), as_json)


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
    data_set = read_folder(data, require_masks=False)
    learnt = [datasets.load_gray(s) for s in data_set.train if s.label == DEFECT_FREE]
    if not learnt:
        raise ConfigError(f"{data_set.name} has no normal image to learn from; put some in train")
    fields = evaluate_detection.of_samples(data_set.test)
    return learnt, [field for field in fields if field.label == DEFECT_FREE or field.mask.any()]
