"""One training run of a detector, from images to its weights file: the default branch, or the paper's reconstruction.

A run resumes: what it computed of its images, and its checkpoint, lie in a folder beside the weights file, which a note
ties to the run's settings. It uses the GPU where there is one; a checkpoint may move between GPU and CPU.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.line.scaling import resize
from semwatch.system import files
from semwatch_training.data import data_folders, datasets, world
from semwatch_training.data.backgrounds import backgrounds
from semwatch_training.families.branch.branch_views import (
    SIDE_SHARES,
    SIDES_PX,
    Image,
    Mask,
    cuts,
    synthetic_views,
    views,
)
from semwatch_training.families.branch.train_branch import BranchSchedule, cache_samples, train_branch
from semwatch_training.families.branch_images import BranchImages
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicDetector, IntrinsicForm, IntrinsicGraph
from semwatch_training.families.intrinsic.train_intrinsic import N_CALIBRATION, UNSEEN_KINDS
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import DetectorForm, NIDetector
from semwatch_training.families.ni.train_detector import Schedule
from semwatch_training.synthetic import render
from semwatch_training.system.defaults import MIN_NORMALS
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks import backbone
from semwatch_training.trunks.vit import VisionTransformer

Provenance = dict[str, str | float | int]


def train_default(
    out: Path,
    form: IntrinsicForm,
    images: BranchImages,
    schedule: BranchSchedule,
    *,
    cache: Path,
    progress: Progress,
    start: Path | None = None,
) -> list[float]:
    """Train the branch of an intrinsic detector on frozen features and write it; resumes where it was stopped.

    Args:
        out: the weights file; its work lies beside it, in ``<name>.work``.
        form: of the detector.
        images: what to learn from.
        schedule: how; its seed also decides views and first weights.
        cache: where the converted trunk is kept.
        progress: called with what is being done.
        start: weights of such a detector whose branch the training begins with; None begins at random.

    Returns:
        Raw scores of the held-out normal images.

    Raises:
        ConfigError: too few normal images, an unknown stage, work of another run, or ``start`` has another form.
    """
    device = _device()
    torch.manual_seed(schedule.seed)
    fitted = IntrinsicDetector(form).to(device)
    if start is not None:
        _begin_with(fitted, start)
    graph = IntrinsicGraph(backbone.load_efficientnet(cache).to(device), fitted)
    size_px = form.branch.input_px
    pairs, kept, images = _pairs(images, size_px, schedule.seed)
    work = out.with_suffix(".work")
    claim(
        work,
        f"{images.normals} {images.stages} {images.n_normals} normal, {images.n_labelled} labelled, "
        f"{images.n_backgrounds}, {images.n_scenes} scenes, {form.branch.width}, {schedule}, {_named(start)}",
    )
    samples = cache_samples(graph.evidence, pairs, images.n, work, progress=progress)
    curve = train_branch(fitted.branch, samples, schedule, work, progress=progress)
    graph.eval()
    unseen = world.scenes(N_CALIBRATION, seed=datasets.SEED_HELD_OUT, size_px=size_px, kinds=UNSEEN_KINDS)
    train_intrinsic.calibrate(fitted, graph.evidence, unseen, N_CALIBRATION, seed=schedule.seed, progress=progress)
    known = _known_fields(images, form.domain_fields, schedule.seed)
    train_intrinsic.learn_domain(graph, known, progress=progress)
    scores = train_intrinsic.normal_scores(graph, kept, images.held_out, progress=progress)
    named = (
        f"synthetic {', '.join(images.stages)}" if images.normals is None else f"{images.n_normals} images of a folder"
    )
    provenance: Provenance = {
        "normals": named,
        "branch_trunk": backbone.EFFICIENTNET_WHEEL_SHA256,
        "n_normals": images.n_normals,
        "n_labelled": images.n_labelled,
        "n_backgrounds": images.n_backgrounds,
        "n_scenes": images.n_scenes,
        "unseen_kinds": ", ".join(UNSEEN_KINDS),
        "calibration": str(cast(torch.Tensor, fitted.calibration).tolist()),
        "steps": schedule.steps,
        "seed": schedule.seed,
        "start": _named(start),
        "final_loss": curve[-1]["loss"],
        "training_seconds": round(sum(row["seconds"] for row in curve)),
        "device": device,
    }
    train_intrinsic.save(fitted, out, normal_scores=scores, provenance=provenance)
    return scores


def _begin_with(fitted: IntrinsicDetector, start: Path) -> None:
    """Take the branch of a trained detector of the same form, in place."""
    trained, _, _ = train_intrinsic.load(start)
    if trained.form != fitted.form:
        raise ConfigError(f"{start} is a detector of another form ({trained.form}); train it with the same width")
    fitted.branch.load_state_dict(trained.branch.state_dict())


def _named(start: Path | None) -> str:
    return "random" if start is None else files.file_sha256(start)


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
        learnt, whole, held_out = _split_normals(normals, held_out, schedule.seed)
        kept = (resize(image, (form.input_px, form.input_px)) for image in whole)
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
    """What to learn from (size_px, size_px), what to keep for the gate (H, W), and how many those are."""
    if images.normals is None:
        kinds = tuple(kind for kind in world.LAYOUTS if kind not in UNSEEN_KINDS)
        pairs = synthetic_views(
            images.n_normals,
            images.n_backgrounds,
            images.n_labelled,
            seed=seed,
            size_px=size_px,
            stages=images.stages,
            n_scenes=images.n_scenes,
            kinds=kinds,
        )
        return pairs, held_out_fields(images.held_out, images.stages), images
    learnt, kept, held_out = _split_normals(images.normals, images.held_out, seed)
    shown = (
        cuts(map(datasets.read_gray, learnt), seed=seed, size_px=size_px),
        backgrounds(images.n_backgrounds, seed=seed, size_px=size_px),
    )
    found = replace(images, n_normals=len(learnt), n_labelled=0, n_scenes=0, held_out=held_out)
    return views(chain(*shown), (), seed=seed), kept, found


def _known_fields(images: BranchImages, n: int, seed: int) -> Iterator[Image]:
    """Normal fields (H, W) of the processes that are learnt, n at most."""
    if images.normals is not None:
        yield from map(datasets.read_gray, _split_normals(images.normals, images.held_out, seed)[0][:n])
        return
    rng = np.random.default_rng(datasets.SEED_TRAIN)
    for index in range(n):
        side = int(rng.choice(SIDES_PX, p=SIDE_SHARES))
        stage = images.stages[index % len(images.stages)]
        yield render(stage, seed=datasets.SEED_TRAIN + index, size_hw=(side, side)).pixels


def held_out_fields(n: int, stages: Sequence[str]) -> Iterator[Image]:
    """Normal fields of the stages for the gate, whole; of the sizes that microscopes give."""
    rng = np.random.default_rng(datasets.SEED_HELD_OUT)
    for index in range(n):
        side = int(rng.choice(SIDES_PX, p=SIDE_SHARES))
        yield render(stages[index % len(stages)], seed=datasets.SEED_HELD_OUT + index, size_hw=(side, side)).pixels


def _split_normals(folder: Path, held_out: int, seed: int) -> tuple[list[Path], Iterator[NDArray[np.uint8]], int]:
    """Paths to learn from, images (H, W) kept for the gate, and how many those are: at most a quarter."""
    paths = data_folders.read_normals(folder)
    if len(paths) < MIN_NORMALS:
        raise ConfigError(f"{folder} holds {len(paths)} images; a detector needs {MIN_NORMALS} normal ones or more")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(held_out, len(paths) // 4)
    kept = map(datasets.read_gray, (paths[i] for i in order[:held_out]))
    return [paths[i] for i in order[held_out:]], kept, held_out
