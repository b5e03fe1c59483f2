"""ReCAME-Net's network on frozen trunks: regional channel attention, experts with cosine heads.

A trunk's last map is cut into k x k regions. In each region every channel is weighted by a gate that reads the
region's own average and maximum. The trunk is frozen and the gate of a region is one number per channel, so the average
of a gated region is the gated average: k x k averages and maxima of a map are all that the network ever reads, and
those are computed once for each crop and kept.

Source: ReCAME-Net (arXiv 2510.19463); the gate is CBAM's (Woo et al. 2018) in each of k x k regions. The paper gates
every block of a ResNet that it trains; here the last maps of trunks that nobody trains are gated.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch.errors import ConfigError


class Regions(NamedTuple):
    """How many channels a map has, and into how many regions a side it is cut."""

    channels: int
    side: int

    @property
    def width(self) -> int:
        """Numbers of one crop: an average and a maximum for each channel and region."""
        return 2 * self.channels * self.side**2


NO_REGIONS = Regions(0, 1)
"""Of an encoder that gives none."""


@dataclass(frozen=True, slots=True)
class RecameForm:
    """What a network is made of; stored beside its weights."""

    experts: int = 3
    width: int = 128
    """Of an expert's embedding."""
    reduction: int = 8
    """Channels to the hidden units of the gate."""
    scale: float = 16.0
    """Cosines to logits."""
    attention: bool = True
    """False: regions are averaged as they are."""

    def __post_init__(self) -> None:
        if min(self.experts, self.width, self.reduction) < 1 or self.scale <= 0:
            raise ConfigError(f"experts, width, reduction and scale must be positive, not {self}")


def region_pool(maps: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Average and maximum of maps (B, C, H, W) in side x side regions: (B, C, side, side) each.

    Where the side does not divide H or W, neighbouring regions share a row or column.
    """
    # Slices, as torch's adaptive pooling cuts them; those of odd sizes have no ONNX of their own.
    rows, columns = (_cuts(n, side) for n in maps.shape[-2:])
    cut = [maps[:, :, row, column] for row in rows for column in columns]
    parts = [torch.stack([pooled(part) for part in cut], dim=-1) for pooled in (_average, _maximum)]
    average, maximum = (part.reshape(*maps.shape[:2], side, side) for part in parts)
    return average, maximum


def _cuts(n: int, side: int) -> list[slice]:
    return [slice(k * n // side, -(-(k + 1) * n // side)) for k in range(side)]


def _average(maps: Tensor) -> Tensor:
    return maps.mean(dim=(2, 3))


def _maximum(maps: Tensor) -> Tensor:
    return maps.amax(dim=(2, 3))


class RegionalAttention(nn.Module):
    """One gate in (0, 1) per channel and region: sigmoid of a shared perceptron's answers to average and maximum."""

    def __init__(self, channels: int, side: int, reduction: int) -> None:
        super().__init__()
        self.side = side
        hidden = max(1, channels // reduction)
        self.perceptron = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def gate(self, average: Tensor, maximum: Tensor) -> Tensor:
        """Gates (B, C, k, k) of pooled regions (B, C, k, k)."""
        answers = sum(self.perceptron(part.permute(0, 2, 3, 1)) for part in (average, maximum))
        return torch.sigmoid(answers).permute(0, 3, 1, 2)

    def forward(self, maps: Tensor) -> Tensor:
        """Weight the channels of maps (B, C, H, W) region by region; H and W are any, not smaller than k."""
        gate = self.gate(*region_pool(maps, self.side))
        return maps * functional.interpolate(gate, size=maps.shape[-2:], mode="nearest")


class CosineHead(nn.Module):
    """Scaled cosines of embeddings (B, w) with K class vectors, and a bias: (B, K)."""

    def __init__(self, width: int, n_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_classes, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(n_classes))
        self.scale = scale

    def forward(self, embedding: Tensor) -> Tensor:
        """Logits of embeddings of any length."""
        cosines = functional.normalize(embedding, dim=-1) @ functional.normalize(self.weight, dim=-1).T
        return self.scale * cosines + self.bias


class Expert(nn.Module):
    """Regions under attention, joined to the other features, one hidden layer, a cosine head."""

    def __init__(self, plain_width: int, regions: Regions, n_classes: int, form: RecameForm) -> None:
        super().__init__()
        has_attention = form.attention and regions.channels > 0
        self.attention = RegionalAttention(regions.channels, regions.side, form.reduction) if has_attention else None
        self.embed = nn.Linear(plain_width + regions.channels, form.width)
        self.head = CosineHead(form.width, n_classes, form.scale)

    def embedding(self, plain: Tensor, average: Tensor, maximum: Tensor) -> Tensor:
        """(B, w) of plain features (B, P) and pooled regions (B, C, k, k)."""
        gated = average if self.attention is None else average * self.attention.gate(average, maximum)
        return functional.relu(self.embed(torch.cat((plain, gated.mean(dim=(2, 3))), dim=-1)))

    def forward(self, plain: Tensor, average: Tensor, maximum: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.head(self.embedding(plain, average, maximum))
        return logits


class RecameNet(nn.Module):
    """E experts over features ``[plain | averages | maxima]``; its answer is the mean of their logits."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, regions: Regions, n_classes: int, form: RecameForm) -> None:
        super().__init__()
        plain_width = width - regions.width
        if plain_width < 0 or plain_width + regions.channels == 0:
            raise ConfigError(
                f"{width} features cannot hold {regions.side} x {regions.side} regions of {regions.channels} channels"
            )
        self.form, self.regions, self.n_classes, self.width = form, regions, n_classes, width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.experts = nn.ModuleList(Expert(plain_width, regions, n_classes, form) for _ in range(form.experts))

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, D) scaled and taken apart: plain (B, P), averages and maxima (B, C, k, k)."""
        channels, side = self.regions
        scaled = (features - self.mean) / self.deviation
        plain = scaled[:, : self.width - self.regions.width]
        pooled = scaled[:, self.width - self.regions.width :].reshape(features.shape[0], 2, channels, side, side)
        return plain, pooled[:, 0], pooled[:, 1]

    def each(self) -> list[Expert]:
        """The experts."""
        return [cast(Expert, expert) for expert in self.experts]

    def forward(self, features: Tensor) -> Tensor:
        """Mean logits (B, K) of features (B, D)."""
        parts = self.parts(features)
        return torch.stack([expert(*parts) for expert in self.experts]).mean(dim=0)


def turned(features: Tensor, regions: Regions, turn: int, *, is_flipped: bool) -> Tensor:
    """Features (B, D) of crops as they would be had the crop's regions been turned by right angles, and flipped."""
    if regions.channels == 0:
        return features
    plain, pooled = features[:, : -regions.width], features[:, -regions.width :]
    grid = pooled.reshape(len(features), 2 * regions.channels, regions.side, regions.side)
    grid = torch.rot90(grid, turn, (2, 3))
    grid = grid.flip(3) if is_flipped else grid
    return torch.cat((plain, grid.reshape(len(features), -1)), dim=1)
