"""The default detector for a process of one's own: its normal images are looked at once, nothing is trained."""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semwatch.line import detection
from semwatch.line.scaling import resize
from semwatch_training.data.pseudo_defects import MIN_SIDE_PX, plant
from semwatch_training.families.branch.branch_views import Image
from semwatch_training.families.branch.segmentation_branch import image_score
from semwatch_training.families.intrinsic import own_normals, own_statistics
from semwatch_training.families.intrinsic.intrinsic_detector import (
    IntrinsicDetector,
    IntrinsicGraph,
    described,
    unusualness,
)
from semwatch_training.families.intrinsic.own_normals import FEWEST, OwnNormals, Seen
from semwatch_training.metrics.detection_metrics import image_auroc
from semwatch_training.system.progress_bars import Progress

Kind = Literal["own", "view", "planted"]

KEPT = 150
"""Normal images whose places are kept at once: 1 GB where they are of 1024 px."""
FIELD_ROWS = 300
"""Descriptions of normal fields, crops and magnifications of them among these."""
MOST_CUTS = 12
CUT_PX = (128, 256)
"""Sides of crops that are described beside the whole field: users crop what they show."""
MAGNIFIED = (0.7, 1.4)
ZOOMS = (1.0, 0.85, 1.2, 0.7, 1.4)
"""Of views for the gate, in this order; each is turned four ways."""


N_PLANTED = 40
"""Normal images with a planted defect, which say whether the places of the normals help."""
MAY_LOSE = 0.1
"""Of image AUROC on planted defects: the branch was trained on their like and the kept places were not, and of 40
images it is known to a twentieth. On printed lines places lost .05 of planted defects and found more real ones."""


class NormalsSeen(NamedTuple):
    """Normal fields as trunk and branch see them: the slow part, done once."""

    seen: list[Seen]
    """Of the images that are judged, see ``KEPT``."""
    descriptions: NDArray[np.float32]
    """(m, F) of all fields, crops and magnifications of them."""
    image: NDArray[np.intp]
    """(m,) number of the image that each describes."""


class Adapted(NamedTuple):
    """A detector that knows normal images."""

    graph: IntrinsicGraph
    judged: tuple[int, ...]
    """Numbers of the normal images that were judged, each by the others."""
    scores: NDArray[np.float64]
    """Their raw scores."""
    view_scores: NDArray[np.float64]
    """Raw scores of views of them beside these, judged in the same way; none where there are images enough."""
    auroc: tuple[float, float]
    """Of planted defects against the normals: without their places and with them; NaN where there is none."""


def look(
    graph: IntrinsicGraph, fields: Sequence[Image], *, n_scores: int, seed: int, progress: Progress
) -> NormalsSeen:
    """Look at n >= 1 normal fields (H, W) of a process, of any sizes.

    Args:
        graph: the detector, without normals of its own.
        fields: the images.
        n_scores: how many normal scores the gate wants; where there are fewer images, views of them make up for it.
        seed: of crops and planted defects.
        progress: called after every image.
    """
    n, rng = len(fields), np.random.default_rng(seed)
    shown = sorted(rng.permutation(n)[:KEPT].tolist())
    n_views = max(0, -(-n_scores // n) - 1)
    seen: list[Seen] = []
    descriptions: list[NDArray[np.float32]] = []
    image_of: list[int] = []
    for index, field in enumerate(fields):
        if index in shown:
            is_planted = shown.index(index) < N_PLANTED
            seen += _all_seen(graph, field, index, n_views=n_views, is_planted=is_planted, rng=rng)
        for cut in [field, *_cuts(field, _n_cuts(n), rng)]:
            descriptions.append(_description(graph, cut))
            image_of.append(index)
        progress("normal images", index + 1, n)
    return NormalsSeen(seen, np.stack(descriptions), np.array(image_of, np.intp))


def adapted(graph: IntrinsicGraph, normals: NormalsSeen, *, without: Collection[int] = ()) -> Adapted:
    """Let a detector know normal images; the given one stays as it is.

    How far places lie from theirs counts where planted defects say that it does no harm, see ``MAY_LOSE``.

    Args:
        graph: the detector, without normals of its own.
        normals: see ``look``.
        without: numbers of images to leave out; not all.
    """
    seen = [one for one in normals.seen if one.image not in without]
    numbers = tuple(sorted({one.image for one in seen}))
    kept = ~np.isin(normals.image, list(without))
    calibration = cast(Tensor, graph.detector.calibration).numpy().astype(np.float64)
    own = OwnNormals(
        seen[0].places.shape[-1],
        int(kept.sum()),
        graph.detector.form.domain_width,
        top_cells=graph.detector.form.branch.top_cells,
        has_places=len(numbers) >= FEWEST,
    )
    own_normals.fit_fields(normals.descriptions[kept], normals.image[kept], into=own)
    logits = np.array([one.raw_logit for one in seen])
    auroc = float("nan"), float("nan")
    if own.has_places:
        fitted = own_normals.fit(seen, calibration, into=own)
        auroc = _auroc(seen, logits), _auroc(seen, fitted)
        own.has_places = not auroc[1] < auroc[0] - MAY_LOSE
        logits = fitted if own.has_places else logits
    scores = np.logaddexp(0, logits)
    of_image = [max(_of(seen, scores, "own", number)) for number in numbers]
    made = IntrinsicGraph(graph.evidence.trunk, graph.detector, own).eval()
    return Adapted(made, numbers, np.array(of_image), np.array(_of(seen, scores, "view")), auroc)


def _all_seen(
    graph: IntrinsicGraph, field: Image, index: int, *, n_views: int, is_planted: bool, rng: np.random.Generator
) -> list[Seen]:
    """A normal image itself, its views, and it with a planted defect."""
    shown: list[tuple[Image, Kind]] = [(field, "own"), *((view, "view") for view in _views(field, n_views))]
    if is_planted and min(field.shape) >= MIN_SIDE_PX:
        shown.append((plant(np.ascontiguousarray(field), rng).pixels, "planted"))
    return [_seen(graph, tile, index, kind) for view, kind in shown for tile in _tiles(view)]


def _of(seen: Sequence[Seen], values: NDArray[np.float64], kind: Kind, image: int | None = None) -> list[float]:
    return [
        float(value) for one, value in zip(seen, values, strict=True) if one.kind == kind and image in (None, one.image)
    ]


def _auroc(seen: Sequence[Seen], values: NDArray[np.float64]) -> float:
    own, planted = _of(seen, values, "own"), _of(seen, values, "planted")
    if not planted:
        return float("nan")
    return image_auroc(np.array([*own, *planted]), np.repeat((False, True), (len(own), len(planted))))


def _seen(graph: IntrinsicGraph, tile: Image, image: int, kind: Kind) -> Seen:
    detector: IntrinsicDetector = graph.detector
    with torch.no_grad():
        fine, middle, coarse, statistics = graph.evidence(torch.from_numpy(np.ascontiguousarray(tile)[None]))
        branch = detector.branch(fine, middle, coarse, statistics)
        places = own_statistics.places((fine, middle, coarse))[0].permute(1, 2, 0)
        of_image = cast(Tensor, detector.calibration)[1]
        tops = [image_score(each, detector.form.branch.top_cells) for each in (branch, unusualness(statistics))]
        raw = float(of_image[0] * tops[0] + of_image[1] * tops[1] + of_image[2])
    return Seen(image, places.numpy().astype(np.float16), branch[0].numpy(), kind, raw)


def _description(graph: IntrinsicGraph, field: Image) -> NDArray[np.float32]:
    """Of the first tile of a field, as the graph describes it."""
    tile = next(_tiles(field))
    with torch.no_grad():
        image = torch.from_numpy(np.ascontiguousarray(tile)[None])
        _, middle, coarse = graph.evidence.trunk(image, graph.detector.form.branch.stages)
        return np.asarray(described((middle, coarse))[0].numpy(), np.float32)


def _tiles(field: Image) -> Iterator[Image]:
    """A field as the line shows it to the detector."""
    image = resize(field, detection.scaled_size(field.shape))
    for x0, y0, x1, y1 in detection.tiles(image.shape):
        yield image[y0:y1, x0:x1]


def _views(field: Image, n: int) -> Iterator[Image]:
    """N views of a field: turned over, and at other magnifications."""
    made = ((zoom, turn) for zoom in ZOOMS for turn in range(4))
    next(made)  # the field itself
    for zoom, turn in list(made)[:n]:
        flipped = field[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1]
        size = max(32, round(field.shape[0] * zoom)), max(32, round(field.shape[1] * zoom))
        yield resize(np.ascontiguousarray(flipped), size)


def _n_cuts(n_images: int) -> int:
    return min(MOST_CUTS, max(1, FIELD_ROWS // n_images - 1))


def _cuts(field: Image, n: int, rng: np.random.Generator) -> Iterator[Image]:
    """N crops and magnifications of a field, in turn."""
    for k in range(n):
        shorter = min(field.shape)
        if k % 2 or shorter < CUT_PX[0]:
            zoom = float(np.exp(rng.uniform(*np.log(MAGNIFIED))))
            size = max(32, round(field.shape[0] * zoom)), max(32, round(field.shape[1] * zoom))
            yield np.asarray(cv2.resize(field, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)
            continue
        side = int(rng.integers(CUT_PX[0], min(CUT_PX[1], shorter) + 1))
        y, x = int(rng.integers(field.shape[0] - side + 1)), int(rng.integers(field.shape[1] - side + 1))
        yield field[y : y + side, x : x + side]
