"""The vision-transformer trunk, in the key layout of the official DINOv2 and DINOv3 checkpoints.

One class serves both families, so a checkpoint file loads with ``strict=True`` and unchanged: DINOv2 (patch 14, learned
position grid, with or without registers, SwiGLU in the giant) and DINOv3 (patch 16, rotary positions, storage tokens,
masked key bias). Inference only: no drop path, no masking of tokens.

Source: Oquab et al. 2023 (DINOv2), Darcet et al. 2023 (registers), Simeoni et al. 2025 (DINOv3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from semwatch.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class TrunkShape:
    """Sizes of one trunk; ``position_grid`` is the side of the learned grid, 0 for rotary positions (DINOv3)."""

    width: int
    depth: int
    heads: int
    patch: int
    position_grid: int
    n_registers: int = 0
    swiglu: bool = False
    antialias: bool = False


TRUNKS = {
    "dinov2_vits14": TrunkShape(384, 12, 6, 14, 37),
    "dinov2_vitb14": TrunkShape(768, 12, 12, 14, 37),
    "dinov2_vitl14": TrunkShape(1024, 24, 16, 14, 37),
    "dinov2_vitg14": TrunkShape(1536, 40, 24, 14, 37, swiglu=True),
    "dinov2_vits14_reg": TrunkShape(384, 12, 6, 14, 37, n_registers=4, antialias=True),
    "dinov2_vitb14_reg": TrunkShape(768, 12, 12, 14, 37, n_registers=4, antialias=True),
    "dinov2_vitl14_reg": TrunkShape(1024, 24, 16, 14, 37, n_registers=4, antialias=True),
    "dinov2_vitg14_reg": TrunkShape(1536, 40, 24, 14, 37, n_registers=4, swiglu=True, antialias=True),
    "dinov3_vits16": TrunkShape(384, 12, 6, 16, 0, n_registers=4),
    "dinov3_vitb16": TrunkShape(768, 12, 12, 16, 0, n_registers=4),
    "dinov3_vitl16": TrunkShape(1024, 24, 16, 16, 0, n_registers=4),
}


class MaskedKeyBiasLinear(nn.Linear):
    """A qkv projection whose bias is multiplied by a stored mask (DINOv3 switches the key's third off)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        mask = torch.ones(width_out)
        mask[width_out // 3 : 2 * width_out // 3] = 0
        self.register_buffer("bias_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Project (…, width_in) to (…, width_out)."""
        return functional.linear(x, self.weight, self.bias * cast(Tensor, self.bias_mask))


class Attention(nn.Module):
    """Multi-head self-attention with optional rotary positions and an optional additive bias on the keys."""

    def __init__(self, width: int, heads: int, *, masked_key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = (MaskedKeyBiasLinear if masked_key_bias else nn.Linear)(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, key_bias: Tensor | None, scale: float | None
    ) -> Tensor:
        """Attend within x (B, T, C).

        Args:
            x: tokens.
            rope: sine and cosine of ``RopeEmbed``, None for learned positions.
            key_bias: (B, heads, 1, T), added to the logits of every query row.
            scale: factor on q k; None for 1 / sqrt(head width).
        """
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if key_bias is None:
            out = functional.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            # Written out: the ONNX exporter cannot decompose the fused form with a mask and a dynamic batch.
            logits = q @ k.transpose(-2, -1) * ((C // self.heads) ** -0.5 if scale is None else scale)
            # (B, heads, 1, T) broadcasts over the query rows: the "Repeat" of SMG-Attention without its memory.
            out = (logits + key_bias).softmax(dim=-1) @ v
        return cast(Tensor, self.proj(out.transpose(1, 2).reshape(B, T, C)))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C) to (…, C)."""
        return cast(Tensor, self.fc2(functional.gelu(self.fc1(x))))


class SwiGlu(nn.Module):
    """The giant's gated feed-forward; hidden width is two thirds of four times the width, rounded up to 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (int(4 * width * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C) to (…, C)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return cast(Tensor, self.w3(functional.silu(gate) * value))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (…, C)."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        rotary = shape.position_grid == 0
        eps = 1e-5 if rotary else 1e-6
        self.norm1 = nn.LayerNorm(shape.width, eps=eps)
        self.attn = Attention(shape.width, shape.heads, masked_key_bias=rotary)
        self.ls1 = LayerScale(shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=eps)
        self.mlp = SwiGlu(shape.width) if shape.swiglu else Mlp(shape.width, 4 * shape.width)
        self.ls2 = LayerScale(shape.width)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        key_bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C); see ``Attention.forward`` for the arguments."""
        x = x + self.ls1(self.attn(self.norm1(x), rope, key_bias, scale))
        return cast(Tensor, x + self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, h * w, C), row by row."""
        return cast(Tensor, self.proj(images).flatten(2).transpose(1, 2))


class RopeEmbed(nn.Module):
    """DINOv3's axial rotary positions: coordinates in [-1, 1] per axis, periods from 1 to ``base``."""

    def __init__(self, head_width: int, base: float = 100.0) -> None:
        super().__init__()
        exponents = 2 * torch.arange(head_width // 4) / (head_width // 2)
        self.register_buffer("periods", base**exponents)

    def forward(self, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return sine and cosine, each (h * w, head width)."""
        periods = cast(Tensor, self.periods).float()
        axes = [(torch.arange(n, device=periods.device) + 0.5) / n * 2 - 1 for n in grid_hw]
        coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * coords[:, :, None] / periods).flatten(1, 2).tile(2)
        return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the patch tokens of x (B, heads, T, d); class and register tokens, which come first, keep still."""
    n_prefix = x.shape[-2] - sin.shape[0]
    prefix, patches = x[..., :n_prefix, :], x[..., n_prefix:, :]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((prefix, turned.to(x.dtype)), dim=-2)


class VisionTransformer(nn.Module):
    """A DINOv2 or DINOv3 trunk."""

    def __init__(self, shape: TrunkShape) -> None:
        super().__init__()
        self.shape = shape
        C = shape.width
        self.patch_embed = PatchEmbed(shape.patch, C)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C))  # unused here; official files carry it
        if shape.position_grid:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.position_grid**2, C))
            if shape.n_registers:
                self.register_tokens = nn.Parameter(torch.zeros(1, shape.n_registers, C))
        else:
            self.rope_embed = RopeEmbed(C // shape.heads)
            self.storage_tokens = nn.Parameter(torch.zeros(1, shape.n_registers, C))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(C, eps=1e-6 if shape.position_grid else 1e-5)

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 + self.shape.n_registers

    def embed(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W) into tokens (B, T, C): class, registers, patches.

        Raises:
            ValueError: if H or W is not a multiple of the patch.
        """
        B, _, H, W = images.shape
        patch = self.shape.patch
        if H % patch or W % patch:
            raise ValueError(f"image is {H}x{W}; both sides must be multiples of the patch, {patch}")
        patches = self.patch_embed(images)
        cls_token: Tensor = self.cls_token
        if self.shape.position_grid:
            cls_token = cls_token + self.pos_embed[:, :1]
            patches = patches + self._positions((H // patch, W // patch))
        parts = [cls_token.expand(B, -1, -1), patches]
        if self.shape.n_registers:
            registers = self.register_tokens if self.shape.position_grid else self.storage_tokens
            parts.insert(1, registers.expand(B, -1, -1))
        return torch.cat(parts, dim=1)

    def rope(self, grid_hw: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Rotary table of a token grid; None for a trunk with learned positions."""
        return None if self.shape.position_grid else cast(tuple[Tensor, Tensor], self.rope_embed(grid_hw))

    def forward(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Return the patch tokens after each block of ``layers`` (0-based), before the final norm.

        Blocks beyond the last asked for are not run.

        Args:
            images: (B, 3, H, W), ImageNet-normalised.
            layers: ascending block numbers.

        Returns:
            One (B, N, C) per layer, N patches row by row.
        """
        x = self.embed(images)
        rope = self.rope((images.shape[2] // self.shape.patch, images.shape[3] // self.shape.patch))
        found = []
        for index, block in enumerate(self.blocks[: max(layers) + 1]):
            x = block(x, rope)
            if index in layers:
                found.append(x[:, self.n_prefix :])
        return found

    def _positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """The learned grid resampled to ``grid_hw``, as (1, N, C).

        Source: DINOv2 resamples by a scale factor with an offset of 0.1 (without registers), by size with antialias
        (with registers). The two differ in the fourth digit, and checkpoints were trained with theirs.
        """
        side, C = self.shape.position_grid, self.shape.width
        grid = self.pos_embed[:, 1:].reshape(1, side, side, C).permute(0, 3, 1, 2)
        if grid_hw != (side, side):
            if self.shape.antialias:
                grid = functional.interpolate(grid, size=grid_hw, mode="bicubic", antialias=True)
            else:
                scale = ((grid_hw[0] + 0.1) / side, (grid_hw[1] + 0.1) / side)
                grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        return grid.flatten(2).transpose(1, 2)


def normalise(image: Tensor, mean: Tensor | nn.Module, std: Tensor | nn.Module) -> Tensor:
    """Turn gray of 0 to 255 (B, S, S) into ImageNet-normalised (B, 3, S, S)."""
    gray = image.float().div(255).unsqueeze(1)
    return (gray - cast(Tensor, mean)) / cast(Tensor, std)


def load_trunk(name: str, checkpoint: Path) -> VisionTransformer:
    """Build the trunk ``name`` and load an official checkpoint file into it, strictly and unchanged.

    Args:
        name: a key of ``TRUNKS``.
        checkpoint: ``.pth`` of DINOv2 or DINOv3 (read with ``weights_only``: nothing in it is executed) or
            ``.safetensors``.

    Raises:
        ConfigError: unknown name, missing file, or a file that does not fit the name.
    """
    if name not in TRUNKS:
        raise ConfigError(f"no trunk is called {name!r}; choose one of {', '.join(TRUNKS)}")
    if not checkpoint.is_file():
        raise ConfigError(f"trunk checkpoint {checkpoint} does not exist; name the file you downloaded")
    trunk = VisionTransformer(TRUNKS[name])
    try:
        if checkpoint.suffix == ".safetensors":
            state = load_file(checkpoint)
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        trunk.load_state_dict(state, strict=True)
    except (RuntimeError, SafetensorError, UnpicklingError, AttributeError) as error:
        raise ConfigError(f"{checkpoint} is not a checkpoint of {name}: {error}") from error
    return trunk.float().eval().requires_grad_(False)
