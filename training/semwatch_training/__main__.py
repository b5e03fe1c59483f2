"""The learning side's command line: argv -> parts -> files. No learning here."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from semwatch import micrograph, model_repository
from semwatch.config import Recipe
from semwatch.errors import ConfigError, SemwatchError
from semwatch.inference import Embedded
from semwatch_training import build_repository
from semwatch_training.data import datasets
from semwatch_training.data.backgrounds import backgrounds
from semwatch_training.detection import fit_memory, memory_detector, train_detector
from semwatch_training.detection.branch_views import synthetic_fields, synthetic_views, views
from semwatch_training.detection.ni_detector import DetectorForm, NIDetector
from semwatch_training.detection.segmentation_branch import BranchForm, Evidence
from semwatch_training.detection.train_branch import BranchSchedule, cache_samples, train_branch
from semwatch_training.detection.train_detector import Schedule
from semwatch_training.discovery import labelled_crops
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import save_head
from semwatch_training.encoding.smg_vit import EncoderForm
from semwatch_training.evaluation.evaluate_commands import evaluate_app
from semwatch_training.evaluation.experiment_commands import experiment_app
from semwatch_training.progress_bars import Bars, console
from semwatch_training.synthetic import STAGES, write_lot
from semwatch_training.trunks import backbone
from semwatch_training.trunks.vit import VisionTransformer, load_trunk

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The learning side of semwatch: synthetic images, training, and the model repository the daemon serves from.",
)

app.add_typer(evaluate_app, name="evaluate")
app.add_typer(experiment_app, name="experiment")

RepositoryOption = Annotated[Path, typer.Option(help="Model repository.")]
REPOSITORY = Path("model_repository")
MIN_NORMALS = 8
CacheOption = Annotated[Path, typer.Option(help="Where the converted backbone and frozen features are kept.")]


@app.command()
def detector(
    out: Annotated[Path, typer.Option(help="Where the weights (fp16 safetensors) go.")],
    normals: Annotated[Path | None, typer.Option(help="Folder of normal images; synthetic ones without it.")] = None,
    n_normals: Annotated[int, typer.Option(min=MIN_NORMALS, help="Synthetic normal fields.")] = 480,
    n_labelled: Annotated[int, typer.Option(min=0, help="Synthetic fields with a labelled defect.")] = 900,
    n_backgrounds: Annotated[int, typer.Option(min=0, help="Procedural backgrounds of no process.")] = 300,
    held_out: Annotated[int, typer.Option(min=20, help="Normal images kept for the gate's threshold.")] = 600,
    stage: Annotated[list[str] | None, typer.Option(help="Process stage to learn from; repeat. Default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    width: Annotated[int, typer.Option(min=8, help="Channels of the branch.")] = 64,
    seed: int = 1,
    cache: CacheOption = Path(".cache"),
) -> None:
    """Train the default detector, a segmentation branch on frozen features. Resumes where it was stopped.

    With --normals it learns from pseudo-defects planted in your images and in procedural backgrounds.
    """
    torch.manual_seed(seed)
    branch = BranchForm(width=width)
    form = DetectorForm(evidence="branch", branch=branch)
    fitted = NIDetector(form)
    convolutional = backbone.load_efficientnet(cache)
    if fitted.branch is None:
        raise ConfigError("a detector of evidence 'branch' has no branch")
    size, stages = form.input_px, tuple(stage or STAGES)
    if normals is None:
        pairs = synthetic_views(n_normals, n_backgrounds, n_labelled, seed=seed, size_px=size, stages=stages)
        fields = synthetic_fields(
            held_out, first_seed=datasets.SEED_HELD_OUT, size_px=size, stages=stages, defective=False
        )
        kept: Iterator[NDArray[np.uint8]] = (image for image, _ in fields)
    else:
        learnt, kept, held_out = _split_normals(normals, held_out, seed, size)
        n_normals, n_labelled = len(learnt), 0
        shown = chain(datasets.normal_images(learnt, size_px=size), backgrounds(n_backgrounds, seed=seed, size_px=size))
        pairs = views(shown, (), seed=seed)
    n = 2 * (n_normals + n_backgrounds) + n_labelled
    schedule = BranchSchedule(steps=steps, seed=seed)
    work = out.with_suffix(".work")
    _claim(work, f"{normals} {stages} {n_normals} normal, {n_labelled} labelled, {n_backgrounds}, {width}, {schedule}")
    with Bars() as progress:
        samples = cache_samples(Evidence(convolutional, branch), pairs, n, work, progress=progress)
        curve = train_branch(fitted.branch, samples, schedule, work, progress=progress)
        graph = train_detector.with_trunk(None, fitted, convolutional)
        scores = train_detector.raw_scores(graph, kept, held_out, progress=progress)
    provenance: dict[str, str | float | int] = {
        "normals": f"synthetic {', '.join(stages)}" if normals is None else f"{n_normals} images of a folder",
        "branch_trunk": backbone.EFFICIENTNET_WHEEL_SHA256,
        "n_normals": n_normals,
        "n_labelled": n_labelled,
        "n_backgrounds": n_backgrounds,
        "steps": steps,
        "seed": seed,
        "final_loss": curve[-1]["loss"],
        "training_seconds": round(sum(row["seconds"] for row in curve)),
        "device": "cpu",
    }
    train_detector.save(fitted, out, normal_scores=scores, provenance=provenance)
    console.print(f"detector written to {out}; held-out normal scores {min(scores):.4f} to {max(scores):.4f}")


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
    trunk: Annotated[str, typer.Option(help="Trunk by name; needs --checkpoint unless it is the default.")] = (
        backbone.TRUNK_NAME
    ),
    checkpoint: Annotated[Path | None, typer.Option(help="An official DINOv2 or DINOv3 checkpoint file.")] = None,
    cache: CacheOption = Path(".cache"),
) -> None:
    """Train the paper's NI-guided reconstruction on normal images alone. Resumes where it was stopped."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vit = _trunk(trunk, checkpoint, cache)
    form = DetectorForm(trunk=trunk, width=vit.shape.width, heads=vit.shape.heads, input_px=32 * vit.shape.patch)
    graph = train_detector.with_trunk(vit, NIDetector(form)).to(device)
    schedule = Schedule(epochs=epochs, batch=batch, pseudo_defects=pseudo_defects, seed=seed)
    if normals is None:
        images = datasets.synthetic_normals(n, first_seed=datasets.SEED_TRAIN, size_px=form.input_px)
        kept = datasets.synthetic_normals(held_out, first_seed=datasets.SEED_HELD_OUT, size_px=form.input_px)
    else:
        learnt, kept, held_out = _split_normals(normals, held_out, seed, form.input_px)
        images, n = datasets.normal_images(learnt, size_px=form.input_px), len(learnt)
    work = out.with_suffix(".work")
    _claim(work, f"{trunk} {checkpoint} {normals} {n} images, {schedule}")
    with Bars() as progress:
        features = train_detector.cache_features(graph, images, n, work / "features.npy", progress=progress)
        curve = train_detector.train(graph.detector, features, schedule, work, progress=progress)
        scores = train_detector.raw_scores(graph.eval(), kept, held_out, progress=progress)
    provenance: dict[str, str | float | int] = {
        "normals": "synthetic BEOL, DEP, DPR" if normals is None else f"{n} images of a folder",
        "backbone": backbone.WHEEL_SHA256 if checkpoint is None else model_repository.file_sha256(checkpoint),
        "n_train": n,
        "epochs": epochs,
        "batch": batch,
        "seed": seed,
        "final_reconstruction_loss": curve[-1]["reconstruction_loss"],
        "training_seconds": round(sum(row["seconds"] for row in curve)),
        "device": device,
    }
    train_detector.save(graph.detector, out, normal_scores=scores, provenance=provenance)
    console.print(f"detector written to {out}; held-out normal scores {min(scores):.4f} to {max(scores):.4f}")


@app.command()
def head(
    out: Annotated[Path, typer.Option(help="Where the head (safetensors) goes.")],
    repository: RepositoryOption = REPOSITORY,
    n_images: Annotated[int, typer.Option(min=60, help="Synthetic images to search for labelled crops.")] = 720,
    seed: int = 0,
) -> None:
    """Fit the default head: search synthetic images with the repository's detector, label, encode, fit, calibrate."""
    cache = out.with_suffix(".crops.npz")
    with Embedded(repository, models=("detector", "encoder")) as models, Bars() as progress:
        if cache.exists():
            crops = labelled_crops.load(cache)
        else:
            crops = labelled_crops.collect(
                models, Recipe(), n_images=n_images, first_seed=datasets.SEED_HEAD, progress=progress
            )
            labelled_crops.save(crops, cache)
        frozen_width = int(models.meta("encoder").provenance["frozen_width"])
    fit = HeadFit(frozen_width=frozen_width, seed=seed)
    report = labelled_crops.hold_out_report(crops, fit)
    for label in sorted(crops.n_planted):
        console.print(f"  {label:14} planted {crops.n_planted[label]:4}  found {crops.n_found.get(label, 0):4}")
    console.print(report)
    provenance: dict[str, str | float | int] = {"crops": "synthetic", "n_images": n_images, "seed": seed, **report}
    fitted = fit_head(crops.features, crops.labels, fit, images=crops.image_idx.tolist())
    save_head(fitted, out, encoder_form=build_repository.form_text(EncoderForm()), provenance=provenance)
    console.print(f"head of {len(fitted.labels)} classes written to {out}")


@app.command()
def build(
    repository: RepositoryOption = REPOSITORY,
    weights: Annotated[Path, typer.Option(help="Folder with detector.safetensors and head.safetensors.")] = (
        build_repository.SHIPPED
    ),
    memory: Annotated[Path | None, typer.Option(help="Serve this memory in place of the detector.")] = None,
    without_head: Annotated[bool, typer.Option(help="Only detector and encoder, to fit a head with.")] = False,
    cache: CacheOption = Path(".cache"),
) -> None:
    """Build the model repository: fetch the backbone, export the weights, check, publish; skip what is there."""
    for line in build_repository.build(
        repository, weights=weights, cache=cache, with_head=not without_head, memory=memory
    ):
        console.print(line, highlight=False)


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Folder for the lot; created.")],
    n: Annotated[int, typer.Option(min=1)] = 24,
    seed: int = 7,
    size: Annotated[int, typer.Option(min=64, max=8192, help="Pixels a side.")] = 1024,
    stage: Annotated[list[str] | None, typer.Option(help="BEOL, DEP or DPR; all three without it.")] = None,
    layout_svg: Annotated[Path | None, typer.Option(help="Draw BEOL from a real layout.")] = None,
) -> None:
    """Write a synthetic lot: micrographs, masks, labels.csv and a KLARF-like manifest."""
    with Bars() as progress:
        write_lot(
            out,
            n=n,
            seed=seed,
            stages=tuple(stage or STAGES),
            size_hw=(size, size),
            layout_svg=layout_svg,
            on_image=lambda index, _: progress("images", index + 1, n),
        )
    console.print(f"{n} images in {out}")


@app.command()
def memory(
    out: Annotated[Path, typer.Option(help="Where the memory (safetensors) goes.")],
    normals: Annotated[Path, typer.Option(help="Folder of normal images of your process; a hundred or more.")],
    seed: int = 1,
    cache: CacheOption = Path(".cache"),
) -> None:
    """Remember normal images: a detector that needs no training, for surfaces that the default one never saw.

    Serve it with `semwatch-train build --memory FILE`.
    """
    images = [micrograph.read(path)[0].field for path in datasets.folder_images(normals)]
    trunks = memory_detector.Trunks(backbone.load(cache), backbone.load_efficientnet(cache))
    with Bars() as progress:
        made = fit_memory.fit(images, trunks, seed=seed, progress=progress)
    memory_detector.save(out, made, provenance={"normals": f"{len(images)} images of a folder"})
    console.print(f"memory of {len(images)} images written to {out}")


def _split_normals(
    folder: Path, held_out: int, seed: int, size_px: int
) -> tuple[list[Path], Iterator[NDArray[np.uint8]], int]:
    """Paths to learn from, images (S, S) kept for the gate, and how many those are: at most a quarter."""
    paths = datasets.folder_images(folder)
    if len(paths) < MIN_NORMALS:
        raise ConfigError(f"{folder} holds {len(paths)} images; a detector needs {MIN_NORMALS} normal ones or more")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(held_out, len(paths) // 4)
    kept = datasets.normal_images([paths[i] for i in order[:held_out]], size_px=size_px)
    return [paths[i] for i in order[held_out:]], kept, held_out


def _trunk(name: str, checkpoint: Path | None, cache: Path) -> VisionTransformer:
    if checkpoint is not None:
        return load_trunk(name, checkpoint)
    if name != backbone.TRUNK_NAME:
        raise typer.BadParameter(f"{name} does not install from a package; name its file with --checkpoint")
    return backbone.load(cache)


def _claim(work: Path, run: str) -> None:
    """Keep a run's features and checkpoint from being taken for those of another."""
    note = work / "run.txt"
    if note.exists() and note.read_text() != run:
        raise ConfigError(f"{work} holds another run ({note.read_text()}); remove it or give another --out")
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(run)


def main() -> None:
    """Run a command; an expected error is one plain line and exit code 1."""
    try:
        app()
    except SemwatchError as error:
        console.print(f"[red]{type(error).__name__}[/]: {error}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
