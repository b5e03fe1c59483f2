"""The default detector: an image's own statistics and a trained branch, at the image's own scale.

One frozen convolutional trunk is run over the image as it is, whatever its size. Two things read its maps: statistics
of the image itself, which have no weights (``own_statistics``), and the segmentation branch, which is shown these
statistics beside the maps. The score of a place is a calibrated sum of the branch's logit and of the statistics, and so
is the image's: the branch knows patterns like those it was trained on, the statistics ask only what is unusual here.
How much each counts is fitted on kinds of layout that the branch was never shown (``train_intrinsic``): for places by
what is most unusual in an image, for images by what tells one image from another. Where normal images of the process
are known, the distance to their places counts in the place of the image's own statistics (``own_normals``).

Source: IC-DefectNCD's image-intrinsic detection, here without its reconstruction.
"""

from collections.abc import Sequence
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
from semwatch_training.families.intrinsic.own_normals import OwnNormals
from semwatch_training.trunks.efficientnet import STAGES, EfficientNet, field_descriptor, patch_descriptor

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
    domain_fields: int = 300
    """Normal fields that say which processes are known."""

    @property
    def domain_width(self) -> int:
        """Length of a field's description, see ``described``."""
        return 2 * sum(STAGES[stage - 1].channels for stage in self.branch.stages[1:])


class OwnEvidence(nn.Module):
    """What the branch reads of an image: the trunk's maps, and what the image's own statistics say. Frozen."""

    in_fp32 = True
    """The statistics are, in engines of a lower precision too, the trunk's maps are not; see ``publishing.export``."""

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
        self.register_buffer("calibration", torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
        """Weight of the branch's logit, weight of the statistics, offset: of a place, and of the image."""
        n, F = form.domain_fields, form.domain_width
        self.register_buffer("domain_mean", torch.zeros(F))
        self.register_buffer("domain_spread", torch.ones(F))
        self.register_buffer("domain_fields", torch.zeros(n, F))
        """What normal fields of the known processes look like, in spreads from the mean of all."""
        self.register_buffer("domain_distances", torch.full((n,), torch.inf))
        """Of each of these to the nearest of the others; infinite: every field is of a known process."""

    def domain_p(self, description: Tensor) -> Tensor:
        """Conformal p-value (B,) of fields, as described (B, F), among the normal fields of the known processes.

        The distance of a field to the nearest normal one is held against those of normal fields to the nearest other.
        """
        away = (description - cast(Tensor, self.domain_mean)) / cast(Tensor, self.domain_spread)
        known, distances = cast(Tensor, self.domain_fields), cast(Tensor, self.domain_distances)
        squared = known.square().sum(dim=1) - 2 * (away @ known.T)
        nearest = (squared.amin(dim=1) + away.square().sum(dim=1)).clamp_min(0).sqrt()
        as_far = (distances >= nearest[:, None]).to(away.dtype).sum(dim=1)
        return (as_far + 1) / (distances.shape[0] + 1)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated logits of places (B, h, w) and of the image (B,), of what ``OwnEvidence`` gives."""
        branch, unusual = self.branch(fine, middle, coarse, statistics), unusualness(statistics)
        of_place, of_image = cast(Tensor, self.calibration)
        top = [image_score(each, self.form.branch.top_cells) for each in (branch, unusual)]
        return (
            of_place[0] * branch + of_place[1] * unusual + of_place[2],
            of_image[0] * top[0] + of_image[1] * top[1] + of_image[2],
        )


def unusualness(statistics: Tensor) -> Tensor:
    """The Gaussian's distance in standard deviations of the image's own places: (B, h, w) of (B, 3, h, w)."""
    return standardise(statistics[:, 2:3])[:, 0]


def described(maps: Sequence[Tensor]) -> Tensor:
    """What a field looks like as a whole: mean and deviation of every channel of the trunk's maps, (B, F)."""
    centres = [x.mean(dim=(2, 3)) for x in maps]
    spreads = [(x - x.mean(dim=(2, 3), keepdim=True)).square().mean(dim=(2, 3)).sqrt() for x in maps]
    return torch.cat((*centres, *spreads), dim=1)


class IntrinsicGraph(nn.Module):
    """What is exported: uint8 gray of any size in, score map, raw image score and p-value of the process out."""

    in_fp32 = True
    """Calibration, scores and distances to known fields are, the branch is not."""

    def __init__(self, trunk: EfficientNet, detector: IntrinsicDetector, normals: OwnNormals | None = None) -> None:
        super().__init__()
        self.evidence, self.detector, self.normals = OwnEvidence(trunk, detector.form), detector, normals

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return score map (B, H / 8, W / 8), raw score (B,), domain p-value (B,), ``field_descriptor``, and patches.

        Of images (B, H, W) uint8, sides multiples of 16. Map and raw score are -log(1 - p) of the probability p of a
        defect, 0 or more: near 0 where all is normal, and linear in the logit where it is not.
        """
        fine, middle, coarse, statistics = self.evidence(image)
        maps = fine, middle, coarse
        description = described((middle, coarse))
        domain_p = self.detector.domain_p(description)
        if self.normals is None or not self.normals.has_places:
            logits, raw = self.detector(*maps, statistics)
        else:
            branch, calibration = self.detector.branch(*maps, statistics), cast(Tensor, self.detector.calibration)
            logits, raw = self.normals(own_statistics.places(maps), branch, calibration)
        if self.normals is not None:
            domain_p = torch.maximum(domain_p, self.normals.domain_p(description))
        of_field = field_descriptor(maps), patch_descriptor(maps)
        return functional.softplus(logits), functional.softplus(raw), domain_p, *of_field
