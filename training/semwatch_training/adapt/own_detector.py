"""The detector for a user's normal images, and which of them look defective."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.line import pipeline
from semwatch.models import model_repository
from semwatch.models.model_repository import Meta
from semwatch.settings.recipe import Recipe
from semwatch.system import files
from semwatch_training.families.intrinsic import adapt_intrinsic, export, train_intrinsic
from semwatch_training.families.intrinsic.adapt_intrinsic import Adapted
from semwatch_training.families.intrinsic.intrinsic_detector import IntrinsicGraph
from semwatch_training.families.intrinsic.train_intrinsic import FAMILY
from semwatch_training.publishing.export import publish
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks import backbone

SUSPECT = 4.0
"""Spreads above the middle of the normal images at which one is suspected; spreads are of the lower side, which defects
among them leave alone as long as they are fewer than half."""
LOWER = (0.05, 0.3)
FEWEST_TO_SUSPECT = 8
ROUNDS = 3


@dataclass(frozen=True, slots=True, eq=False)
class BaseDetector:
    """The detector in service, as what knows a process is made of it."""

    graph: IntrinsicGraph
    """Without normals of its own."""
    made_from: str
    """Hash of its weights."""
    files: Mapping[str, Path]
    """What lies beside it and goes beside what is made of it."""


@dataclass(frozen=True, slots=True, eq=False)
class OwnDetector:
    """A detector that knows the process."""

    adapted: Adapted
    suspects: tuple[int, ...]
    """Numbers of normal images that look defective, the worst first; it does not know them."""
    suspect_scores: tuple[float, ...]
    """What the first look gave them."""


def base_detector(repository: Path, version: int, weights: Path, cache: Path) -> BaseDetector:
    """The detector in service in torch.

    Args:
        repository: where it serves from; its trunk lies beside it.
        version: which.
        weights: those that it was made of.
        cache: where the trunk of a detector that was built by an earlier release is kept.

    Raises:
        ConfigError: it is of another family, was made of other weights, or its trunk is damaged.
    """
    meta = model_repository.read_meta(repository, "detector", version)
    if (family := meta.provenance.get("family")) != FAMILY:
        raise ConfigError(
            f"detector {version} is of the family {family}, which takes no normal images of yours; build the default "
            f"one with `semwatch-train build --repository {repository}` first"
        )
    detector, _, _ = train_intrinsic.load(weights)
    made_from = files.file_sha256(weights)
    if meta.provenance.get("made_from", made_from) != made_from:
        raise ConfigError(
            f"detector {version} in {repository} was made of other weights than {weights}; name theirs with --weights, "
            f"or build the repository again"
        )
    trunk = repository / "detector" / str(version) / export.TRUNK
    if not trunk.is_file():
        trunk = backbone.ensure_efficientnet(cache)
    graph = IntrinsicGraph(backbone.read_efficientnet(trunk), detector).eval()
    return BaseDetector(graph, made_from, {export.TRUNK: trunk})


def own_detector(
    graph: IntrinsicGraph, fields: Sequence[NDArray[np.uint8]], *, n_scores: int, seed: int, progress: Progress
) -> OwnDetector:
    """Let the detector know normal fields, but for those that look defective beside the others."""
    seen = adapt_intrinsic.look(graph, fields, n_scores=n_scores, seed=seed, progress=progress)
    first = adapt_intrinsic.adapted(graph, seen)
    found, made = list[int](), first
    for _ in range(ROUNDS):
        more = [made.judged[k] for k in suspects(made.scores)]
        if not more:
            break
        found += more
        made = adapt_intrinsic.adapted(graph, seen, without=found)
    score_of = dict(zip(first.judged, first.scores.tolist(), strict=True))
    ordered = sorted(found, key=lambda number: -score_of[number])
    return OwnDetector(made, tuple(ordered), tuple(score_of[number] for number in ordered))


def suspects(scores: NDArray[np.float64]) -> list[int]:
    """Rows of raw scores (n,) that lie far above the others; none where these are few.

    >>> suspects(np.array([1.0, 1.2, 0.9, 1.1, 1.3, 0.8, 1.0, 1.2, 1.1, 9.0]))
    [9]
    """
    if len(scores) < FEWEST_TO_SUSPECT:
        return []
    logits = np.log(np.expm1(np.maximum(scores, 1e-6)))  # raw scores are softplus: their logits lie evenly
    low, middle = np.quantile(logits, LOWER)
    spread = max(float(middle - low), 0.05 * abs(float(middle)) + 1e-3)
    return np.flatnonzero(logits > middle + SUSPECT * spread).tolist()


def n_scores_for(recipes: Sequence[Recipe]) -> int:
    """Normal scores that the gates of all recipes want."""
    return max(math.ceil(1 / recipe.gate.false_alarm_rate - 1 - 1e-9) for recipe in recipes)


def publish_own(
    made: OwnDetector, repository: Path, recipes: Sequence[Recipe], *, base: BaseDetector, based_on: int, n_normals: int
) -> int:
    """Publish the detector; returns its version.

    Raises:
        ConfigError: a recipe's gate would have no threshold.
        PublishError: the export differs, or the disk refused.
    """
    scores = [*made.adapted.scores.tolist(), *made.adapted.view_scores.tolist()]
    provenance: dict[str, str | float | int] = {
        "made_from": base.made_from,
        "adapted_from": based_on,
        "normals": f"{n_normals} own images, {len(made.suspects)} of them left out as suspects",
        "places": int(made.adapted.graph.normals is not None and made.adapted.graph.normals.has_places),
    }
    exported = export.exported(made.adapted.graph, normal_scores=scores, provenance=provenance, files=base.files)
    for recipe in recipes:
        pipeline.threshold_of(recipe, exported.meta)
    return publish(exported, repository)


def copy_version(source: Path, target: Path, model: str, version: int) -> int:
    """Publish a version of one repository in another, as it is."""
    folder = source / model / str(version)
    meta: Meta = model_repository.read_meta(source, model, version)
    beside = {
        path.name: path
        for path in folder.iterdir()
        if path.name not in (model_repository.WEIGHTS, model_repository.META)
    }
    return model_repository.publish(target, meta, folder / model_repository.WEIGHTS, beside=beside)
