"""SMG-ViT: a trunk whose last j layers look where the soft mask points, and the features made of it.

Three kinds of feature leave it side by side, because they serve different masters:

- *pooled*: patch tokens of frozen middle layers averaged under the soft mask, and if asked feature maps of a small
  convolutional trunk beside them. The unknown rule reads these; no later fine-tuning moves them. On the default trunk
  they separate defect types far better than the class token does.
- *field*: what the detector says of the whole field and of the defect's places in it, since a crop hides much of what a
  defect is: rough edges are rough in all lines, a cross section is one everywhere.
- *class token* of the soft-mask guided last layer, the paper's feature.

Source: IC-DefectNCD section 3.4.1; AnomalyNCD (the parent) masks hard and only the class token's row.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.trunks.efficientnet import FIELD_WIDTH, PATCH_WIDTH, STAGES, STRIDES, EfficientNet
from semwatch_training.trunks.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, normalise

MIN_DIFFERENCE = 1.0


@dataclass(frozen=True, slots=True)
class EncoderForm:
    """What an encoder is made of; stored beside its weights.

    ``attention="literal"`` is the paper's softmax(Q K^T + m) V without 1/sqrt(d) and without a scale on m;
    ``"scaled"`` keeps 1/sqrt(d) and learns one scale per layer and head, started at ``initial_scale``: as printed, m in
    [0, 1] multiplies attention by at most e.

    ``second_trunk`` adds pooled feature maps of an EfficientNet-Lite2: of its ``second_stages``, 1-based, averaged over
    ``second_turns`` right-angle turns of the crop, since how a defect lies is chance. ``second_surroundings`` adds how
    the defect differs from what lies around it, see ``pool_difference``. All three say nothing without a second trunk.

    ``spread`` adds how much the pooled layers' tokens differ within the crop, see ``spread``. With ``field`` the
    encoder asks what the detector says of the field and of the defect's places, see ``field_descriptor``. Without
    ``guided_layers`` there is no class token, and layers after the last pooled one are not run.
    """

    trunk: str = "dinov2_vits14"
    input_px: int = 224
    pooled_layers: tuple[int, ...] = (7,)
    guided_layers: int = 3
    attention: Literal["scaled", "literal"] = "scaled"
    initial_scale: float = 1.0
    second_trunk: Literal["", "efficientnet_lite2"] = "efficientnet_lite2"
    second_stages: tuple[int, ...] = (5,)
    second_turns: Literal[1, 2, 4] = 4
    second_surroundings: bool = True
    spread: bool = False
    field: bool = True

    def __post_init__(self) -> None:
        if self.second_trunk and self.input_px % STRIDES[-1]:
            raise ValueError(f"input_px is {self.input_px}; the second trunk wants a multiple of {STRIDES[-1]}")
        if not set(self.second_stages) <= set(range(1, len(STAGES) + 1)):
            raise ValueError(f"second_stages are {self.second_stages}; the second trunk has 1 to {len(STAGES)}")


class GuidedLayers(nn.Module):
    """The last j layers under soft-mask guidance, and the final norm: tokens in, class token out.

    They are copies: training them moves neither the trunk, which a detector may share, nor the pooled features.
    """

    def __init__(self, trunk: VisionTransformer, form: EncoderForm) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            copy.deepcopy(block) for block in trunk.blocks[trunk.shape.depth - form.guided_layers :]
        )
        self.norm = copy.deepcopy(trunk.norm)
        self.rope_embed = copy.deepcopy(trunk.rope_embed) if trunk.shape.position_grid == 0 else None
        self.scale = nn.Parameter(torch.full((form.guided_layers, trunk.shape.heads), form.initial_scale))
        self.n_registers, self.is_literal = trunk.shape.n_registers, form.attention == "literal"

    def forward(self, tokens: Tensor, soft_mask: Tensor) -> Tensor:
        """Class token (B, C), unit length, of tokens (B, T, C) under soft masks (B, t, t) in [0, 1]."""
        rope = self.rope_embed(tuple(soft_mask.shape[1:])) if self.rope_embed is not None else None
        m = self._bias(soft_mask)
        for block, scale in zip(self.blocks, self.scale, strict=True):
            if self.is_literal:
                tokens = block(tokens, rope, m.expand(-1, len(scale), -1, -1), 1.0)
            else:
                tokens = block(tokens, rope, m * scale.view(1, -1, 1, 1), None)
        return functional.normalize(self.norm(tokens[:, 0]), dim=-1)

    def _bias(self, soft_mask: Tensor) -> Tensor:
        """m (B, 1, 1, T) = [max M; registers 0; M]: the class token carries the whole-image score (the paper)."""
        flat = soft_mask.flatten(1)
        registers = flat.new_zeros(flat.shape[0], self.n_registers)
        return torch.cat((flat.amax(dim=1, keepdim=True), registers, flat), dim=1)[:, None, None, :]


class SmgVit(nn.Module):
    """Soft-mask guided ViT: the frozen layers of a trunk, and guided copies of its last ones."""

    def __init__(self, trunk: VisionTransformer, form: EncoderForm) -> None:
        super().__init__()
        self.n_frozen = trunk.shape.depth - form.guided_layers if form.guided_layers else max(form.pooled_layers) + 1
        if max(form.pooled_layers) >= self.n_frozen:
            raise ValueError("pooled layers must lie before the guided ones: fine-tuning would move frozen features")
        self.trunk, self.form = trunk, form
        self.guided = GuidedLayers(trunk, form)

    def forward(self, images: Tensor, soft_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised crops (B, 3, S, S) under soft masks (B, t, t) in [0, 1].

        Returns:
            Pooled tokens (B, layers * C), each layer's part of unit length, after them spreads alike if the form asks
            for them, and the class token (B, C), unit length, or (B, 0) where no layer is guided.
        """
        return self.of_tokens(*self.frozen(images), soft_mask)

    def of_tokens(self, tokens: Tensor, patches: list[Tensor], soft_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What ``forward`` makes of what ``frozen`` gives."""
        pooled = [pool(layer, soft_mask) for layer in patches]
        if self.form.spread:
            pooled += [spread(layer) for layer in patches]
        class_token = self.guided(tokens, soft_mask) if self.form.guided_layers else tokens[:, 0, :0]
        return torch.cat(pooled, dim=-1), class_token

    def frozen(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the layers that no training moves: all tokens (B, T, C) after them, patch tokens of the pooled layers."""
        x = self.trunk.embed(images)
        side = images.shape[-1] // self.trunk.shape.patch
        rope = self.trunk.rope((side, side))
        patches = []
        for index, block in enumerate(self.trunk.blocks[: self.n_frozen]):
            x = block(x, rope)
            if index in self.form.pooled_layers:
                patches.append(x[:, self.trunk.n_prefix :])
        return x, patches


def pool(tokens: Tensor, soft_mask: Tensor) -> Tensor:
    """Average layer-normed patch tokens (B, N, C) under the soft mask (B, t, t): (B, C) of unit length.

    An all-zero mask weighs every token alike.
    """
    return functional.normalize(_average(tokens, soft_mask), dim=-1)


def pool_difference(tokens: Tensor, soft_mask: Tensor) -> Tensor:
    """How tokens under the mask differ from those around it: difference of the two averages, (B, C), length at most 1.

    Around is what the mask, stretched to a peak of 1 and dilated by one token, leaves. Defects of one type on different
    layouts come closer, since the layout cancels. A mask that is empty or covers all leaves nothing to compare and
    gives nearly zero.
    """
    stretched = soft_mask / soft_mask.amax(dim=(1, 2), keepdim=True).clamp_min(1e-6)
    around = 1 - functional.max_pool2d(stretched.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
    # eps: a difference much shorter than a token's own length, sqrt(C), is noise and is not stretched to 1.
    return functional.normalize(_average(tokens, soft_mask) - _average(tokens, around), dim=-1, eps=MIN_DIFFERENCE)


def spread(tokens: Tensor) -> Tensor:
    """How much layer-normed patch tokens (B, N, C) differ within a crop: their deviation, (B, C) of unit length."""
    tokens = functional.layer_norm(tokens, tokens.shape[-1:])
    around = tokens - tokens.mean(dim=1, keepdim=True)
    return functional.normalize(around.square().mean(dim=1).sqrt(), dim=-1)


def _average(tokens: Tensor, weights: Tensor) -> Tensor:
    tokens = functional.layer_norm(tokens, tokens.shape[-1:])
    weights = weights.flatten(1) + 1e-6
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights.unsqueeze(-1) * tokens).sum(dim=1)


class EncoderGraph(nn.Module):
    """What is exported: crop, soft mask and size in, one feature vector out, normalisation inside.

    The vector is ``[pooled | size | field | class token]``: all but the last are frozen, see ``frozen_width``.
    """

    def __init__(self, vit: SmgVit, second: EfficientNet | None = None) -> None:
        super().__init__()
        if bool(vit.form.second_trunk) != (second is not None):
            raise ValueError(f"the form names {vit.form.second_trunk or 'no second trunk'}; give just that one")
        self.vit, self.second = vit, second
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    @property
    def frozen_width(self) -> int:
        """Length of the part that no fine-tuning moves: what is pooled, and size."""
        form = self.vit.form
        width = len(form.pooled_layers) * (2 if form.spread else 1) * self.vit.trunk.shape.width + 2
        if self.second is not None:
            channels = sum(STAGES[stage - 1].channels for stage in form.second_stages)
            width += channels * (2 if form.second_surroundings else 1)
        return width + (FIELD_WIDTH + PATCH_WIDTH if form.field else 0)

    @property
    def width(self) -> int:
        """Length of the whole vector."""
        return self.frozen_width + (self.vit.trunk.shape.width if self.vit.form.guided_layers else 0)

    def forward(
        self,
        crop: Tensor,
        soft_mask: Tensor,
        size: Tensor,
        field_features: Tensor | None = None,
        region_features: Tensor | None = None,
    ) -> Tensor:
        """Encode defects.

        Args:
            crop: (B, S, S) uint8 gray.
            soft_mask: (B, t, t) float32 in [0, 1] at the token grid.
            size: (B, 2) float32, log2 of window side and of root mask area, each over the field's short side. A crop
                hides how large its defect was; this says it.
            field_features: (B, ``FIELD_WIDTH``) float32, see ``field_descriptor``; given just where the form asks.
            region_features: (B, ``PATCH_WIDTH``) float32, the mean of ``patch_descriptor`` over the defect; likewise.
        """
        return self.with_map(crop, soft_mask, size, field_features, region_features)[0]

    def with_map(
        self,
        crop: Tensor,
        soft_mask: Tensor,
        size: Tensor,
        field_features: Tensor | None = None,
        region_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same, and the last map (B, C, h, w) of the second trunk, or the last pooled layer where there is none."""
        tokens, patches = self.vit.frozen(normalise(crop, self.mean, self.std))
        pooled, class_token = self.vit.of_tokens(tokens, patches, soft_mask)
        # / 16: brings log2 sizes (0 to about -10) to the scale of the unit-length parts.
        of_field = [] if field_features is None else [field_features]
        if region_features is not None:
            of_field.append(functional.normalize(region_features, dim=-1))
        last_map = patches[-1].transpose(1, 2).reshape(crop.shape[0], -1, *soft_mask.shape[1:])
        parts: list[Tensor] = []
        if self.second is not None:
            parts, last_map = self._second_parts(self.second, crop, soft_mask)
        return torch.cat((pooled, *parts, size / 16, *of_field, class_token), dim=-1), last_map

    def _second_parts(self, second: EfficientNet, crop: Tensor, soft_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """The second trunk's maps, pooled under the mask at their own grid and averaged over turns of the crop.

        Beside them the last map of the crop as it lies.
        """
        form = self.vit.form
        turns = range(0, 4, 4 // form.second_turns)
        crops, masks = (torch.cat([torch.rot90(x, k, (1, 2)) for k in turns]) for x in (crop, soft_mask))
        parts, maps = [], second(crops, form.second_stages)
        for features in maps:
            size = features.shape[-2:]
            mask = functional.interpolate(masks.unsqueeze(1), size=size, mode="bilinear", align_corners=False)
            tokens, mask = features.flatten(2).transpose(1, 2), mask.squeeze(1)
            parts.append(pool(tokens, mask))
            if form.second_surroundings:
                parts.append(pool_difference(tokens, mask))
        averaged = [part.view(len(turns), -1, part.shape[-1]).mean(dim=0) for part in parts]
        return averaged, maps[-1][: crop.shape[0]]
