"""What each part of an intrinsic detector is worth on real images: its branch, its Gaussian, its like places alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from semwatch.defects import ScoreMap
from semwatch.line import detection
from semwatch_training.evaluation.real_baselines import Scored, Scores
from semwatch_training.evaluation.real_line import Seen
from semwatch_training.families.branch.segmentation_branch import image_score, standardise
from semwatch_training.families.intrinsic import train_intrinsic
from semwatch_training.families.intrinsic.intrinsic_detector import (
    IntrinsicDetector,
    IntrinsicGraph,
    unusualness,
)
from semwatch_training.system.progress_bars import Progress
from semwatch_training.trunks import backbone

Evidence = tuple[Tensor, Tensor, Tensor, Tensor]
PARTS: Mapping[str, Callable[[IntrinsicDetector, Evidence], Tensor]] = {
    "branch alone": lambda detector, found: detector.branch(*found),
    "Gaussian alone": lambda _, found: unusualness(found[3]),
    "like places alone": lambda _, found: standardise(found[3][:, :1])[:, 0],
}
"""Logits or standardised distances of places (1, h, w)."""


def part_scores(weights: Path, seen: Sequence[Seen], cache: Path, *, progress: Progress) -> dict[str, Scores]:
    """Scores of every image by each of ``PARTS``, at the image's own scale as the line asks the whole detector.

    Args:
        weights: detector.safetensors of the intrinsic family.
        seen: the images.
        cache: where the trunk is kept.
        progress: called after every image.

    Raises:
        ConfigError: not the weights of an intrinsic detector.
    """
    detector, _, _ = train_intrinsic.load(weights)
    graph = IntrinsicGraph(backbone.load_efficientnet(cache), detector).eval()
    found: dict[str, Scores] = {name: {} for name in PARTS}
    for done, one in enumerate(seen, start=1):
        for name, whole in _of_field(graph, one.field).items():
            found[name][one.image.name] = whole
        progress("parts of the detector", done, len(seen))
    return found


@torch.no_grad()
def _of_field(graph: IntrinsicGraph, field: NDArray[np.uint8]) -> dict[str, Scored]:
    """Ask every part; the trunk runs once over each tile."""
    tiles: dict[bytes, Evidence] = {}

    def asked(part: Callable[[IntrinsicDetector, Evidence], Tensor]) -> Callable[[NDArray[np.uint8]], ScoreMap]:
        def ask(tile: NDArray[np.uint8]) -> ScoreMap:
            tile = np.ascontiguousarray(tile)
            if tile.tobytes() not in tiles:
                tiles[tile.tobytes()] = graph.evidence(torch.from_numpy(tile[None]))
            logits = part(graph.detector, tiles[tile.tobytes()])
            raw = float(image_score(logits, graph.detector.form.branch.top_cells)[0])
            return ScoreMap(functional.softplus(logits)[0].numpy(), raw)

        return ask

    whole = {name: detection.own_scale(field, asked(part)) for name, part in PARTS.items()}
    return {name: Scored(one.raw_score, one.values) for name, one in whole.items()}
