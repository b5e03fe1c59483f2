"""Segmentation branch: a small convolutional head that says, place by place, what does not belong to this image.

It reads three stages of the convolutional trunk and, for every place, how far the nearest like place of the same image
is: patterns repeat, so what has no like is suspect. Every channel is standardised over the image first. So the look of
a process cancels, and a head trained on one process can be shown another.

Source: INP-Former++ has such a head on pseudo-defects beside its reconstruction (its author in INP-Former's issue 39,
no code); matching within the image as MuSc does between images. Focal loss (Lin et al. 2017), Dice loss (Milletari et
al. 2016).
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.trunks.efficientnet import STAGES, STRIDES, EfficientNet

N_MATCHING = 3
"""Matching channels: nearest on the fine grid; nearest and softly nearest on the coarse one."""
FINE_REACH, COARSE_REACH = 3, 2
"""Neighbours up to this many cells away share most of what a cell sees, and are no proof that it is normal."""
TEMPERATURE = 0.05


@dataclass(frozen=True, slots=True)
class BranchForm:
    """What a branch is made of; stored beside its weights."""

    trunk: str = "efficientnet_lite2"
    stages: tuple[int, int, int] = (2, 3, 5)
    """Of the trunk, 1-based: one at twice the grid's resolution, one at the grid's own, one at half of it."""
    input_px: int = 448
    projection: int = 32
    width: int = 48
    dilations: tuple[int, ...] = (1, 2, 4, 1)
    dropout: float = 0.1
    top_cells: int = 3
    """The image score is half the mean logit of so many highest cells, half the highest mean of 3 x 3 cells."""

    @property
    def side(self) -> int:
        """Cells a side of the map."""
        return self.input_px // STRIDES[self.stages[1] - 1]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(channels, side, side) of the three stages' maps and of the matching channels."""
        sides = (2 * self.side, self.side, self.side // 2)
        maps = tuple((STAGES[stage - 1].channels, side, side) for stage, side in zip(self.stages, sides, strict=True))
        return *maps, (N_MATCHING, self.side, self.side)


class SegmentationBranch(nn.Module):
    """Projects what it reads to one grid, mixes, and looks around with dilated convolutions."""

    def __init__(self, form: BranchForm) -> None:
        super().__init__()
        self.form = form
        (fine, _, _), (middle, _, _), (coarse, _, _), _ = form.shapes
        P, C = form.projection, form.width
        self.fine = nn.Conv2d(fine, P, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(middle, P, 1)
        self.coarse = nn.Conv2d(coarse, P, 1)
        self.matching = nn.Conv2d(2 * N_MATCHING, P // 2, 1)
        self.drop = nn.Dropout2d(form.dropout)
        self.mix = nn.Conv2d(3 * P + P // 2, C, 1)
        self.around = nn.ModuleList(nn.Conv2d(C, C, 3, padding=d, dilation=d) for d in form.dilations)
        self.out = nn.Conv2d(C, 1, 1)
        nn.init.constant_(cast(Tensor, self.out.bias), -3.0)  # most of an image is normal

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor, matching: Tensor) -> Tensor:
        """Logits (B, side, side) from what ``evidence`` gives."""
        distance = matching.clamp_min(1e-3).log()
        far = torch.cat((distance, distance - distance.mean(dim=(2, 3), keepdim=True)), dim=1)
        upsampled = functional.interpolate(
            self.coarse(standardise(coarse)), size=matching.shape[2:], mode="bilinear", align_corners=False
        )
        read = (self.fine(standardise(fine)), self.middle(standardise(middle)), upsampled, self.matching(far))
        x = self.mix(self.drop(functional.gelu(torch.cat(read, dim=1))))
        for convolution in self.around:
            x = x + functional.gelu(convolution(functional.gelu(x)))
        return cast(Tensor, self.out(functional.gelu(x)))[:, 0]


class Evidence(nn.Module):
    """What a branch reads of an image: frozen, so it can be cached."""

    def __init__(self, trunk: EfficientNet, form: BranchForm) -> None:
        super().__init__()
        self.trunk, self.form = trunk, form
        self.register_buffer("near_fine", near_pairs(form.side, FINE_REACH), persistent=False)
        self.register_buffer("near_coarse", near_pairs(form.side // 2, COARSE_REACH), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Three stages' maps and matching channels, of ``BranchForm.shapes``, of uint8 gray images (B, S, S)."""
        fine, middle, coarse = self.trunk(image, self.form.stages)
        return fine, middle, coarse, self.matching(fine, middle, coarse)

    def matching(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        """Matching channels of three stages' maps."""
        both = torch.cat((standardise(functional.avg_pool2d(fine, 2)), standardise(middle)), dim=1)
        near = self_matching(both, cast(Tensor, self.near_fine))
        soft = self_matching(standardise(coarse), cast(Tensor, self.near_coarse), temperature=TEMPERATURE)
        upsampled = functional.interpolate(soft, size=near.shape[2:], mode="bilinear", align_corners=False)
        return torch.cat((near, upsampled), dim=1)


def standardise(x: Tensor) -> Tensor:
    """Zero mean and unit variance of every channel over its image, (B, C, h, w); a constant channel becomes zero."""
    centred = x - x.mean(dim=(2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-4).sqrt()


def near_pairs(side: int, reach: int) -> Tensor:
    """Which two cells of a grid are at most ``reach`` apart along both axes: (side², side²) bool."""
    axis = torch.arange(side)
    near = (axis[:, None] - axis[None, :]).abs() <= reach
    return (near[:, None, :, None] & near[None, :, None, :]).reshape(side * side, side * side)


def self_matching(x: Tensor, near: Tensor, *, temperature: float | None = None) -> Tensor:
    """Mean squared difference of each cell to its nearest like in the same image: (B, 1 or 2, side, side).

    Args:
        x: (B, C, side, side), standardised.
        near: (side², side²), pairs that do not count.
        temperature: also give the soft minimum, which is small only where there are many likes.
    """
    B, C, side, _ = x.shape
    cells = x.flatten(2).transpose(1, 2).contiguous()
    square = cells.square().sum(dim=2)
    # |b|^2 - 2ab: what |a - b|^2 is without |a|^2, which no minimum over b needs.
    d = torch.baddbmm(square[:, None, :], cells, cells.transpose(1, 2), alpha=-2).masked_fill(near, 1e5)
    nearest = ((d.amin(dim=2) + square) / C).clamp_min(0)
    if temperature is None:
        return nearest.reshape(B, 1, side, side)
    log_mean = (d / (-temperature * C)).logsumexp(dim=2) - torch.tensor(float(side * side)).log()
    soft = square / C - temperature * log_mean
    return torch.stack((nearest, soft), dim=1).reshape(B, 2, side, side)


def branch_loss(logits: Tensor, cover: Tensor, *, top_cells: int = 3) -> Tensor:
    """Focal plus Dice loss of the cells, plus cross-entropy of the image by its highest cells.

    Args:
        logits: (B, side, side).
        cover: (B, side, side), share of each cell that is defective; half a cell counts as a whole one.
        top_cells: see ``BranchForm``.
    """
    truth = (2 * cover).clamp(0, 1)
    p = logits.sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    # Normalised by the defective cells, as in Lin et al.; the constant keeps a batch of normal images finite.
    focal = (entropy * (p - truth).square()).sum() / (truth.sum() + 50)
    dice = 1 - (2 * (p * truth).sum(dim=(1, 2)) + 1) / ((p + truth).sum(dim=(1, 2)) + 1)
    highest = logits.flatten(1).topk(top_cells, dim=1).values.mean(dim=1)
    image = functional.binary_cross_entropy_with_logits(highest, (truth.amax(dim=(1, 2)) > 0).float())
    return focal + 0.5 * dice.mean() + 0.3 * image


def image_score(logits: Tensor, top_cells: int) -> Tensor:
    """One logit per image (B,) of logits (B, side, side): see ``BranchForm.top_cells``."""
    padded = functional.pad(logits[:, None], (1, 1, 1, 1), mode="replicate")
    smooth = functional.avg_pool2d(padded, 3, stride=1)
    return 0.5 * logits.flatten(1).topk(top_cells, dim=1).values.mean(dim=1) + 0.5 * smooth.flatten(1).amax(dim=1)
