"""The paper's experiments, each a function that gives a table like the paper's with our figures.

Detection on the synthetic stages (cross-process, few-shot, matching against reconstruction, number of normal tokens),
what a mask is worth to discovery (mask and crop), and the number of classes per stage. Sizes are arguments: the
defaults finish on two cores, a GPU machine may take more. Every table names its seeds; test images come from seeds that
no training uses.

Source: IC-DefectNCD, tables 1 (cross-process), 3 (few-shot), 4 (matching), 5 (k) and 7 (mask and crop), figure 10
(normal tokens).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from semwatch.config import Recipe
from semwatch.defects import DEFECT_FREE, Micrograph
from semwatch.detection import resize
from semwatch.errors import ConfigError
from semwatch.inference import Embedded
from semwatch_training.data import datasets
from semwatch_training.detection import train_detector
from semwatch_training.detection.branch_views import synthetic_views
from semwatch_training.detection.fit_memory import fit
from semwatch_training.detection.memory_detector import MemoryForm, MemoryGraph, Trunks
from semwatch_training.detection.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.detection.segmentation_branch import BranchForm, Evidence
from semwatch_training.detection.train_branch import BranchSchedule, cache_samples, train_branch
from semwatch_training.discovery import clustering, estimate_k
from semwatch_training.discovery.labelled_crops import encode, given
from semwatch_training.evaluation.evaluate import labelled_half
from semwatch_training.evaluation.evaluate_detection import Engine, Field, judge, of_samples, synthetic
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.metrics import class_metrics, detection_metrics
from semwatch_training.metrics.uncertainty import Spread
from semwatch_training.progress_bars import Progress
from semwatch_training.synthetic import STAGES
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
    form = DetectorForm(evidence="branch", branch=BranchForm())
    fields = {
        stage: list(
            synthetic(stage, n_normal=n_test_normal, n_per_type=n_test_per_type, first_seed=datasets.SEED_EVALUATE)
        )
        for stage in STAGES
    }
    rows: list[tuple[Cell, ...]] = []
    for stage in stages:
        for told, n in (("normals", 0), ("labelled", n_labelled)):
            graphs = []
            for seed in seeds:
                torch.manual_seed(seed)
                detector = NIDetector(form)
                _train_on_stage(
                    detector,
                    convolutional,
                    folder / f"{stage}-{told}-{seed}",
                    stage=stage,
                    n_normal=n_normal,
                    n_labelled=n,
                    n_backgrounds=n_backgrounds,
                    schedule=replace(schedule, seed=seed),
                    progress=progress,
                )
                graphs.append(_graph(detector, convolutional))
            engine = Engine(tuple(graphs), form.input_px, "none")
            for other in STAGES:
                scores = detection_scores(engine, fields[other], progress=progress)
                rows.append((stage, told, f"{other}{'' if other != stage else ' (seen)'}", *scores))
    note = (
        f"Trained on {n_normal} normal fields of one stage, each also with a pseudo-defect, and {n_backgrounds} "
        f"procedural backgrounds; 'labelled' adds {n_labelled} of the stage's own defects with masks. "
        f"{schedule.steps} steps, seeds {list(seeds)}. Judged on {n_test_normal} normal fields and {n_test_per_type} "
        f"of each type of seeds from {datasets.SEED_EVALUATE:,}; no normal image of the stage is shown at test."
    )
    return Table(
        "Cross-process detection", ("trained on", "from", "judged on", "image AUROC", "pixel AUROC"), tuple(rows), note
    )


def _train_on_stage(
    detector: NIDetector,
    convolutional: EfficientNet,
    folder: Path,
    *,
    stage: str,
    n_normal: int,
    n_labelled: int,
    n_backgrounds: int,
    schedule: BranchSchedule,
    progress: Progress,
) -> None:
    form = detector.form.branch
    if form is None or detector.branch is None:
        raise ValueError("a cross-process detector has a branch")
    size, start = form.input_px, datasets.SEED_TRAIN + 10_000_000 * schedule.seed
    pairs = synthetic_views(
        n_normal, n_backgrounds, n_labelled, seed=schedule.seed, size_px=size, first_seed=start, stages=(stage,)
    )
    n = 2 * (n_normal + n_backgrounds) + n_labelled
    samples = cache_samples(Evidence(convolutional, form), pairs, n, folder, progress=progress)
    train_branch(detector.branch, samples, schedule, folder, progress=progress)


def _graph(detector: NIDetector, convolutional: EfficientNet) -> DetectorGraph:
    return DetectorGraph(None, detector.eval(), convolutional).eval()


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


# ---- few-shot ----


def k_shot(
    trunks: Trunks,
    normals: Sequence[Image],
    fields: Sequence[Field],
    *,
    shots: Sequence[int],
    seeds: Sequence[int],
    form: MemoryForm | None = None,
    progress: Progress,
) -> Table:
    """Show k normal images to the memory, seen from all sides, and judge; the draw of the k is the seed.

    Raises:
        ConfigError: a shot of no image, or of more than there are normal ones.
    """
    if not shots or min(shots) < 1 or max(shots) > len(normals):
        raise ConfigError(f"shots {list(shots)} need 1 to {len(normals)} normal images each, as many as there are")
    form = form or MemoryForm()
    rows: list[tuple[Cell, ...]] = []
    for k in shots:
        graphs = []
        for seed in seeds:
            drawn = np.random.default_rng(seed).permutation(len(normals))[:k]
            memory = fit([normals[i] for i in drawn], trunks, form, seed=seed, progress=progress)
            graphs.append(MemoryGraph(trunks, memory).eval())
        rows.append((k, *detection_scores(Engine(tuple(graphs), form.input_px, str(k)), fields, progress=progress)))
    note = f"{len(fields)} fields judged; k of {len(normals)} normal images at random, seeds {list(seeds)}."
    return Table("Few-shot detection, memory", ("normal images", "image AUROC", "pixel AUROC"), tuple(rows), note)


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
        progress: told all along.
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


# ---- mask and crop ----

MASKINGS = ("whole image", "crop alone", "crop, binary mask", "crop, soft mask")


def mask_and_crop(
    samples: Sequence[datasets.Sample],
    models: Embedded,
    recipe: Recipe,
    *,
    frozen_width: int,
    seeds: Sequence[int],
    progress: Progress,
) -> Table:
    """Cluster a data set's defects by what the encoder says of the whole image, of the crop, and of the masked crop.

    Raises:
        ConfigError: no sample has a mask that marks anything.
    """
    labels: list[str] = []
    features: dict[str, list[NDArray[np.float32]]] = {name: [] for name in MASKINGS}
    for done, field in enumerate(of_samples(samples), start=1):
        if field.label == DEFECT_FREE or not field.mask.any():
            continue
        labels.append(field.label)
        for name, vector in _by_masking(field, models, recipe).items():
            features[name].append(vector)
        progress("crops", done, len(samples))
    if not labels:
        raise ConfigError("no sample has a mask that marks anything: there is no defect to cluster")
    truth = np.array(labels)
    k = len(set(labels))
    rows: list[tuple[Cell, ...]] = []
    for name, vectors in features.items():
        stacked = np.stack(vectors)[:, :frozen_width]
        runs = [clustering.plain_kmeans(stacked, k, seed=seed).assignment for seed in seeds]
        figures = [
            (class_metrics.nmi(truth, a), class_metrics.ari(truth, a), class_metrics.accuracy(truth, a)) for a in runs
        ]
        rows.append((name, *(Spread.of(column) for column in zip(*figures, strict=True))))
    note = f"{len(labels)} defects of {k} classes, true masks, plain k-means, k given, seeds {list(seeds)}."
    return Table("Mask and crop", ("the encoder sees", "NMI", "ARI", "accuracy"), tuple(rows), note)


def _by_masking(field: Field, models: Embedded, recipe: Recipe) -> Mapping[str, NDArray[np.float32]]:
    height, width = field.mask.shape
    page = Micrograph(field.image, (0, 0, width, height), 0, None, None)
    cropped = given(field.mask, page, recipe, models)
    side = models.meta("encoder").inputs["crop"].shape[0]
    blank = np.zeros_like(cropped.soft_mask)
    whole = replace(cropped, crop=resize(field.image, (side, side)), soft_mask=blank)
    return {
        "whole image": encode(whole, models),
        "crop alone": encode(replace(cropped, soft_mask=blank), models),
        "crop, binary mask": encode(replace(cropped, soft_mask=(cropped.soft_mask >= 0.5).astype(np.float32)), models),
        "crop, soft mask": encode(cropped, models),
    }


# ---- number of classes per stage ----


def k_per_stage(
    features: NDArray[np.float32],
    labels: Sequence[str],
    stages: Sequence[str],
    *,
    seeds: Sequence[int],
    rules: Sequence[estimate_k.Rule],
) -> Table:
    """Estimate k of each stage's defects, the other stages' classes labelled (half of their samples).

    Raises:
        ConfigError: fewer than two stages, or features that are not finite.
    """
    truth, of_stage = np.array(labels), np.array(stages)
    if len(set(stages)) < 2:
        raise ConfigError(f"one stage is novel and the others are known; there is only {sorted(set(stages))}")
    rows: list[tuple[Cell, ...]] = []
    for stage in sorted(set(stages)):
        known = sorted(set(truth[of_stage != stage].tolist()))
        elsewhere = np.where(of_stage != stage, truth, "")  # the novel stage's samples are never labelled
        answers: dict[str, list[float]] = {rule: [] for rule in rules}
        for seed in seeds:
            checked = clustering.checked(features, labelled_half(elsewhere, known, seed))
            measured = estimate_k.measure(*checked, estimate_k.feasible(*checked), seed=seed)
            for rule in rules:
                answers[rule].append(float(estimate_k.decide(measured, rule).k))
        rows.append((stage, len(known), len(set(labels)), *(Spread.of(answers[rule]) for rule in rules)))
    note = f"{len(truth)} crops; seeds {list(seeds)}; k counts labelled and novel classes, defect-free not among them."
    return Table("Number of classes by stage", ("novel stage", "labelled", "true k", *rules), tuple(rows), note)


def squares(images: Sequence[Image], size_px: int) -> Iterator[Image]:
    """Images at a detector's input size."""
    for image in images:
        yield resize(image, (size_px, size_px))
