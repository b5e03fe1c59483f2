"""The detectors that tables compare: the shipped one, the training-free ones, and their gates."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from semwatch.line import binarization
from semwatch_training.data import datasets
from semwatch_training.data.datasets import Sample
from semwatch_training.data.public_sets import mtd_tiles
from semwatch_training.evaluation.evaluate_detection import Engine
from semwatch_training.families.exported import family_of
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicGraph
from semwatch_training.families.memory import fit_memory
from semwatch_training.families.memory.memory_detector import (
    CORESET,
    MemoryForm,
    MemoryGraph,
    SelfMatchingGraph,
    Trunks,
)
from semwatch_training.families.ni import export as ni_export
from semwatch_training.families.ni import train_detector
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks import backbone


def trunks(cache: Path) -> Trunks:
    """Both frozen trunks, fetched below ``cache`` if they are not there."""
    return Trunks(backbone.load(cache), backbone.load_efficientnet(cache))


def support_set_free(trunks: Trunks, weights: Path, *, false_alarm_rate: float) -> dict[str, Engine]:
    """Engines that see nothing but the image they judge; ``weights`` is the folder with detector.safetensors."""
    form = MemoryForm()
    return {
        "shipped": of_weights(weights / "detector.safetensors", trunks, false_alarm_rate=false_alarm_rate),
        "self-matching": Engine((SelfMatchingGraph(trunks, form).eval(),), form.input_px, "none"),
    }


def of_weights(path: Path, trunks: Trunks, *, false_alarm_rate: float) -> Engine:
    """The detector of a weights file, of this release's family or of the one before."""
    if family_of(path, otherwise=ni_export.FAMILY) == train_intrinsic.FAMILY:
        own, scores, _ = train_intrinsic.load(path)
        return Engine(
            (IntrinsicGraph(trunks.efficientnet, own).eval(),), None, "none", _thresholds([scores], false_alarm_rate)
        )
    detector, scores, _ = train_detector.load(path)
    graph = train_detector.with_trunk(trunks.vit, detector, trunks.efficientnet)
    return Engine((graph,), detector.form.input_px, "none", _thresholds([scores], false_alarm_rate))


def with_normals(
    trunks: Trunks,
    normals: Sequence[Sample],
    data_set: str,
    seeds: Sequence[int],
    *,
    false_alarm_rate: float,
    progress: Progress,
) -> dict[str, Engine]:
    """The memory of a data set's normal training images, and a coreset of their patches as baseline, with every seed.

    Nothing where it has none. Source of the baseline: PatchCore (Roth et al. 2022), on both trunks.
    """
    if not normals:
        return {}
    images = [datasets.load_gray(sample) for sample in normals]
    groups = mtd_tiles(normals).tolist() if data_set == "MTD" else None
    patches = fit_memory.look(images, trunks, MemoryForm(), groups=groups, progress=progress)
    engines: dict[str, Engine] = {}
    for name, form in (("memory", MemoryForm()), ("nearest patch", CORESET)):
        memories = [fit_memory.remember(patches, form, seed=seed, progress=progress) for seed in seeds]
        graphs = tuple(MemoryGraph(trunks, memory).eval() for memory in memories)
        thresholds = _thresholds([memory.normal_scores for memory in memories], false_alarm_rate)
        engines[name] = Engine(graphs, form.input_px, str(len(images)), thresholds)
    return engines


def _thresholds(scores: Sequence[Sequence[float]], rate: float) -> tuple[float, ...]:
    """The gates' conformal thresholds, or none where too few normal scores are known for the rate."""
    found = [binarization.conformal_threshold(np.array(s), false_alarm_rate=rate) for s in scores if len(s)]
    return tuple(found) if len(found) == len(scores) and np.isfinite(found).all() else ()
