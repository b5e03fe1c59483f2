"""The learning side's command line: argv -> parts -> files. No learning here."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from semwatch import model_repository
from semwatch.config import Recipe
from semwatch.errors import ConfigError, SemwatchError
from semwatch.inference import Embedded
from semwatch_training import backbone, build_repository, datasets, labelled_crops, train_detector
from semwatch_training.head import HeadFit, fit_head, save_head
from semwatch_training.ni_detector import DetectorForm, NIDetector
from semwatch_training.smg_vit import EncoderForm
from semwatch_training.synthetic import STAGES, write_lot
from semwatch_training.train_detector import Schedule
from semwatch_training.vit import VisionTransformer, load_trunk

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The learning side of semwatch: synthetic images, training, and the model repository the daemon serves from.",
)
console = Console(stderr=True)

RepositoryOption = Annotated[Path, typer.Option(help="Model repository.")]
REPOSITORY = Path("model_repository")
MIN_NORMALS = 8
CacheOption = Annotated[Path, typer.Option(help="Where the converted backbone and frozen features are kept.")]


class Bars:
    """Progress bars, one per thing that is being done; each shows a count and the time left."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("", total=None, visible=False)
        self._kind = ""

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done."""
        kind = what.split(" ", maxsplit=1)[0]
        if kind != self._kind:
            self._kind, self._task = kind, self._progress.add_task(what, total=total)
        self._progress.update(self._task, description=what, completed=done, total=total)


@app.command()
def detector(
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
    """Train a detector on normal images. Resumes where it was stopped."""
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
        paths = datasets.folder_images(normals)
        if len(paths) < MIN_NORMALS:
            raise ConfigError(
                f"{normals} holds {len(paths)} images; a detector needs {MIN_NORMALS} normal ones or more"
            )
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = min(held_out, len(paths) // 4)
        images = datasets.normal_images([paths[i] for i in order[held_out:]], size_px=form.input_px)
        kept = datasets.normal_images([paths[i] for i in order[:held_out]], size_px=form.input_px)
        n = len(paths) - held_out
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
        frozen_width = models.meta("encoder").outputs["features"].shape[0] - 384
    fit = HeadFit(frozen_width=frozen_width, seed=seed)
    report = labelled_crops.hold_out_report(crops, fit)
    for label in sorted(crops.n_planted):
        console.print(f"  {label:14} planted {crops.n_planted[label]:4}  found {crops.n_found.get(label, 0):4}")
    console.print(report)
    provenance: dict[str, str | float | int] = {"crops": "synthetic", "n_images": n_images, "seed": seed, **report}
    fitted = fit_head(crops.features, crops.labels, fit)
    save_head(fitted, out, encoder_form=build_repository.form_text(EncoderForm()), provenance=provenance)
    console.print(f"head of {len(fitted.labels)} classes written to {out}")


@app.command()
def build(
    repository: RepositoryOption = REPOSITORY,
    weights: Annotated[Path, typer.Option(help="Folder with detector.safetensors and head.safetensors.")] = (
        build_repository.SHIPPED
    ),
    without_head: Annotated[bool, typer.Option(help="Only detector and encoder, to fit a head with.")] = False,
    cache: CacheOption = Path(".cache"),
) -> None:
    """Build the model repository: fetch the backbone, export the weights, check, publish; skip what is there."""
    for line in build_repository.build(repository, weights=weights, cache=cache, with_head=not without_head):
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
