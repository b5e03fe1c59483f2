"""One training run of the encoder, from images to its weights file; resumes where it was stopped.

Its work lies beside the weights file, in ``<name>.work``: crops, what the frozen layers made of their views (0.2 MB a
view with the default trunk), checkpoint and metrics.csv. It uses the GPU where there is one.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from semwatch.errors import ConfigError
from semwatch.line import inputs
from semwatch.models.inference import Embedded
from semwatch_training.families.smg_vit import self_supervision, unlabelled_crops
from semwatch_training.families.smg_vit.crop_views import cache_views
from semwatch_training.families.smg_vit.self_supervision import Schedule
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, SmgVit
from semwatch_training.families.smg_vit.unlabelled_crops import Crops
from semwatch_training.system.defaults import CROP_IMAGES
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks import backbone


@dataclass(frozen=True, slots=True)
class CropSource:
    """Where crops come from: a file of them, or else a folder of images, or else synthetic images."""

    crops: Path | None = None
    """What ``unlabelled_crops.save`` wrote."""
    images: Path | None = None
    """Searched with the repository's detector, as synthetic ones are."""
    n_images: int = CROP_IMAGES
    """To search; of a folder at most so many, drawn at random."""


def train_encoder(
    out: Path,
    form: EncoderForm,
    source: CropSource,
    schedule: Schedule,
    *,
    repository: Path,
    cache: Path,
    n_views: int = 2,
    progress: Progress,
) -> dict[str, float]:
    """Teach the encoder's last layers on crops without labels, and write what was trained.

    Args:
        out: the weights file.
        form: of the encoder.
        source: of the crops.
        schedule: how; its seed also draws images and views.
        repository: whose detector searches; it is not read where the crops come from a file.
        cache: where the converted trunk is kept.
        n_views: of each crop; each step draws two.
        progress: called with what is being done.

    Returns:
        The last row of the curve, see ``self_supervision.train``.

    Raises:
        ConfigError: crops from two places, no crops, fewer than a batch, or a checkpoint of another run.
        ModelMismatch: the repository has no detector, or no encoder that says how large a crop is.
    """
    if source.crops is not None and source.images is not None:
        raise ConfigError("crops come from a file or from images; give --crops or --images, not both")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vit = SmgVit(backbone.load(cache), form).to(device)
    tokens = form.input_px // vit.trunk.shape.patch
    work = out.with_suffix(".work")
    if source.crops is not None:
        crops = unlabelled_crops.load(source.crops, side_px=form.input_px, tokens=tokens)
    else:
        crops = _searched(source, form, tokens, schedule.seed, repository, work, progress)
    self_supervision.refuse_too_few(len(crops.pixels), schedule)
    views = cache_views(vit, *crops, work, n_views=n_views, seed=schedule.seed, progress=progress)
    curve = self_supervision.train(vit, views, schedule, work, progress=progress)
    provenance: dict[str, str | float | int] = {
        "crops": "a file" if source.crops else "images of a folder" if source.images else "synthetic",
        "n_crops": len(crops.pixels),
        "n_views": n_views,
        "backbone": backbone.WHEEL_SHA256,
        "epochs": schedule.epochs,
        "batch": schedule.batch,
        "seed": schedule.seed,
        "final_loss": curve[-1]["loss"],
        "training_seconds": round(sum(row["seconds"] for row in curve)),
        "device": device,
    }
    self_supervision.save(vit, out, provenance=provenance)
    return curve[-1]


def _searched(
    source: CropSource, form: EncoderForm, tokens: int, seed: int, repository: Path, work: Path, progress: Progress
) -> Crops:
    """Crops that a detector finds, cut once and kept under a name that changes with detector and images."""
    paths = unlabelled_crops.drawn(source.images, source.n_images, seed) if source.images else []
    with Embedded(repository, models=("detector", "encoder")) as models:
        if inputs.crop_px(models.meta("encoder")) != form.input_px:
            raise ConfigError(f"the encoder in {repository} takes crops of another size; build the repository again")
        seen = unlabelled_crops.fingerprint(paths) if paths else str(source.n_images)
        name = hashlib.sha256(f"{models.meta('detector').weights_sha256} {seen}".encode()).hexdigest()[:16]
        kept = work / f"crops-{name}.npz"
        if kept.exists():
            return unlabelled_crops.load(kept, side_px=form.input_px, tokens=tokens)
        if paths:
            crops = unlabelled_crops.of_files(models, paths, progress=progress)
        else:
            crops = unlabelled_crops.of_synthetic(models, source.n_images, progress=progress)
    unlabelled_crops.save(crops, kept)
    return crops
