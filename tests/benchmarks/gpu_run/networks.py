"""The networks as a GPU should run them: products in bf16 or fp16, attention fused, constants folded.

What is subtracted, compared or ranked stays fp32: a cosine distance near zero in bf16 is noise, and so is |a - b|^2
written out as products. Convolutions and linear layers accumulate in fp32 in any case.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch.errors import ConfigError
from semwatch_training.families.ni import folding
from semwatch_training.families.ni.ni_detector import DetectorForm, DetectorGraph, NIDetector
from semwatch_training.families.ni.ni_losses import distances
from semwatch_training.families.smg_vit.smg_vit import EncoderForm, EncoderGraph, SmgVit
from semwatch_training.trunks.efficientnet import EfficientNet
from semwatch_training.trunks.vit import TRUNKS, Attention, Block, Mlp, VisionTransformer

SIZES = ("shipped", "vit-s", "vit-b")
"""What ships (a branch over EfficientNet, a ViT-S/14 beside it), and the paper's method on ViT-S/14 and ViT-B/14."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A detector and an encoder, fp32, on the processor."""

    name: str
    weights: str
    """"shipped", or "random": of the right size, good for timing alone."""
    detector: DetectorGraph
    encoder: EncoderGraph


def make(size: str, cache: Path) -> Pair:
    """Make a pair of ``SIZES``; what ships needs the backbones in ``cache``, else its weights are random too.

    Raises:
        ConfigError: no such size.
    """
    if size not in SIZES:
        raise ConfigError(f"no size {size!r}; there are {', '.join(SIZES)}")
    torch.manual_seed(0)
    if size == "shipped":
        raise ConfigError("the shipped detector takes fields at any size, which this run does not time yet; take vit-s")
    name = {"vit-s": "dinov2_vits14", "vit-b": "dinov2_vitb14"}[size]
    shape = TRUNKS[name]
    return paper(
        size,
        VisionTransformer(shape),
        DetectorForm(trunk=name, width=shape.width, heads=shape.heads),
        EncoderForm(trunk=name, second_trunk=""),
    )


def paper(name: str, trunk: VisionTransformer, detector: DetectorForm, encoder: EncoderForm) -> Pair:
    """The paper's two networks over one trunk, of random weights but for the trunk's."""
    trunk.eval().requires_grad_(False)
    detect = DetectorGraph(trunk, NIDetector(detector)).eval().requires_grad_(False)
    return Pair(name, "random", detect, EncoderGraph(SmgVit(trunk, encoder)).eval().requires_grad_(False))


def lowered(graph: DetectorGraph | EncoderGraph, dtype: torch.dtype, device: str) -> nn.Module:
    """A copy for a device whose products are of ``dtype``, ready for inference."""
    made = copy.deepcopy(folding.folded(graph) if isinstance(graph, DetectorGraph) else graph)
    if isinstance(made, DetectorGraph):
        made.__class__ = LowDetectorGraph
        form = made.detector.form
        if form.evidence != "branch":
            _lower_trunk(made.trunk, form.input_px, dtype)
            for part in (made.detector.extractor, made.detector.bottleneck, made.detector.decoder):
                part.to(dtype)
        else:
            made.trunk = cast(VisionTransformer, None)  # not run: not in the file either
        if made.evidence is not None:
            _lower_convolutions(made.evidence.trunk, dtype)
    else:
        _lower_trunk(made.vit.trunk, made.vit.form.input_px, dtype)
        guided = made.vit.guided.to(dtype)
        guided.norm.register_forward_hook(_to_float)
        _prepare_blocks(guided.blocks)
        if made.second is not None:
            _lower_convolutions(made.second, dtype)
    return made.to(device).eval().requires_grad_(False)


class LowDetectorGraph(DetectorGraph):
    """A detector whose features may be bf16 or fp16: distances are of fp32."""

    def residual(self, image: Tensor) -> Tensor:
        """See ``DetectorGraph.residual``; by reconstruction alone."""
        form = self.detector.form
        if form.evidence == "matching":
            raise ConfigError("direct matching is an experiment; its speed is not measured")
        targets = self.features(image)
        rebuilt = self.detector.rebuild(targets, self.detector.normal_tokens(targets))
        side = form.input_px // self.trunk.shape.patch
        return distances(targets.float(), rebuilt.float()).mean(dim=1).reshape(-1, side, side)


class FusedAttention(nn.Module):
    """``Attention`` without rotary positions, its key bias inside the fused kernel; the ONNX exporter cannot."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.heads, attention.qkv, attention.proj

    def forward(self, x: Tensor, rope: None, key_bias: Tensor | None, scale: float | None) -> Tensor:
        """See ``Attention.forward``."""
        del rope
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if key_bias is None else key_bias.to(q.dtype).expand(-1, self.heads, T, -1)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return cast(Tensor, self.proj(out.transpose(1, 2).reshape(B, T, C)))


def _lower_trunk(trunk: VisionTransformer, input_px: int, dtype: torch.dtype) -> None:
    if trunk.shape.position_grid == 0:
        raise ConfigError("rotary positions (DINOv3) are not measured; take a DINOv2 trunk")
    side = input_px // trunk.shape.patch
    positions = torch.cat((trunk.pos_embed[:, :1], trunk._positions((side, side))), dim=1)
    trunk.pos_embed = nn.Parameter(positions, requires_grad=False)
    trunk.shape = replace(trunk.shape, position_grid=side)
    trunk.to(dtype)
    trunk.patch_embed.register_forward_pre_hook(_to_type_of(trunk.patch_embed.proj.weight))
    _prepare_blocks(trunk.blocks)


def _prepare_blocks(blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
    """Fuse attention, and fold each LayerScale into the linear layer before it."""
    for block in cast(list[Block], list(blocks)):
        last = block.mlp.fc2 if isinstance(block.mlp, Mlp) else block.mlp.w3
        for linear, scale in ((block.attn.proj, block.ls1), (last, block.ls2)):
            linear.weight.data = linear.weight.data * scale.gamma.data[:, None]
            linear.bias.data = linear.bias.data * scale.gamma.data
        block.ls1 = block.ls2 = cast(Any, nn.Identity())
        block.attn = cast(Any, FusedAttention(block.attn))


def _lower_convolutions(trunk: EfficientNet, dtype: torch.dtype) -> None:
    trunk.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trunk.stem.register_forward_pre_hook(_to_type_of(trunk.stem.weight))
    trunk.register_forward_hook(_to_float)


def _to_type_of(weight: Tensor) -> Any:
    dtype = weight.dtype

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.to(dtype) for x in inputs)

    return hook


def _to_float(_: nn.Module, inputs: Any, output: Any) -> Any:
    del inputs
    return [x.float() for x in output] if isinstance(output, list) else output.float()
