"""The learning side's command line: argv -> parts -> files. No learning here."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from semwatch.errors import SemwatchError
from semwatch.system import command_line
from semwatch.system.command_line import EPILOG, HELP_NAMES, JsonOption, VersionOption
from semwatch_training.adapt import adapt_commands
from semwatch_training.engines import commands
from semwatch_training.evaluation.evaluate_commands import evaluate_app
from semwatch_training.evaluation.experiment_commands import experiment_app
from semwatch_training.families.branch_images import BranchImages
from semwatch_training.learning import learning_commands
from semwatch_training.synthetic import STAGES, write_lot
from semwatch_training.system.defaults import (
    BRANCH_STEPS,
    BRANCH_WIDTH,
    CROP_IMAGES,
    HEAD_IMAGES,
    MIN_NORMALS,
    SHIPPED,
    HeadFamily,
)
from semwatch_training.system.progress_bars import Bars, console

if TYPE_CHECKING:
    from semwatch_training.trunks.vit import VisionTransformer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=f"{EPILOG} {learning_commands.REFUSED} a new head was refused, and the one before serves on (`retrain`).",
    context_settings=HELP_NAMES,
)


@app.callback()
def main_options(_: VersionOption = False) -> None:
    """The learning side of semwatch: synthetic images, training, and the model repository the daemon serves from."""


app.add_typer(evaluate_app, name="evaluate")
app.add_typer(experiment_app, name="experiment")
app.command("export")(commands.export)
app.command("retrain")(learning_commands.retrain)
app.command("refit")(learning_commands.refit)
app.command("adapt")(adapt_commands.adapt)

RepositoryOption = Annotated[Path, typer.Option(help="Model repository.")]
REPOSITORY = Path("model_repository")
IMAGES = BranchImages()
CacheOption = Annotated[Path, typer.Option(help="Where the converted backbone and frozen features are kept.")]


@app.command()
def detector(
    out: Annotated[Path, typer.Option(help="Where the weights (fp16 safetensors) go.")],
    normals: Annotated[Path | None, typer.Option(help="Folder of normal images; synthetic ones without it.")] = None,
    n_normals: Annotated[int, typer.Option(min=MIN_NORMALS, help="Synthetic normal fields.")] = IMAGES.n_normals,
    n_labelled: Annotated[int, typer.Option(min=0, help="Synthetic fields with a labelled defect.")] = (
        IMAGES.n_labelled
    ),
    n_backgrounds: Annotated[int, typer.Option(min=0, help="Procedural backgrounds of no process.")] = (
        IMAGES.n_backgrounds
    ),
    n_scenes: Annotated[
        int, typer.Option(min=0, help="Scenes of no process, normal and defective; none with --normals.")
    ] = IMAGES.n_scenes,
    held_out: Annotated[int, typer.Option(min=20, help="Normal images kept for the gate's threshold.")] = (
        IMAGES.held_out
    ),
    stage: Annotated[list[str] | None, typer.Option(help="Process stage to learn from; repeat. Default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = BRANCH_STEPS,
    width: Annotated[int, typer.Option(min=8, help="Channels of the branch.")] = BRANCH_WIDTH,
    start: Annotated[
        Path | None, typer.Option(help="Weights of a trained detector to begin with; else it begins at random.")
    ] = None,
    seed: int = 1,
    cache: CacheOption = Path(".cache"),
    as_json: JsonOption = False,
) -> None:
    """Train the default detector, the branch that reads an image's own statistics. Resumes where it was stopped.

    With --normals it learns from pseudo-defects planted in your images and in procedural backgrounds.
    """
    from semwatch_training.families import detector_run
    from semwatch_training.families.branch.segmentation_branch import BranchForm
    from semwatch_training.families.branch.train_branch import BranchSchedule
    from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicForm

    form = IntrinsicForm(branch=BranchForm(width=width))
    images = BranchImages(normals, n_normals, n_labelled, n_backgrounds, n_scenes, held_out, tuple(stage or STAGES))
    schedule = BranchSchedule(steps=steps, seed=seed)
    with Bars() as progress:
        scores = detector_run.train_default(out, form, images, schedule, cache=cache, progress=progress, start=start)
    console.print(f"detector written to {out}; held-out normal scores {min(scores):.4f} to {max(scores):.4f}")
    _answer(as_json, out=str(out), normal_scores=[min(scores), max(scores)])


@app.command("ni-detector")
def ni_detector(
    out: Annotated[Path, typer.Option(help="Where the weights (fp16 safetensors) go.")],
    normals: Annotated[Path | None, typer.Option(help="Folder of normal images; synthetic ones without it.")] = None,
    n: Annotated[int, typer.Option(min=MIN_NORMALS, help="Synthetic normal images to train on.")] = 480,
    held_out: Annotated[int, typer.Option(min=20, help="Normal images kept for the gate's threshold.")] = 150,
    epochs: Annotated[int, typer.Option(min=1)] = 16,
    batch: Annotated[int, typer.Option(min=1)] = 8,
    pseudo_defects: Annotated[bool, typer.Option(help="The paper's pseudo-defects on features.")] = False,
    seed: int = 1,
    trunk: Annotated[
        str | None, typer.Option(help="Trunk by name, with its --checkpoint; the shipped one without it.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="An official DINOv2 or DINOv3 checkpoint file.")] = None,
    cache: CacheOption = Path(".cache"),
    as_json: JsonOption = False,
) -> None:
    """Train the paper's NI-guided reconstruction on normal images alone. Resumes where it was stopped."""
    from semwatch_training.families import detector_run
    from semwatch_training.families.ni.train_detector import Schedule
    from semwatch_training.trunks import backbone

    schedule = Schedule(epochs=epochs, batch=batch, pseudo_defects=pseudo_defects, seed=seed)
    trunk = trunk or backbone.TRUNK_NAME
    vit = _trunk(trunk, checkpoint, cache)
    with Bars() as progress:
        scores = detector_run.train_reconstruction(
            out, vit, trunk, checkpoint, schedule, normals=normals, n=n, held_out=held_out, progress=progress
        )
    console.print(f"detector written to {out}; held-out normal scores {min(scores):.4f} to {max(scores):.4f}")
    _answer(as_json, out=str(out), normal_scores=[min(scores), max(scores)])


@app.command()
def encoder(
    out: Annotated[Path, typer.Option(help="Where the trained layers (fp16 safetensors) go.")],
    repository: RepositoryOption = REPOSITORY,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to search, such as the daemon's archive; else synthetic ones.")
    ] = None,
    crops: Annotated[Path | None, typer.Option(help="Crops that an earlier run kept (crops-*.npz).")] = None,
    n_images: Annotated[int, typer.Option(min=1, help="Images to search.")] = CROP_IMAGES,
    n_views: Annotated[int, typer.Option(min=2, help="Views of each crop, 0.2 MB each on disk.")] = 2,
    epochs: Annotated[int, typer.Option(min=1)] = 20,
    batch: Annotated[int, typer.Option(min=2)] = 32,
    seed: int = 1,
    cache: CacheOption = Path(".cache"),
    as_json: JsonOption = False,
) -> None:
    """Teach the encoder's last layers on crops without labels (self-distillation). Resumes where it was stopped.

    The repository's detector finds the crops. `build --weights` takes the file from beside detector and head; a head
    must then be fitted on the new encoder.
    """
    from semwatch_training.families.smg_vit import self_supervision
    from semwatch_training.families.smg_vit.encoder_run import CropSource, train_encoder
    from semwatch_training.families.smg_vit.export import default_form

    schedule = self_supervision.Schedule(epochs=epochs, batch=batch, seed=seed)
    source = CropSource(crops, images, n_images)
    with Bars() as progress:
        last = train_encoder(
            out, default_form(), source, schedule,
            repository=repository, cache=cache, n_views=n_views, progress=progress,
        )  # fmt: skip
    console.print(f"encoder written to {out}; loss {last['loss']:.4f}, spread of features {last['feature_std']:.3f}")
    _answer(as_json, out=str(out), loss=last["loss"], feature_std=last["feature_std"])


@app.command()
def head(
    out: Annotated[Path, typer.Option(help="Where the head (safetensors) goes.")],
    repository: RepositoryOption = REPOSITORY,
    n_images: Annotated[int, typer.Option(min=60, help="Synthetic images to search for labelled crops.")] = HEAD_IMAGES,
    family: Annotated[
        HeadFamily, typer.Option(help="Of the logits: linear, or recame for classes of a long tail.")
    ] = "linear",
    seed: int = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit the default head: search synthetic images with the repository's detector, label, encode, fit, calibrate."""
    from semwatch_training.discovery import head_run
    from semwatch_training.publishing import build_repository, head_families

    served = build_repository.served_form(repository)
    with Bars() as progress:
        fitted, crops, report = head_run.fit_default(
            repository, out, encoder_form=served, n_images=n_images, seed=seed, progress=progress,
            classify_of=lambda encoder: head_families.classify(family, encoder, seed=seed),
        )  # fmt: skip
    for label in sorted(crops.n_planted):
        console.print(f"  {label:14} planted {crops.n_planted[label]:4}  found {crops.n_found.get(label, 0):4}")
    console.print(report)
    console.print(f"head of {len(fitted.labels)} classes written to {out}")
    _answer(as_json, out=str(out), classes=list(fitted.labels), planted=crops.n_planted, found=crops.n_found)


@app.command()
def build(
    repository: RepositoryOption = REPOSITORY,
    weights: Annotated[
        Path, typer.Option(help="Folder with detector.safetensors, head.safetensors, perhaps encoder.safetensors.")
    ] = SHIPPED,
    memory: Annotated[Path | None, typer.Option(help="Serve this memory in place of the detector.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Family of the encoder: smg_vit, or recame, which keeps regions for its head.")
    ] = None,
    without_head: Annotated[bool, typer.Option(help="Only detector and encoder, to fit a head with.")] = False,
    cache: CacheOption = Path(".cache"),
    as_json: JsonOption = False,
) -> None:
    """Build the model repository: fetch the backbone, export the weights, check, publish; skip what is there."""
    from semwatch_training.publishing import build_repository

    lines = []
    for line in build_repository.build(
        repository, weights=weights, cache=cache, with_head=not without_head, memory=memory, encoder=encoder
    ):
        console.print(line, highlight=False)
        lines.append(line)
    _answer(as_json, repository=str(repository), steps=lines)


@app.command()
def ship(
    out: Annotated[Path, typer.Option(help="Folder of weights, repository and reports; a stopped run goes on there.")],
    scale: Annotated[float, typer.Option(min=0.001, max=100, help="1 makes weights to ship, 0.01 tries it out.")] = 1.0,
    self_supervise: Annotated[bool, typer.Option(help="Train the encoder's last layers too.")] = False,
    seed: int = 1,
    cache: CacheOption = Path(".cache"),
    as_json: JsonOption = False,
) -> None:
    """Run everything: train, build, and judge detection, discovery, unknown rule and k on synthetic images.

    Parts that are whole are left alone. Uses the GPU to train where there is one.
    """
    from semwatch_training.evaluation import whole_run

    plan = whole_run.plan(scale, seed=seed, self_supervise=self_supervise)
    parts = []
    for part in whole_run.ship(out, plan, cache=cache):
        done = "" if part.is_new else ", as it was"
        console.print(f"{part.name:16} {part.seconds:8.1f} s  {part.summary}{done}", highlight=False)
        parts.append({"part": part.name, "seconds": part.seconds, "summary": part.summary, "is_new": part.is_new})
    _answer(as_json, out=str(out), parts=parts)


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Folder for the lot; created.")],
    n: Annotated[int, typer.Option(min=1)] = 24,
    seed: int = 7,
    size: Annotated[int, typer.Option(min=64, max=8192, help="Pixels a side.")] = 1024,
    stage: Annotated[list[str] | None, typer.Option(help="BEOL, DEP or DPR; all three without it.")] = None,
    defect: Annotated[list[str] | None, typer.Option(help="Defect types to plant; all without it.")] = None,
    defect_free: Annotated[float, typer.Option(min=0, max=1, help="Share of images without a defect.")] = 0.3,
    layout_svg: Annotated[Path | None, typer.Option(help="Draw BEOL from a real layout.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic lot: micrographs, masks, labels.csv and a KLARF-like manifest."""
    with Bars() as progress:
        write_lot(
            out,
            n=n,
            seed=seed,
            stages=tuple(stage or STAGES),
            defect_types=defect,
            defect_free_share=defect_free,
            size_hw=(size, size),
            layout_svg=layout_svg,
            on_image=lambda index, _: progress("images", index + 1, n),
        )
    console.print(f"{n} images in {out}")
    _answer(as_json, out=str(out), images=n)


@app.command()
def memory(
    out: Annotated[Path, typer.Option(help="Where the memory (safetensors) goes.")],
    normals: Annotated[Path, typer.Option(help="Folder of normal images of your process; a hundred or more.")],
    seed: int = 1,
    cache: CacheOption = Path(".cache"),
    as_json: JsonOption = False,
) -> None:
    """Remember normal images: a detector that needs no training, for surfaces that the default one never saw.

    Serve it with `semwatch-train build --memory FILE`.
    """
    from semwatch.intake import decoding
    from semwatch_training.data import data_folders
    from semwatch_training.families.memory import fit_memory, memory_detector
    from semwatch_training.trunks import backbone

    images = [decoding.read(path)[0].field for path in data_folders.read_normals(normals)]
    trunks = memory_detector.Trunks(backbone.load(cache), backbone.load_efficientnet(cache))
    with Bars() as progress:
        made = fit_memory.fit(images, trunks, seed=seed, progress=progress)
    memory_detector.save(out, made, provenance={"normals": f"{len(images)} images of a folder"})
    console.print(f"memory of {len(images)} images written to {out}")
    _answer(as_json, out=str(out), images=len(images))


def _answer(as_json: bool, **values: object) -> None:
    """What a command has made, on standard output; words for people go to standard error."""
    if as_json:
        typer.echo(json.dumps(values))


def _trunk(name: str, checkpoint: Path | None, cache: Path) -> "VisionTransformer":
    from semwatch_training.trunks import backbone
    from semwatch_training.trunks.vit import load_trunk

    if checkpoint is not None:
        return load_trunk(name, checkpoint)
    if name != backbone.TRUNK_NAME:
        raise typer.BadParameter(f"{name} does not install from a package; name its file with --checkpoint")
    return backbone.load(cache)


def main() -> None:
    """Run a command; an expected error is one plain line and its exit code, the same as the daemon's."""
    command_line.run(app, "semwatch-train", _show)


def _show(error: SemwatchError) -> None:
    console.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
