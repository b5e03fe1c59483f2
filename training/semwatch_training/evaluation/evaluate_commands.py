"""The commands ``semwatch-train evaluate``: arguments -> ``evaluate`` -> report."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from semwatch.errors import ConfigError
from semwatch.settings.recipe import Gate, Recipe, load_recipe
from semwatch_training.evaluation.options import (
    CACHE,
    REPOSITORY,
    CacheOption,
    DataArgument,
    JsonOption,
    OutOption,
    PerTypeOption,
    RateOption,
    RepositoryOption,
    SeedsOption,
    Unknown,
    WeightsOption,
)
from semwatch_training.system.defaults import SHIPPED
from semwatch_training.system.progress_bars import Bars

GATE = Gate()

evaluate_app = typer.Typer(
    no_args_is_help=True,
    help="Judge detectors, heads and discovery on labelled images; every table has its baselines in the same run.",
)


@evaluate_app.command()
def detection(
    data: DataArgument,
    out: OutOption = Path("report-detection"),
    weights: WeightsOption = SHIPPED,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 12,
    false_alarm_rate: RateOption = 0.01,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Detection: image and pixel AUROC, AUPRO, F1-max, false alarms of the gate; beside the training-free engines."""
    from semwatch_training.evaluation import evaluate
    from semwatch_training.evaluation.evaluation_data import finish

    with Bars() as progress:
        result = evaluate.detection(
            data,
            weights=weights,
            seeds=range(seeds),
            per_type=per_type,
            false_alarm_rate=false_alarm_rate,
            cache=cache,
            progress=progress,
        )
    finish(out, "Detection", result, data, range(seeds), as_json=as_json)


@evaluate_app.command()
def classification(
    data: DataArgument,
    out: OutOption = Path("report-classification"),
    repository: RepositoryOption = REPOSITORY,
    searched: Annotated[
        bool,
        typer.Option(
            "--searched/--true-masks",
            help="Judge what the repository's detector finds, false regions and missed defects included; or crops cut "
            "along true masks, where nothing is missed.",
        ),
    ] = True,
    head: Annotated[
        Literal["fitted", "service"],
        typer.Option(
            help="fitted: heads fitted on the images themselves, cross-validated. service: the head that serves, "
            "beside the shipped one; the images need no masks."
        ),
    ] = "fitted",
    recipe: Annotated[Path | None, typer.Option(help="Recipe whose gate and rule judge, with --head service.")] = None,
    false_alarm_rate: RateOption = GATE.false_alarm_rate,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 40,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Classification as fabs judge it: accuracy, purity, contribution, escapes; cross-validated over images.

    With --head service nothing is fitted: the head in service is judged on your labelled images, as it serves.
    """
    from semwatch_training.evaluation import evaluate, evaluate_service
    from semwatch_training.evaluation.evaluation_data import Source, finish

    if head == "service":
        folder, settings = evaluate_service.refuse_synthetic(data), load_recipe(recipe) if recipe else Recipe()
        with Bars() as progress:
            result = evaluate_service.service(folder, repository=repository, recipe=settings, progress=progress)
        finish(out, "Head in service", result, data, (), as_json=as_json)
        return
    with Bars() as progress:
        result = evaluate.classification(
            Source(data, repository, per_type, cache),
            seeds=range(seeds),
            searched=searched,
            false_alarm_rate=false_alarm_rate,
            progress=progress,
        )
    finish(out, "Classification", result, data, range(seeds), as_json=as_json)


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
    from semwatch_training.evaluation import evaluate
    from semwatch_training.evaluation.evaluation_data import Source, finish

    with Bars() as progress:
        result = evaluate.unknown(Source(data, repository, per_type, cache), seeds=range(seeds), progress=progress)
    finish(out, "Unknown rule", result, data, range(seeds), as_json=as_json)


@evaluate_app.command()
def discovery(
    data: DataArgument,
    out: OutOption = Path("report-discovery"),
    unknown: Annotated[
        Unknown, typer.Option(help="What is unknown in turn: one defect type, or a whole process stage.")
    ] = "type",
    base: Annotated[
        str | None,
        typer.Option(
            help="Labelled base of other material (a folder or 'synthetic'): our own score maps find the defects."
        ),
    ] = None,
    repository: RepositoryOption = REPOSITORY,
    false_alarm_rate: RateOption = GATE.false_alarm_rate,
    seeds: SeedsOption = 3,
    per_type: PerTypeOption = 40,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Discovery against k-means, GCD and SimGCD on the same features.

    Without --base each class, or each process stage, is unknown in turn, cut along true masks. With --base the
    repository's detector searches the test images, all of whose classes are to be discovered.
    """
    from semwatch_training.evaluation import evaluate
    from semwatch_training.evaluation.evaluation_data import Source, finish

    source = Source(data, repository, per_type, cache)
    if base is not None and unknown != "type":
        raise ConfigError("with --base all classes of the images are unknown: leave out --unknown")
    with Bars() as progress:
        if base is None:
            result = evaluate.discovery(source, seeds=range(seeds), leave_out=unknown, progress=progress)
        else:
            result = evaluate.discovery_of_images(
                source, base, seeds=range(seeds), false_alarm_rate=false_alarm_rate, progress=progress
            )
    finish(out, "Discovery", result, data, range(seeds), as_json=as_json)


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
    from semwatch_training.evaluation import evaluate
    from semwatch_training.evaluation.evaluation_data import Source, finish

    with Bars() as progress:
        result = evaluate.k(
            Source(data, repository, per_type, cache), n_problems=problems, seed=seed, progress=progress
        )
    finish(out, "Number of classes", result, data, (seed,), as_json=as_json)


@evaluate_app.command()
def longtail(
    data: Annotated[
        list[str],
        typer.Argument(help="Labelled images, joined: folders (docs/training.md), or 'synthetic'."),
    ],
    out: OutOption = Path("report-longtail"),
    repository: RepositoryOption = REPOSITORY,
    tail: Annotated[
        list[str] | None, typer.Option(help='10:1, 50:1, 100:1 or "Carinthia\'s shape"; repeat. Default: all.')
    ] = None,
    per_type: PerTypeOption = 40,
    most: Annotated[int, typer.Option(min=8, help="Images of a class of a folder; of more, so many are drawn.")] = 150,
    seeds: SeedsOption = 3,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Long tails: ReCAME-Net whole and without each part, beside cross entropy, balanced softmax and others."""
    from semwatch_training.evaluation import evaluate_longtail
    from semwatch_training.evaluation.evaluation_data import Source, finish

    sources = [Source(one, repository, per_type, cache) for one in data]
    with Bars() as progress:
        result = evaluate_longtail.of_sources(sources, most=most, tails=tail, seeds=range(seeds), progress=progress)
    finish(out, "Long tails", result, " and ".join(Path(one).name for one in data), range(seeds), as_json=as_json)


@evaluate_app.command()
def real(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of real SEM; its layout stands in docs/training.md. What is absent is skipped."),
    ],
    out: OutOption = Path("report-real"),
    repository: RepositoryOption = REPOSITORY,
    before: Annotated[
        Path | None,
        typer.Option(
            help="A detector of another time to stand beside: its detector.safetensors (`git show COMMIT:training/"
            "semwatch_training/weights/detector.safetensors > before.safetensors`), or a model repository of that time."
        ),
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(help="detector.safetensors whose parts are judged alone too: branch, Gaussian, like places."),
    ] = None,
    held: Annotated[
        Path | None, typer.Option(help="Another folder of the same layout: labels learnt here are judged there.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Run the training-free detectors beside the served one.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one network; all there are.")] = None,
    seeds: SeedsOption = 3,
    cache: CacheOption = CACHE,
    as_json: JsonOption = False,
) -> None:
    """Real SEM that nobody trained on: detection, gates, escapes, labels, discovery and time of the served models."""
    from semwatch_training.evaluation import evaluate_real
    from semwatch_training.evaluation.evaluation_data import finish

    with Bars() as progress:
        result = evaluate_real.real(
            folder,
            repository=repository,
            seeds=range(seeds),
            before=before,
            parts=parts,
            held=held,
            baselines=baselines,
            threads=threads,
            cache=cache,
            progress=progress,
        )
    finish(out, "Real SEM", result, str(folder), range(seeds), as_json=as_json)
