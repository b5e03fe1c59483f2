"""The soft-mask guided encoder, with pooled regions of its trunks' maps behind its features.

The features before the regions are those of ``smg_vit``, number for number, so that p-values, discovery and the plain
head read what they always read.
"""

import torch
from torch import Tensor, nn

from semwatch_training.families.recame.network import Regions, region_pool
from semwatch_training.families.smg_vit.smg_vit import EncoderGraph
from semwatch_training.trunks.efficientnet import STAGES

SIDE = 2
"""Regions a side."""


class RegionalEncoder(nn.Module):
    """An encoder's features, then averages and maxima of its second trunk's last map in ``side`` x ``side`` regions.

    Without a second trunk the regions are of the ViT's last pooled layer.
    """

    def __init__(self, encoder: EncoderGraph, side: int = SIDE) -> None:
        super().__init__()
        self.encoder, self.side = encoder, side

    @property
    def regions(self) -> Regions:
        """What the regions are of."""
        form = self.encoder.vit.form
        trunk = self.encoder.vit.trunk.shape.width
        return Regions(STAGES[form.second_stages[-1] - 1].channels if form.second_trunk else trunk, self.side)

    @property
    def width(self) -> int:
        """Length of the whole vector."""
        return self.encoder.width + self.regions.width

    def forward(
        self,
        crop: Tensor,
        soft_mask: Tensor,
        size: Tensor,
        field_features: Tensor | None = None,
        region_features: Tensor | None = None,
    ) -> Tensor:
        """Encode defects, see ``EncoderGraph.forward``: (B, ``width``)."""
        features, last_map = self.encoder.with_map(crop, soft_mask, size, field_features, region_features)
        return torch.cat((features, *(part.flatten(1) for part in region_pool(last_map, self.side))), dim=-1)
