"""What is trained of the default detector: its branch, its calibration, and the scores for the gate."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from semwatch.defects import ScoreMap
from semwatch.errors import ConfigError
from semwatch.line import detection
from semwatch.line.scaling import resize
from semwatch_training.families.branch.branch_views import Image, Mask
from semwatch_training.families.branch.segmentation_branch import BranchForm, image_score
from semwatch_training.families.branch.train_branch import cover_of
from semwatch_training.families.intrinsic.intrinsic_detector import (
    IntrinsicDetector,
    IntrinsicForm,
    IntrinsicGraph,
    OwnEvidence,
    described,
    unusualness,
)
from semwatch_training.system import weights_file
from semwatch_training.system.progress_bars import Progress

FAMILY = "intrinsic"
UNSEEN_KINDS = ("fibres", "crossed", "stack")
"""Layouts of ``data.world`` that the branch is not trained on, so that it meets them as it meets a new process."""
N_CALIBRATION = 240
DRAWN = 300
"""Normal places of each image, and pairs of a defective and a normal one."""


def calibrate(
    detector: IntrinsicDetector,
    evidence: OwnEvidence,
    pairs: Iterable[tuple[Image, Mask]],
    n: int,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Fit how much the branch's logit and the image's own statistics count, in place.

    Images that the branch was trained on would say that it needs no help; so these are of kinds that it never saw. For
    places the two are weighed by how well they put defective places before normal ones *of the same image* (logistic
    regression of differences): a map has to say where, and what another image's places reach is no matter there. For
    the image they are weighed by a logistic regression of defective against normal images.

    Args:
        detector: its branch is trained.
        evidence: what it reads.
        pairs: images (S, S) uint8 and masks (S, S) bool, normal ones with an empty mask.
        n: how many there are.
        seed: of the places that are drawn.
        progress: called after every image.

    Raises:
        ConfigError: no image is defective, or none is normal.
    """
    rng = np.random.default_rng(seed)
    places, are_defective, differences, tops, labels, n_normal = [], [], [], [], [], []
    for index, (image, mask) in enumerate(pairs):
        with torch.no_grad():
            *maps, statistics = evidence(torch.from_numpy(image[None]))
            both = torch.stack((detector.branch(*maps, statistics), unusualness(statistics)))
            tops.append(image_score(both[:, 0], detector.form.branch.top_cells).numpy())
        cells, cover = both[:, 0].flatten(1).T.numpy(), cover_of(mask, both.shape[2:]).ravel()
        normal, defective = np.flatnonzero(cover == 0), np.flatnonzero(cover >= 0.5)
        labels.append(len(defective) > 0)
        n_normal.append(len(normal))
        drawn = np.concatenate((rng.choice(normal, DRAWN), defective))
        places.append(cells[drawn])
        are_defective.append(np.repeat((0.0, 1.0), (DRAWN, len(defective))))
        if len(defective):
            differences.append(cells[rng.choice(defective, DRAWN)] - cells[rng.choice(normal, DRAWN)])
        progress("calibration", index + 1, n)
    if len(set(labels)) < 2:
        raise ConfigError("the detector is calibrated on defective and normal images; there are none of one kind")
    of_image = logistic(np.array(tops), np.array(labels, np.float64))
    order = np.concatenate(differences)
    # Each difference once as it is and once turned round: the offset is 0.
    weights = logistic(np.concatenate((order, -order)), np.repeat((1.0, 0.0), len(order)))[:2]
    scale, offset = logistic(np.concatenate(places) @ weights[:, None], np.concatenate(are_defective))
    rarer = np.log(np.mean(n_normal) / DRAWN)  # so many normal places stand behind each that was drawn
    of_place = np.array([*(scale * weights), offset - rarer])
    cast(Tensor, detector.calibration).copy_(torch.from_numpy(np.stack((of_place, of_image))))


def logistic(cells: NDArray[np.floating], truth: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights, none negative, and offset (D + 1,) of a logistic regression of cells (n, D) on truth (n,) of 0 or 1."""

    def loss(found: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = cells @ found[:-1] + found[-1]
        excess = (expit(logits) - truth) / len(truth)
        value = float(np.mean(np.logaddexp(0, logits) - truth * logits))
        return value, np.append(cells.T @ excess, excess.sum())

    D = cells.shape[1]
    bounds = [(0.0, None)] * D + [(None, None)]
    start = np.append(np.ones(D), -3.0)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)  # type: ignore[no-untyped-call]
    return np.asarray(found.x, np.float64)


def learn_domain(graph: IntrinsicGraph, fields: Iterable[Image], *, progress: Progress) -> None:
    """Remember what normal fields (H, W) of the known processes look like, in place; ``form.domain_fields`` of them.

    Fewer are repeated, which leaves the p-values of others as they are.
    """
    detector, rows = graph.detector, []
    n = detector.form.domain_fields
    for index, image in enumerate(fields):
        tile = next(detection.tiles(detection.scaled_size(image.shape)))
        shown = resize(image, detection.scaled_size(image.shape))[tile[1] : tile[3], tile[0] : tile[2]]
        with torch.no_grad():
            _, middle, coarse = graph.evidence.trunk(
                torch.from_numpy(np.ascontiguousarray(shown)[None]), detector.form.branch.stages
            )
            rows.append(described((middle, coarse))[0])
        progress("fields of known processes", index + 1, n)
    seen = torch.stack(rows)
    mean, spread = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-6)
    away = (seen - mean) / spread
    distances = torch.cdist(away, away).fill_diagonal_(torch.inf).amin(dim=1)
    again = torch.arange(n) % len(away)
    values = {"mean": mean, "spread": spread, "fields": away[again], "distances": distances[again]}
    for name, value in values.items():
        getattr(detector, f"domain_{name}").copy_(value)


def own_scale(graph: IntrinsicGraph) -> Callable[[NDArray[np.uint8]], ScoreMap]:
    """The detector as a function of a field (H, W) gray of any size, as the line asks it."""
    device = next(graph.parameters()).device

    def ask(tile: NDArray[np.uint8]) -> ScoreMap:
        with torch.no_grad():
            values, raw, domain_p, *_ = graph(torch.from_numpy(np.ascontiguousarray(tile)[None]).to(device))
        return ScoreMap(values[0].cpu().numpy(), float(raw[0]), float(domain_p[0]))

    return lambda field: detection.own_scale(field, ask)


def normal_scores(graph: IntrinsicGraph, fields: Iterable[Image], n: int, *, progress: Progress) -> list[float]:
    """Raw scores of n normal fields (H, W) at their own scale."""
    score, scores = own_scale(graph), []
    for index, image in enumerate(fields):
        scores.append(score(image).raw_score)
        progress("held-out normal scores", index + 1, n)
    return scores


def save(
    detector: IntrinsicDetector, path: Path, *, normal_scores: list[float], provenance: dict[str, str | float | int]
) -> None:
    """Write weights as fp16 safetensors with form, held-out scores and provenance in the header."""
    header = {
        "family": FAMILY,
        "form": json.dumps(asdict(detector.form)),
        "normal_scores": json.dumps(normal_scores),
        "provenance": json.dumps(provenance),
    }
    state = {
        name: value if name.startswith("domain_") else value.half() for name, value in detector.state_dict().items()
    }
    weights_file.write(path, state, header)


def load(path: Path) -> tuple[IntrinsicDetector, list[float], dict[str, str | float | int]]:
    """Read what ``save`` wrote: detector in fp32, held-out scores, provenance.

    Raises:
        ConfigError: the file is absent, not an intrinsic detector, or one of another release.
    """
    state, header = weights_file.read(path, what="detector")
    try:
        values: dict[str, Any] = json.loads(header["form"])
        branch: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values["branch"].items()}
        detector = IntrinsicDetector(IntrinsicForm(**{**values, "branch": BranchForm(**branch)}))
        detector.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
        return detector.eval(), json.loads(header["normal_scores"]), json.loads(header["provenance"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise weights_file.not_ours(path, "detector", error) from error
