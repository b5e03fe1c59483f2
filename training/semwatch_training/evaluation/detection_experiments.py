"""The paper's experiments of detection, each a function that gives a table like the paper's with our figures.

Sizes are arguments: the defaults finish on two cores, a GPU machine may take more. Every table names its seeds; test
images come from seeds that no training uses.

Source: IC-DefectNCD, tables 1 (cross-process), 3 (few-shot) and 4 (matching), figure 10 (normal tokens).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line.scaling import resize
from semwatch_training.data import datasets
from semwatch_training.evaluation.evaluate_detection import Engine, Field, judge, synthetic
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.families.branch.branch_views import synthetic_views
from semwatch_training.families.branch.few_shot import few_shot_images
from semwatch_training.families.branch.segmentation_branch import BranchForm, Evidence
from semwatch_training.families.branch.train_branch import BranchSchedule, Samples, cache_samples, train_branch
from semwatch_training.families.memory.fit_memory import fit
from semwatch_training.families.memory.memory_detector import Memory, MemoryForm, MemoryGraph, Trunks
from semwatch_training.families.ni import train_detector
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.metrics import detection_metrics
from semwatch_training.metrics.uncertainty import Spread
from semwatch_training.synthetic import STAGES
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks.efficientnet import EfficientNet

Image = NDArray[np.uint8]


# ---- cross-process ----


def cross_process(
    convolutional: EfficientNet,
    folder: Path,
    *,
    n_normal: int,
    n_labelled: int,
    n_backgrounds: int,
    schedule: BranchSchedule,
    seeds: Sequence[int],
    n_test_normal: int,
    n_test_per_type: int,
    stages: Sequence[str] = STAGES,
    progress: Progress,
) -> Table:
    """Train on one of ``stages`` in turn, judge on all three: from normals only, and with labelled defects.

    Rows "normals" learn from planted pseudo-defects alone, rows "labelled" also from the training stage's own defects.
    """
    branch = BranchForm()
    form = DetectorForm(evidence="branch", branch=branch)
    fields = {
        stage: list(
            synthetic(stage, n_normal=n_test_normal, n_per_type=n_test_per_type, first_seed=datasets.SEED_EVALUATE)
        )
        for stage in STAGES
    }
    n_planted = 2 * (n_normal + n_backgrounds)  # the labelled ones come after them
    rows: list[tuple[Cell, ...]] = []
    for stage in stages:
        samples = {
            seed: _cached_views(
                Evidence(convolutional, branch),
                folder / f"{stage}-{seed}",
                stage=stage,
                n_normal=n_normal,
                n_labelled=n_labelled,
                n_backgrounds=n_backgrounds,
                seed=seed,
                progress=progress,
            )
            for seed in seeds
        }
        for labels_of, n in (("normals", n_planted), ("labelled", n_planted + n_labelled)):
            graphs = []
            for seed, (evidence, cover) in samples.items():
                torch.manual_seed(seed)
                detector = NIDetector(form)
                if detector.branch is None:
                    raise ValueError("a cross-process detector has a branch")
                shown, work = Samples(evidence[:n], cover[:n]), folder / f"{stage}-{labels_of}-{seed}"
                train_branch(detector.branch, shown, replace(schedule, seed=seed), work, progress=progress)
                graphs.append(_graph(detector, convolutional))
            engine = Engine(tuple(graphs), form.input_px, "none")
            for other in STAGES:
                scores = detection_scores(engine, fields[other], progress=progress)
                rows.append((stage, labels_of, f"{other}{'' if other != stage else ' (seen)'}", *scores))
    note = (
        f"Trained on {n_normal} normal fields of one stage, each also with a pseudo-defect, and {n_backgrounds} "
        f"procedural backgrounds; 'labelled' adds {n_labelled} of the stage's own defects with masks. "
        f"{schedule.steps} steps, seeds {list(seeds)}. Judged on {n_test_normal} normal fields and {n_test_per_type} "
        f"of each type of seeds from {datasets.SEED_EVALUATE:,}; no normal image of the stage is shown at test."
    )
    return Table(
        "Cross-process detection", ("trained on", "from", "judged on", "image AUROC", "pixel AUROC"), tuple(rows), note
    )


def _cached_views(
    evidence: Evidence,
    folder: Path,
    *,
    stage: str,
    n_normal: int,
    n_labelled: int,
    n_backgrounds: int,
    seed: int,
    progress: Progress,
) -> Samples:
    pairs = synthetic_views(
        n_normal,
        n_backgrounds,
        n_labelled,
        seed=seed,
        size_px=evidence.form.input_px,
        first_seed=datasets.SEED_TRAIN + 10_000_000 * seed,
        stages=(stage,),
    )
    n = 2 * (n_normal + n_backgrounds) + n_labelled
    return cache_samples(evidence, pairs, n, folder, progress=progress)


def _graph(detector: NIDetector, convolutional: EfficientNet) -> DetectorGraph:
    return DetectorGraph(None, detector.eval(), convolutional).eval()


# ---- few-shot ----

Views = Literal["as they are", "8 turns", "22 views"]
"""How k images are shown: alone; in all turns and mirrorings, as the memory does by itself; by ``few_shot_images``."""


def k_shot(
    trunks: Trunks,
    groups: Mapping[str, tuple[Sequence[Image], Sequence[Field]]],
    *,
    shots: Sequence[int],
    seeds: Sequence[int],
    support_set_free: Mapping[str, Engine],
    form: MemoryForm | None = None,
    progress: Progress,
) -> Table:
    """Show k normal images to the memory, alone and augmented, and judge; the draw of the k is the seed.

    One image alone gives no row: distances are scaled by those between two images. The first rows of a group are of the
    engines that see no normal image at all.

    Args:
        trunks: frozen, in evaluation mode.
        groups: normal images and fields to judge, by name, such as that of a process stage.
        shots: values of k.
        seeds: of the draw, the views and the memory.
        support_set_free: engines by name.
        form: of the memory.
        progress: called all along.

    Raises:
        ConfigError: a shot of no image, or of more than there are normal ones.
    """
    n_normals = min((len(normals) for normals, _ in groups.values()), default=0)
    if not shots or min(shots) < 1 or max(shots) > n_normals:
        raise ConfigError(f"shots {list(shots)} need 1 to {n_normals} normal images each, as many as there are")
    form = form or MemoryForm()
    rows: list[tuple[Cell, ...]] = []
    for group, (normals, fields) in groups.items():
        for name, engine in support_set_free.items():
            rows.append((group, 0, name, "", *detection_scores(engine, fields, progress=progress)))
        for k in sorted(set(shots)):
            for views in get_args(Views)[1 if k == 1 else 0 :]:  # one alone is always augmented
                graphs = []
                for seed in seeds:
                    drawn = [normals[i] for i in np.random.default_rng(seed).permutation(len(normals))[:k]]
                    memory = _few_shot_memory(drawn, views, trunks, form, seed=seed, progress=progress)
                    graphs.append(MemoryGraph(trunks, memory).eval())
                engine = Engine(tuple(graphs), form.input_px, str(k))
                rows.append((group, k, "memory", views, *detection_scores(engine, fields, progress=progress)))
    n_fields = sum(len(fields) for _, fields in groups.values())
    note = (
        f"{n_fields} fields judged; k of {n_normals} normal images or more at random, seeds {list(seeds)}; no normal "
        f"image is support-set-free inference. One image alone scales no distances, so it is always augmented."
    )
    columns = ("on", "normal images", "engine", "shown", "image AUROC", "pixel AUROC")
    return Table("Few-shot detection", columns, tuple(rows), note)


def _few_shot_memory(
    images: Sequence[Image], views: Views, trunks: Trunks, form: MemoryForm, *, seed: int, progress: Progress
) -> Memory:
    if views == "8 turns":
        turning = replace(form, few_shot=max(form.few_shot, len(images)))
        return fit(images, trunks, turning, seed=seed, progress=progress)
    alone = replace(form, few_shot=0)
    if views == "as they are":
        return fit(images, trunks, alone, seed=seed, progress=progress)
    shown = few_shot_images(images, seed, size_px=form.input_px)
    # Views of one image must not judge each other; of a single image there is nothing else to judge by.
    owners = np.repeat(np.arange(len(images)), len(shown) // len(images)).tolist() if len(images) > 1 else None
    return fit(shown, trunks, alone, groups=owners, seed=seed, progress=progress)


# ---- reconstruction, matching, number of normal tokens ----


def normal_tokens(
    graph_of: Callable[[DetectorForm], DetectorGraph],
    normals: Sequence[Image],
    fields: Sequence[Field],
    folder: Path,
    *,
    tokens: Sequence[int],
    schedule: train_detector.Schedule,
    seeds: Sequence[int],
    progress: Progress,
) -> Table:
    """Train NI detectors with M normal tokens; judge each by reconstruction and by direct matching.

    Args:
        graph_of: an untrained graph of a form.
        normals: (S, S) uint8 at the detector's input size.
        fields: to judge.
        folder: of the feature cache, shared by all, and of checkpoints.
        tokens: values of M.
        schedule: of each training.
        seeds: of weights and batches.
        progress: called all along.
    """
    rows: list[tuple[Cell, ...]] = []
    for m in tokens:
        trained: list[DetectorGraph] = []
        for seed in seeds:
            torch.manual_seed(seed)
            graph = graph_of(DetectorForm(n_normal_tokens=m))
            features = train_detector.cache_features(
                graph, iter(normals), len(normals), folder / "features.npy", progress=progress
            )
            train_detector.train(
                graph.detector, features, replace(schedule, seed=seed), folder / f"tokens-{m}-{seed}", progress=progress
            )
            trained.append(graph.eval())
        by_evidence: dict[str, tuple[Spread, Spread]] = {}
        for evidence in ("residual", "matching"):
            for graph in trained:
                graph.detector.form = replace(graph.detector.form, evidence=evidence)
            engine = Engine(tuple(trained), trained[0].detector.form.input_px, "none")
            by_evidence[evidence] = detection_scores(engine, fields, progress=progress)
        rows.append((m, *by_evidence["residual"], *by_evidence["matching"]))
    columns = ("normal tokens", "image, rebuilt", "pixel, rebuilt", "image, matched", "pixel, matched")
    note = (
        f"{len(normals)} normal fields, {schedule.epochs} epochs, seeds {list(seeds)}; {len(fields)} fields judged. "
        f"Rebuilt: distance to the decoder's features. Matched: distance to the nearest normal token."
    )
    return Table("Normal tokens: reconstruction against direct matching", columns, tuple(rows), note)


def squares(images: Sequence[Image], size_px: int) -> Iterator[Image]:
    """Images at a detector's input size."""
    for image in images:
        yield resize(image, (size_px, size_px))


def detection_scores(engine: Engine, fields: Sequence[Field], *, progress: Progress) -> tuple[Spread, Spread]:
    """Image and pixel AUROC of an engine on labelled fields, over the engine's seeds."""
    kept, judged = judge({"engine": engine}, fields, len(fields), progress=progress)
    defective = np.array([field.label != DEFECT_FREE for field in kept])
    masks = [field.mask for field in kept]
    runs = judged["engine"]
    return (
        Spread.of([detection_metrics.image_auroc(run.raw, defective) for run in runs]),
        Spread.of([detection_metrics.pixel_auroc(run.maps, masks) for run in runs]),
    )
