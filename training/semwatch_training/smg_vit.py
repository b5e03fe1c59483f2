"""SMG-ViT: a trunk whose last j layers look where the soft mask points, and the features made of it.

Two kinds of feature leave it side by side, because they serve different masters:

- *pooled*: patch tokens of frozen middle layers averaged under the soft mask. The unknown rule reads these; no later
  fine-tuning moves them. On the default trunk they separate defect types far better than the class token does.
- *class token* of the soft-mask guided last layer, the paper's feature.

Source: IC-DefectNCD section 3.4.1; AnomalyNCD (the parent) masks hard and only the class token's row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.ni_detector import normalise
from semwatch_training.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer


@dataclass(frozen=True, slots=True)
class EncoderForm:
    """What an encoder is made of; stored beside its weights.

    ``attention="literal"`` is the paper's softmax(Q K^T + m) V without 1/sqrt(d) and without a scale on m;
    ``"scaled"`` keeps 1/sqrt(d) and learns one scale per layer and head, started at ``initial_scale``: as printed, m in
    [0, 1] multiplies attention by at most e.
    """

    trunk: str = "dinov2_vits14"
    input_px: int = 224
    pooled_layers: tuple[int, ...] = (3, 5, 7)
    guided_layers: int = 3
    attention: Literal["scaled", "literal"] = "scaled"
    initial_scale: float = 1.0


class SmgVit(nn.Module):
    """Soft-mask guided ViT."""

    def __init__(self, trunk: VisionTransformer, form: EncoderForm) -> None:
        super().__init__()
        if max(form.pooled_layers) >= trunk.shape.depth - form.guided_layers:
            raise ValueError("pooled layers must lie before the guided ones: fine-tuning would move frozen features")
        self.trunk, self.form = trunk, form
        self.scale = nn.Parameter(torch.full((form.guided_layers, trunk.shape.heads), form.initial_scale))

    def forward(self, images: Tensor, soft_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised crops (B, 3, S, S) under soft masks (B, t, t) in [0, 1].

        Returns:
            Pooled tokens (B, layers * C), each layer's part of unit length, and the class token (B, C), unit length.
        """
        trunk = self.trunk
        x = trunk.embed(images)
        side = images.shape[-1] // trunk.shape.patch
        rope = trunk.rope((side, side))
        first_guided = trunk.shape.depth - self.form.guided_layers
        pooled = []
        for index, block in enumerate(trunk.blocks):
            if index < first_guided:
                x = block(x, rope)
            else:
                x = block(x, rope, *self._guidance(soft_mask, index - first_guided))
            if index in self.form.pooled_layers:
                pooled.append(pool(x[:, trunk.n_prefix :], soft_mask))
        class_token = functional.normalize(trunk.norm(x[:, 0]), dim=-1)
        return torch.cat(pooled, dim=-1), class_token

    def _guidance(self, soft_mask: Tensor, guided_index: int) -> tuple[Tensor, float | None]:
        """The key bias (B, heads, 1, T) and logit scale of one guided layer.

        m = [max M; registers 0; M]: the class token carries the whole-image score (the paper), registers none.
        """
        flat = soft_mask.flatten(1)
        registers = flat.new_zeros(flat.shape[0], self.trunk.shape.n_registers)
        m = torch.cat((flat.amax(dim=1, keepdim=True), registers, flat), dim=1)[:, None, None, :]
        if self.form.attention == "literal":
            return m.expand(-1, self.trunk.shape.heads, -1, -1), 1.0
        return m * self.scale[guided_index].view(1, -1, 1, 1), None


def pool(tokens: Tensor, soft_mask: Tensor) -> Tensor:
    """Average layer-normed patch tokens (B, N, C) under the soft mask (B, t, t): (B, C) of unit length.

    An all-zero mask weighs every token alike.
    """
    tokens = functional.layer_norm(tokens, tokens.shape[-1:])
    weights = soft_mask.flatten(1) + 1e-6
    weights = weights / weights.sum(dim=1, keepdim=True)
    return functional.normalize((weights.unsqueeze(-1) * tokens).sum(dim=1), dim=-1)


class EncoderGraph(nn.Module):
    """What is exported: crop, soft mask and size in, one feature vector out, normalisation inside.

    The vector is ``[pooled | size | class token]``: the first two are frozen, see ``frozen_width``.
    """

    def __init__(self, vit: SmgVit) -> None:
        super().__init__()
        self.vit = vit
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    @property
    def frozen_width(self) -> int:
        """Length of the part that no fine-tuning moves: pooled tokens and size."""
        return len(self.vit.form.pooled_layers) * self.vit.trunk.shape.width + 2

    def forward(self, crop: Tensor, soft_mask: Tensor, size: Tensor) -> Tensor:
        """Encode defects.

        Args:
            crop: (B, S, S) uint8 gray.
            soft_mask: (B, t, t) float32 in [0, 1] at the token grid.
            size: (B, 2) float32, log2 of window side and of root mask area, each over the field's short side. A crop
                hides how large its defect was; this says it.
        """
        pooled, class_token = self.vit(normalise(crop, self.mean, self.std), soft_mask)
        # / 16: brings log2 sizes (0 to about -10) to the scale of the unit-length parts.
        return torch.cat((pooled, size / 16, class_token), dim=-1)
