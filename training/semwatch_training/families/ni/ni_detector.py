"""Self-normal-information-guided detection: NI-Extractor, bottleneck, NIG-Decoder, and the exported graph.

A handful of tokens collects what is normal in *this* image; a decoder may rebuild the image's features from those
tokens alone; what it cannot rebuild is the defect. No support set. The trunk is frozen and stays outside: everything
here works on its features, so training runs on cached ones.

Source: IC-DefectNCD section 3.2 and its parent INP-Former, whose code settles what the paper leaves open. The paper's
literal variants are fields of ``DetectorForm``, so that both can be measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch.errors import ConfigError
from semwatch_training.families.branch.segmentation_branch import (
    BranchForm,
    Evidence,
    SegmentationBranch,
    image_score,
    standardise,
)
from semwatch_training.families.ni.ni_losses import distances, matching_distances
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import IMAGENET_MEAN, IMAGENET_STD, Mlp, VisionTransformer, normalise


@dataclass(frozen=True, slots=True)
class DetectorForm:
    """What a detector is made of; stored beside its weights.

    ``attention="literal"`` is the paper's un-normalised ReLU(Q K^T) (eq. of section 3.2); ``"parent"`` normalises q
    and k per head and learns a scale. ``fusion="sum"`` is the paper's F = sum of layers; ``"mean"`` is the parent's,
    and the only one that leaves the bottleneck (which has no norm) at the features' own scale.
    ``targets="layerwise"`` is the paper's mean over L layers; ``"grouped"`` the parent's two groups of layers (loose
    reconstruction).
    ``evidence`` is what the score map is made of. ``"residual"``: what the decoder cannot rebuild. ``"matching"``: the
    distance to the nearest normal token (the paper's Table 4 baseline). ``"branch"``: the segmentation branch alone;
    the ViT is not run and there is nothing of the others in the file. ``"both"``: the branch's logit plus
    ``residual_weight`` times the standardised residual.
    """

    trunk: str = "dinov2_vits14"
    width: int = 384
    heads: int = 6
    layers: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8, 9)
    n_normal_tokens: int = 6
    input_px: int = 448
    attention: Literal["parent", "literal"] = "parent"
    fusion: Literal["mean", "sum"] = "mean"
    targets: Literal["grouped", "layerwise"] = "grouped"
    decoder_layers: int = 0
    """0 for as many as trunk layers, as the parent has; fewer are smaller and faster. A multiple of the groups."""
    evidence: Literal["residual", "matching", "branch", "both"] = "residual"
    residual_weight: float = 0.1
    branch: BranchForm | None = None
    """Needed where the evidence names it."""
    top_fraction: float = 0.002
    """Share of the map whose mean is the image score. The parent takes 1 % of pixels; a review defect often covers one
    or two of 1,024 tokens, and on synthetic development images 0.2 % tells them from normal ones better than 1 %."""

    def __post_init__(self) -> None:
        if self.looks_at_branch != (self.branch is not None):
            needed = "needs a branch" if self.looks_at_branch else "has no branch"
            raise ConfigError(f"a detector whose evidence is {self.evidence!r} {needed}; see DetectorForm.branch")

    @property
    def looks_at_branch(self) -> bool:
        """Whether the score comes from the segmentation branch, alone or not."""
        return self.evidence in ("branch", "both")

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions in ``layers`` that share one reconstruction target."""
        L = len(self.layers)
        if self.targets == "layerwise":
            return tuple((index,) for index in range(L))
        return tuple(range(L // 2)), tuple(range(L // 2, L))

    @property
    def decoder_groups(self) -> tuple[tuple[int, ...], ...]:
        """Positions in the reversed decoder that are averaged into each group's rebuilt features."""
        n, G = self.decoder_layers or len(self.layers), len(self.groups)
        if n % G:
            raise ConfigError(f"{n} decoder layers do not divide among {G} groups of trunk layers; take a multiple")
        return tuple(tuple(range(g * n // G, (g + 1) * n // G)) for g in range(G))


class NormalExtractor(nn.Module):
    """One cross-attention block whose M learnable queries gather an image's normal information."""

    def __init__(self, form: DetectorForm) -> None:
        super().__init__()
        C = form.width
        self.heads = form.heads
        self.queries = nn.Parameter(torch.randn(1, form.n_normal_tokens, C))
        self.norm1 = nn.LayerNorm(C, eps=1e-8)  # shared by query and key side, as in the parent
        self.to_q = nn.Linear(C, C)
        self.to_kv = nn.Linear(C, 2 * C)
        self.proj = nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C, eps=1e-8)
        self.mlp = Mlp(C, 4 * C)

    def forward(self, fused: Tensor) -> Tensor:
        """Gather fused features (B, N, C) into normal tokens (B, M, C)."""
        queries = self.queries.expand(fused.shape[0], -1, -1)
        keys, values = self.to_kv(self.norm1(fused)).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (self.to_q(self.norm1(queries)), keys, values))
        gathered = merge_heads(functional.scaled_dot_product_attention(q, k, v))
        tokens = queries + self.proj(gathered)  # residual from the query; the paper's F_normal is F_init here
        return cast(Tensor, tokens + self.mlp(self.norm2(tokens)))


class GuidedDecoderLayer(nn.Module):
    """ReLU attention to the normal tokens, with no residual around it: what they do not hold cannot pass."""

    def __init__(self, form: DetectorForm) -> None:
        super().__init__()
        C = form.width
        self.heads, self.literal = form.heads, form.attention == "literal"
        self.norm1 = nn.LayerNorm(C, eps=1e-8)
        self.to_q = nn.Linear(C, C)
        self.to_k = nn.Linear(C, C)
        self.to_v = nn.Linear(C, C)
        self.scale = nn.Parameter(torch.ones(form.heads, 1, 1))
        self.proj = nn.Linear(C, C)
        self.norm2 = nn.LayerNorm(C, eps=1e-8)
        self.mlp = Mlp(C, 4 * C)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Rebuild x (B, N, C) from the normal tokens (B, M, C)."""
        queries, tokens = self.norm1(x), self.norm1(tokens)
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(queries), self.to_k(tokens), self.to_v(tokens)))
        if self.literal:
            weights = functional.relu(q @ k.transpose(-2, -1))
        else:
            q, k = functional.normalize(q, dim=-1, eps=1e-6), functional.normalize(k, dim=-1, eps=1e-6)
            weights = functional.relu(q @ k.transpose(-2, -1) * self.scale)
        rebuilt = self.proj(merge_heads(weights @ v))
        return cast(Tensor, rebuilt + self.mlp(self.norm2(rebuilt)))


class NIDetector(nn.Module):
    """NI-Extractor, bottleneck and NIG-Decoder over grouped trunk features, and the segmentation branch if any."""

    def __init__(self, form: DetectorForm) -> None:
        super().__init__()
        self.form = form
        self.branch = SegmentationBranch(form.branch) if form.branch is not None else None
        if form.evidence == "branch":
            return
        self.extractor = NormalExtractor(form)
        self.bottleneck = Mlp(form.width, 4 * form.width)  # no residual, no norm: the parent's; the paper omits it
        self.decoder = nn.ModuleList(GuidedDecoderLayer(form) for members in form.decoder_groups for _ in members)
        for part in (self.extractor, self.bottleneck, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
                    nn.init.zeros_(module.bias)

    def forward(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return normal tokens (B, M, C) and the rebuilt features (B, G, N, C) of targets (B, G, N, C)."""
        tokens = self.normal_tokens(targets)
        return tokens, self.rebuild(targets, tokens)

    def normal_tokens(self, targets: Tensor) -> Tensor:
        """Gather targets (B, G, N, C) into normal tokens (B, M, C)."""
        return cast(Tensor, self.extractor(self._fuse(targets)))

    def rebuild(self, targets: Tensor, tokens: Tensor) -> Tensor:
        """Rebuild targets (B, G, N, C) from normal tokens (B, M, C): (B, G, N, C).

        Every feature is rebuilt by itself, so any subset of the N may be given.
        """
        x = self.bottleneck(self._fuse(targets))
        outputs = []
        for layer in self.decoder:
            x = layer(x, tokens)
            outputs.append(x)
        outputs.reverse()  # the deepest decoder layer answers for the shallowest trunk layer
        return average(outputs, self.form.decoder_groups)

    def _fuse(self, targets: Tensor) -> Tensor:
        fused = targets.mean(dim=1)
        return fused * len(self.form.layers) if self.form.fusion == "sum" else fused


def group(layers: Sequence[Tensor], form: DetectorForm) -> Tensor:
    """Average L feature maps (B, N, C) within each group of ``form``: (B, G, N, C).

    Groups are equally long, so the mean over groups is the mean over layers: nothing else needs caching.
    """
    return average(layers, form.groups)


def average(maps: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """Average feature maps (B, N, C) within groups of their positions: (B, G, N, C)."""
    return torch.stack([torch.stack([maps[i] for i in members]).mean(dim=0) for members in groups], dim=1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turn (B, T, C) into (B, heads, T, C / heads)."""
    B, T, C = x.shape
    return x.reshape(B, T, heads, C // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Turn (B, heads, T, d) into (B, T, heads * d)."""
    B, heads, T, d = x.shape
    return x.transpose(1, 2).reshape(B, T, heads * d)


class DetectorGraph(nn.Module):
    """What is exported: uint8 gray in, score map and raw image score out, normalisation inside.

    Args:
        trunk: the ViT, frozen; None will do where the evidence is the branch alone.
        detector: over its features; its form says what the score is made of.
        convolutional: the second trunk, frozen; needed where the detector has a branch.
    """

    def __init__(
        self, trunk: VisionTransformer | None, detector: NIDetector, convolutional: EfficientNet | None = None
    ) -> None:
        super().__init__()
        form = detector.form
        if form.branch is not None and convolutional is None:
            raise ConfigError(f"this detector has a segmentation branch; hand in its trunk, {form.branch.trunk}")
        if form.evidence != "branch" and trunk is None:
            raise ConfigError(f"a detector whose evidence is {form.evidence!r} looks at {form.trunk}; hand it in")
        self.trunk, self.detector = cast(VisionTransformer, trunk), detector
        self.evidence = (
            Evidence(convolutional, form.branch) if form.branch is not None and convolutional is not None else None
        )
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    @property
    def side(self) -> int:
        """Cells a side of the score map."""
        form = self.detector.form
        return form.branch.side if form.branch is not None else form.input_px // self.trunk.shape.patch

    def features(self, image: Tensor) -> Tensor:
        """Grouped trunk features (B, G, N, C) of uint8 gray images (B, S, S)."""
        return group(self.trunk(normalise(image, self.mean, self.std), self.detector.form.layers), self.detector.form)

    def residual(self, image: Tensor) -> Tensor:
        """What normal tokens cannot explain, (B, h, w), range [0, 2]: by reconstruction, or by direct matching."""
        targets = self.features(image)
        tokens = self.detector.normal_tokens(targets)
        if self.detector.form.evidence == "matching":
            distance = matching_distances(targets, tokens)
        else:
            distance = distances(targets, self.detector.rebuild(targets, tokens)).mean(dim=1)
        side = self.detector.form.input_px // self.trunk.shape.patch
        return distance.reshape(-1, side, side)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return score map (B, h, w) and raw score (B,).

        Without a branch the map is the distance, range [0, 2], and the raw score the mean of its top cells. With one it
        is -log(1 - p) of the branch's probability p of a defect, 0 or more: near 0 where all is normal, and linear in
        the logit where it is not, so that thresholds are not crowded at 1. The raw score is that of ``image_score``.
        """
        form = self.detector.form
        if self.evidence is None or self.detector.branch is None:
            score = self.residual(image)
            n_top = max(1, round(form.top_fraction * score.shape[1] * score.shape[2]))
            return score, score.flatten(1).topk(n_top, dim=1).values.mean(dim=1)
        logits = self.detector.branch(*self.evidence(image))
        if form.evidence == "both":
            logits = logits + form.residual_weight * standardised(self.residual(image), self.side)
        raw = image_score(logits, self.detector.branch.form.top_cells)
        return functional.softplus(logits), functional.softplus(raw)


def standardised(residual: Tensor, side: int) -> Tensor:
    """Bring a residual (B, h, w) to another grid and to zero mean and unit variance over its image."""
    resized = functional.interpolate(residual[:, None], size=(side, side), mode="bilinear", align_corners=False)
    return standardise(resized)[:, 0]
