"""The default detector: an image's own statistics and a trained branch, at the image's own scale.

One frozen convolutional trunk is run over the image as it is, whatever its size. Two things read its maps: statistics of
the image itself, which have no weights (``own_statistics``), and the segmentation branch, which is shown these
statistics beside the maps. The score of a place is a calibrated sum of the branch's logit and of the statistics: the
branch knows patterns like those it was trained on, the statistics ask only what is unusual here, and how much each
counts is fitted on kinds of layout that the branch was never shown (``train_intrinsic``).

Source: IC-DefectNCD's image-intrinsic detection, here without its reconstruction.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.families.branch.segmentation_branch import (
    BranchForm,
    SegmentationBranch,
    image_score,
    standardise,
)
from semwatch_training.families.intrinsic import own_statistics
from semwatch_training.trunks.efficientnet import EfficientNet

STRIDE_PX = 8
"""Edge of a cell of the map, in pixels of the image."""


@dataclass(frozen=True, slots=True)
class IntrinsicForm:
    """What an intrinsic detector is made of; stored beside its weights."""

    branch: BranchForm = field(default_factory=lambda: BranchForm(width=64))
    """``input_px`` is the size that it is trained at; the graph takes any."""
    keys: int = 33
    """Like places are sought among so many a side; odd, so that no pattern's period is a whole number of steps."""
    fine_reach: int = 3
    coarse_reach: int = 2


class OwnEvidence(nn.Module):
    """What the branch reads of an image: the trunk's maps, and what the image's own statistics say. Frozen."""

    def __init__(self, trunk: EfficientNet, form: IntrinsicForm) -> None:
        super().__init__()
        self.trunk, self.form, self.own = trunk, form.branch, form

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Three stages' maps and three channels of statistics of uint8 gray images (B, H, W), multiples of 16."""
        fine, middle, coarse = self.trunk(image, self.form.stages)
        return fine, middle, coarse, self.matching(fine, middle, coarse)

    def matching(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Distances to the nearest like place, fine and coarse, and to the image's Gaussian: (B, 3, h, w)."""
        both = torch.cat((standardise(functional.avg_pool2d(fine, 2)), standardise(middle)), dim=1)
        form = self.own
        near = own_statistics.like_places(both, keys=form.keys, reach=form.fine_reach)
        coarse_near = own_statistics.like_places(standardise(coarse), keys=form.keys, reach=form.coarse_reach)
        upsampled = functional.interpolate(coarse_near, size=near.shape[2:], mode="bilinear", align_corners=False)
        unusual = own_statistics.mahalanobis(own_statistics.places((fine, middle, coarse)))
        return torch.cat((near, upsampled, unusual), dim=1)


class IntrinsicDetector(nn.Module):
    """The trained part: the branch, and how much branch and statistics count."""

    def __init__(self, form: IntrinsicForm) -> None:
        super().__init__()
        self.form = form
        self.branch = SegmentationBranch(form.branch)
        self.register_buffer("calibration", torch.tensor([1.0, 0.0, 0.0]))
        """Weight of the branch's logit, weight of the statistics, offset."""

    def logits(self, branch: Tensor, statistics: Tensor) -> Tensor:
        """Calibrated logits (B, h, w) of the branch's logits (B, h, w) and the statistics (B, 3, h, w)."""
        weight, own_weight, offset = cast(Tensor, self.calibration).unbind()
        return weight * branch + own_weight * unusualness(statistics) + offset


def unusualness(statistics: Tensor) -> Tensor:
    """The Gaussian's distance in standard deviations of the image's own places: (B, h, w) of (B, 3, h, w)."""
    return standardise(statistics[:, 2:3])[:, 0]


class IntrinsicGraph(nn.Module):
    """What is exported: uint8 gray of any size in, score map and raw image score out."""

    def __init__(self, trunk: EfficientNet, detector: IntrinsicDetector) -> None:
        super().__init__()
        self.evidence, self.detector = OwnEvidence(trunk, detector.form), detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return score map (B, H / 8, W / 8) and raw score (B,) of images (B, H, W), multiples of 16.

        Both are -log(1 - p) of the probability p of a defect, 0 or more: near 0 where all is normal, and linear in the
        logit where it is not. The raw score is that of ``image_score``.
        """
        fine, middle, coarse, statistics = self.evidence(image)
        logits = self.detector.logits(self.detector.branch(fine, middle, coarse, statistics), statistics)
        raw = image_score(logits, self.detector.form.branch.top_cells)
        return functional.softplus(logits), functional.softplus(raw)
