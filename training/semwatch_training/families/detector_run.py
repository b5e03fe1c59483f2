"""One training run of a detector, from images to its weights file: the default branch, or the paper's reconstruction.

A run resumes: what it computed of its images, and its checkpoint, lie in a folder beside the weights file, which a note
ties to the run's settings. It uses the GPU where there is one; a checkpoint may move between GPU and CPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.system import files
from semwatch_training.data import datasets
from semwatch_training.data.backgrounds import backgrounds
from semwatch_training.families.branch.branch_views import Image, Mask, synthetic_fields, synthetic_views, views
from semwatch_training.families.branch.segmentation_branch import Evidence
from semwatch_training.families.branch.train_branch import BranchSchedule, cache_samples, train_branch
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import DetectorForm, NIDetector
from semwatch_training.families.ni.train_detector import Schedule
from semwatch_training.synthetic import STAGES
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks import backbone
from semwatch_training.trunks.vit import VisionTransformer

MIN_NORMALS = 8
STEPS, WIDTH = 7000, 64
"""Of the default detector's branch."""

Provenance = dict[str, str | float | int]


@dataclass(frozen=True, slots=True)
class BranchImages:
    """What the default detector learns from: synthetic images, or a folder of normal ones."""

    normals: Path | None = None
    """Folder; None for synthetic fields."""
    n_normals: int = 900
    """Synthetic normal fields; of a folder all count that are not held out."""
    n_labelled: int = 3000
    """Synthetic fields with a labelled defect; none beside a folder, whose defects nobody has labelled."""
    n_backgrounds: int = 300
    """Procedural backgrounds of no process."""
    held_out: int = 600
    """Normal images kept for the gate's threshold; of a folder at most a quarter."""
    stages: tuple[str, ...] = STAGES

    @property
    def n(self) -> int:
        """Pairs of image and mask that ``views`` makes of them."""
        return 2 * (self.n_normals + self.n_backgrounds) + self.n_labelled


def train_default(
    out: Path, form: DetectorForm, images: BranchImages, schedule: BranchSchedule, *, cache: Path, progress: Progress
) -> list[float]:
    """Train a segmentation branch on frozen features and write it; resumes where it was stopped.

    Args:
        out: the weights file; its work lies beside it, in ``<name>.work``.
        form: of a detector with a branch and no other evidence.
        images: what to learn from.
        schedule: how; its seed also decides views and first weights.
        cache: where the converted trunk is kept.
        progress: called with what is being done.

    Returns:
        Raw scores of the held-out normal images.

    Raises:
        ConfigError: a form without a branch, too few normal images, an unknown stage, or work of another run.
    """
    if form.branch is None:
        raise ConfigError("a detector of evidence 'branch' has no branch")
    device = _device()
    torch.manual_seed(schedule.seed)
    fitted = NIDetector(form).to(device)
    branch = fitted.branch
    if branch is None:
        raise ConfigError("a detector of evidence 'branch' has no branch")
    trunk = backbone.load_efficientnet(cache).to(device)
    pairs, kept, images = _pairs(images, form.input_px, schedule.seed)
    work = out.with_suffix(".work")
    claim(
        work,
        f"{images.normals} {images.stages} {images.n_normals} normal, {images.n_labelled} labelled, "
        f"{images.n_backgrounds}, {form.branch.width}, {schedule}",
    )
    samples = cache_samples(Evidence(trunk, form.branch).to(device), pairs, images.n, work, progress=progress)
    curve = train_branch(branch, samples, schedule, work, progress=progress)
    graph = train_detector.with_trunk(None, fitted, trunk).to(device)
    scores = train_detector.raw_scores(graph, kept, images.held_out, progress=progress)
    named = (
        f"synthetic {', '.join(images.stages)}" if images.normals is None else f"{images.n_normals} images of a folder"
    )
    provenance: Provenance = {
        "normals": named,
        "branch_trunk": backbone.EFFICIENTNET_WHEEL_SHA256,
        "n_normals": images.n_normals,
        "n_labelled": images.n_labelled,
        "n_backgrounds": images.n_backgrounds,
        "steps": schedule.steps,
        "seed": schedule.seed,
        "final_loss": curve[-1]["loss"],
        "training_seconds": round(sum(row["seconds"] for row in curve)),
        "device": device,
    }
    train_detector.save(fitted, out, normal_scores=scores, provenance=provenance)
    return scores


def train_reconstruction(
    out: Path,
    vit: VisionTransformer,
    trunk: str,
    checkpoint: Path | None,
    schedule: Schedule,
    *,
    normals: Path | None,
    n: int,
    held_out: int,
    progress: Progress,
) -> list[float]:
    """Train the paper's NI-guided reconstruction on normal images and write it; resumes where it was stopped.

    Args:
        out: the weights file; its work lies beside it, in ``<name>.work``.
        vit: the trunk, named ``trunk``, read from ``checkpoint`` unless that is None: the built-in one.
        trunk: its name.
        checkpoint: its file.
        schedule: how.
        normals: folder of normal images; None for ``n`` synthetic ones.
        n: synthetic images.
        held_out: normal images kept for the gate; of a folder at most a quarter.
        progress: called with what is being done.

    Returns:
        Raw scores of the held-out normal images.

    Raises:
        ConfigError: too few normal images, or work of another run.
    """
    device = _device()
    torch.manual_seed(schedule.seed)
    form = DetectorForm(trunk=trunk, width=vit.shape.width, heads=vit.shape.heads, input_px=32 * vit.shape.patch)
    graph = train_detector.with_trunk(vit, NIDetector(form)).to(device)
    if normals is None:
        images = datasets.synthetic_normals(n, first_seed=datasets.SEED_TRAIN, size_px=form.input_px)
        kept = datasets.synthetic_normals(held_out, first_seed=datasets.SEED_HELD_OUT, size_px=form.input_px)
    else:
        learnt, kept, held_out = _split_normals(normals, held_out, schedule.seed, form.input_px)
        images, n = datasets.normal_images(learnt, size_px=form.input_px), len(learnt)
    work = out.with_suffix(".work")
    claim(work, f"{trunk} {checkpoint} {normals} {n} images, {schedule}")
    features = train_detector.cache_features(graph, images, n, work / "features.npy", progress=progress)
    curve = train_detector.train(graph.detector, features, schedule, work, progress=progress)
    scores = train_detector.raw_scores(graph.eval(), kept, held_out, progress=progress)
    provenance: Provenance = {
        "normals": "synthetic BEOL, DEP, DPR" if normals is None else f"{n} images of a folder",
        "backbone": backbone.WHEEL_SHA256 if checkpoint is None else files.file_sha256(checkpoint),
        "n_train": n,
        "epochs": schedule.epochs,
        "batch": schedule.batch,
        "seed": schedule.seed,
        "final_reconstruction_loss": curve[-1]["reconstruction_loss"],
        "training_seconds": round(sum(row["seconds"] for row in curve)),
        "device": device,
    }
    train_detector.save(graph.detector, out, normal_scores=scores, provenance=provenance)
    return scores


def claim(work: Path, run: str) -> None:
    """Keep a run's features and checkpoint from being taken for those of another.

    Raises:
        ConfigError: ``work`` holds another run.
    """
    note = work / "run.txt"
    if note.exists() and note.read_text() != run:
        raise ConfigError(f"{work} holds another run ({note.read_text()}); remove it or give another --out")
    work.mkdir(parents=True, exist_ok=True)
    files.write_whole(note, run.encode())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pairs(
    images: BranchImages, size_px: int, seed: int
) -> tuple[Iterator[tuple[Image, Mask]], Iterator[NDArray[np.uint8]], BranchImages]:
    """What to learn from, what to keep for the gate, both (size_px, size_px), and how many those are."""
    if images.normals is None:
        pairs = synthetic_views(
            images.n_normals, images.n_backgrounds, images.n_labelled, seed=seed, size_px=size_px, stages=images.stages
        )
        fields = synthetic_fields(
            images.held_out,
            first_seed=datasets.SEED_HELD_OUT,
            size_px=size_px,
            stages=images.stages,
            defective=False,
        )
        return pairs, (image for image, _ in fields), images
    learnt, kept, held_out = _split_normals(images.normals, images.held_out, seed, size_px)
    shown = (
        datasets.normal_images(learnt, size_px=size_px),
        backgrounds(images.n_backgrounds, seed=seed, size_px=size_px),
    )
    found = replace(images, n_normals=len(learnt), n_labelled=0, held_out=held_out)
    return views(chain(*shown), (), seed=seed), kept, found


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
