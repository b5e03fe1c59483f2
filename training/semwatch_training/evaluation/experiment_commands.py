"""The commands ``semwatch-train experiment``: the paper's experiments, arguments -> table -> report."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.settings.recipe import Recipe
from semwatch_training.evaluation.options import (
    CACHE,
    REPOSITORY,
    CacheOption,
    DataArgument,
    JsonOption,
    OutOption,
    PerTypeOption,
    RepositoryOption,
    SeedsOption,
    WeightsOption,
)
from semwatch_training.synthetic import DEFECT_TYPES, STAGES
from semwatch_training.system.defaults import SHIPPED
from semwatch_training.system.progress_bars import Bars

if TYPE_CHECKING:
    from semwatch_training.evaluation.detection_experiments import Image
    from semwatch_training.evaluation.evaluate_detection import Field

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
    from semwatch_training.evaluation import detection_experiments
    from semwatch_training.evaluation.evaluation_data import SYNTHETIC, finish
    from semwatch_training.families.branch.train_branch import BranchSchedule
    from semwatch_training.trunks import backbone

    if unknown := set(stage or ()) - set(STAGES):
        raise ConfigError(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    with Bars() as progress:
        table = detection_experiments.cross_process(
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
    finish(out, "Cross-process detection", ([table], {}), SYNTHETIC, range(seeds), as_json=as_json)


@experiment_app.command("k-shot")
def k_shot(
    data: DataArgument,
    out: OutOption = Path("report-k-shot"),
    weights: WeightsOption = SHIPPED,
    shots: Annotated[list[int] | None, typer.Option(help="Normal images shown; repeat. Default: 1 and 4.")] = None,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 4,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Few-shot detection: no, 1 and 4 normal images shown, alone and augmented (the paper's table 3).

    The rows without a normal image are support-set-free inference: the shipped detector and self-matching.
    """
    from semwatch_training.evaluation import detection_experiments, detectors
    from semwatch_training.evaluation.evaluation_data import finish

    trunks = detectors.trunks(cache)
    free = detectors.support_set_free(trunks, weights, false_alarm_rate=0.01)
    groups = _normals_and_fields(data, per_type)
    with Bars() as progress:
        table = detection_experiments.k_shot(
            trunks,
            groups,
            shots=shots or [1, 4],
            seeds=range(seeds),
            support_set_free=free,
            progress=progress,
        )
    finish(out, "Few-shot detection", ([table], {}), data, range(seeds), as_json=as_json)


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
    """Direct matching against reconstruction (the paper's table 4), over the number of normal tokens (figure 10)."""
    from semwatch_training.evaluation import detection_experiments
    from semwatch_training.evaluation.evaluation_data import finish
    from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
    from semwatch_training.families.ni.train_detector import Schedule
    from semwatch_training.trunks import backbone

    vit = backbone.load(cache)
    groups = _normals_and_fields(data, per_type).values()
    normals = [image for turn in zip_longest(*(images for images, _ in groups)) for image in turn if image is not None]
    fields = [field for _, judged in groups for field in judged]
    learnt = list(detection_experiments.squares(normals[:n], size := 32 * vit.shape.patch))
    # Cached features are taken for those of the same images: another data set works in another folder.
    work = out / "work" / hashlib.sha256(b"".join(image.tobytes() for image in learnt)).hexdigest()[:12]

    def graph_of(form: DetectorForm) -> DetectorGraph:
        fitting = replace(form, width=vit.shape.width, heads=vit.shape.heads, input_px=size)
        return DetectorGraph(vit, NIDetector(fitting))

    with Bars() as progress:
        table = detection_experiments.normal_tokens(
            graph_of,
            learnt,
            fields,
            work,
            tokens=m or [1, 2, 4, 6, 8],
            schedule=Schedule(epochs=epochs),
            seeds=range(seeds),
            progress=progress,
        )
    finish(out, "Normal tokens", ([table], {}), data, range(seeds), as_json=as_json)


@experiment_app.command("binarization")
def binarization(
    data: DataArgument,
    out: OutOption = Path("report-binarization"),
    repository: RepositoryOption = REPOSITORY,
    per_type: PerTypeOption = 12,
    as_json: JsonOption = False,
) -> None:
    """Masks from score maps: 0.5, Otsu, the paper's rule and ours; IoU with the truth and error of the count."""
    from semwatch.models.inference import Embedded
    from semwatch_training.evaluation import crop_experiments
    from semwatch_training.evaluation.evaluation_data import finish

    fields, n = _defective_fields(data, per_type)
    with Embedded(repository, models=("detector",)) as models, Bars() as progress:
        table = crop_experiments.binarization(models, fields, n, progress=progress)
    finish(out, "Binarisation", ([table], {}), data, (), as_json=as_json)


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
    import numpy as np

    from semwatch.models.inference import Embedded
    from semwatch_training.evaluation import crop_experiments
    from semwatch_training.evaluation.evaluation_data import finish, frozen_width, read_folder

    test = [sample for sample in read_folder(data, require_masks=True).test if sample.label != DEFECT_FREE]
    drawn = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:limit]]
    with Embedded(repository, models=("detector", "encoder")) as models, Bars() as progress:
        table = crop_experiments.mask_and_crop(
            drawn, models, Recipe(), frozen_width=frozen_width(models), seeds=range(seeds), progress=progress
        )
    finish(out, "Mask and crop", ([table], {}), data, range(seeds), as_json=as_json)


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
    from semwatch_training.discovery import estimate_k
    from semwatch_training.evaluation import crop_experiments
    from semwatch_training.evaluation.evaluation_data import SYNTHETIC, Source, by_stage, crops_of, defects_only, finish

    with Bars() as progress:
        crops, width, _ = crops_of(Source(SYNTHETIC, repository, per_type, cache), progress=progress)
    features, labels = defects_only(crops, width)
    of_type = {name: stage for stage, names in by_stage(labels).items() for name in names}
    table = crop_experiments.k_per_stage(
        features,
        labels,
        [of_type[label] for label in labels],
        seeds=range(seeds),
        rules=get_args(estimate_k.Rule),
    )
    finish(out, "Number of classes by stage", ([table], {}), SYNTHETIC, range(seeds), as_json=as_json)


def _defective_fields(data: str, per_type: int) -> "tuple[dict[str, Iterable[Field]], int]":
    """Fields with a defect, by process stage or of the data set's test part, and how many they are."""
    from semwatch_training.data import datasets
    from semwatch_training.evaluation.evaluate_detection import of_samples, synthetic
    from semwatch_training.evaluation.evaluation_data import SYNTHETIC, read_folder

    if data == SYNTHETIC:
        made: dict[str, Iterable[Field]] = {
            stage: synthetic(stage, n_normal=0, n_per_type=per_type, first_seed=datasets.SEED_EVALUATE)
            for stage in STAGES
        }
        return made, per_type * sum(map(len, DEFECT_TYPES.values()))
    data_set = read_folder(data, require_masks=True)
    defects = [sample for sample in data_set.test if sample.label != DEFECT_FREE]
    return {data_set.name: of_samples(defects)}, len({sample.image for sample in defects})


def _normals_and_fields(data: str, per_type: int) -> "dict[str, tuple[list[Image], list[Field]]]":
    """Normal images to learn from, and fields to judge, by process stage or of a folder's train and test parts."""
    from semwatch_training.data import datasets
    from semwatch_training.evaluation.evaluate_detection import of_samples, synthetic
    from semwatch_training.evaluation.evaluation_data import SYNTHETIC, read_folder

    if data == SYNTHETIC:
        return {
            stage: (
                [f.image for f in synthetic(stage, n_normal=40, n_per_type=0, first_seed=datasets.SEED_TRAIN)],
                list(synthetic(stage, n_normal=2 * per_type, n_per_type=per_type, first_seed=datasets.SEED_EVALUATE)),
            )
            for stage in STAGES
        }
    data_set = read_folder(data, require_masks=False)
    learnt = [datasets.load_gray(s) for s in data_set.train if s.label == DEFECT_FREE]
    if not learnt:
        raise ConfigError(f"{data_set.name} has no normal image to learn from; put some in train")
    fields = of_samples(data_set.test)
    return {data_set.name: (learnt, [field for field in fields if field.label == DEFECT_FREE or field.mask.any()])}
