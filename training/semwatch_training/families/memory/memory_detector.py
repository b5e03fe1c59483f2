"""A memory of normal images as a detector: every patch is scored by its distance to the nearest remembered one.

Nothing is trained. Two frozen trunks that err differently, the ViT and the EfficientNet, each keep projected patch
features of normal images; their distances, in units of held-out normal patches, are averaged. Whole images are
remembered, and only the few most alike to the one judged are asked: so all of them can be kept at the price of a small
bank, and a patch that is normal elsewhere excuses nothing here. A coreset of patches, asked whatever the image, is the
published baseline and another setting of the same form. The scores for the gate come from normal images scored by a
memory without them, so they are those of images never seen; ``fit_memory`` makes both.

Weights file: per trunk ``<name>.mean`` (C,), ``<name>.projection`` (C, D), ``<name>.patches`` (n, N, D) of n images or
(P, D) of a coreset, fp16, and ``<name>.scale`` (2,), centre and spread of held-out distances; ``normal_scores`` (m,);
the form in the header.

Source: cascade patch retrieval, CPR (Li et al. 2024), here without its training; PatchCore (Roth et al. 2022;
greedy coreset, here of a random share of the patches) and AnomalyDINO (Damm et al. 2025).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from semwatch_training.system import weights_file
from semwatch_training.trunks.efficientnet import EfficientNet, grid_features
from semwatch_training.trunks.vit import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, normalise

TRUNK_NAMES = ("vit", "efficientnet")


class Trunks(NamedTuple):
    """The frozen networks, see ``backbone.load`` and ``backbone.load_efficientnet``."""

    vit: VisionTransformer
    efficientnet: EfficientNet


@dataclass(frozen=True, slots=True)
class MemoryForm:
    """What a memory is made of; stored beside its weights. Pairs are of the ViT and the EfficientNet."""

    input_px: int = 448
    sizes_px: tuple[int, int] = (224, 256)
    """Each trunk sees the input averaged down to its own size: a multiple of the ViT's patch, and of 16."""
    vit_layers: tuple[int, ...] = (5, 6, 7, 8)
    efficientnet_stages: tuple[int, ...] = (3, 5)
    components: tuple[int, int] = (64, 48)
    """Principal components kept of a patch feature. Where alike images are asked, so few lose nothing on defects
    planted in magnetic tiles and .005 of the pixel AUROC on synthetic fields; a coreset needs all (``CORESET``)."""
    whitening: float = 0.0
    """Power of a component's standard deviation it is divided by: 0 keeps the cosine geometry, 1 is Mahalanobis."""
    alike: int = 20
    """Remembered images that are asked, the most alike as a whole. 0: none, a coreset of patches is, of all images."""
    images: int = 1000
    """Remembered at most, from every owner in turn; 57 kB each as components are set. Not for a coreset."""
    patches: int = 10_000
    """Of a coreset, by each trunk."""
    candidates: int = 30_000
    """Drawn at random, in equal numbers from every image: the principal components are of these, and the greedy coreset
    chooses from them."""
    folds: int = 4
    """Normal images are scored by coresets of the other folds, each built anew: for centre, spread and the gate. Where
    alike images are asked, those of the same owner are left out instead."""
    calibration_images: int = 400
    """At most so many images are scored so."""
    smoothing: float = 0.5
    """Sigma of a Gaussian over the fused map, in cells of the grid; 0 for none. Chosen, with ``top_cells``, on planted
    pseudo-defects in held-out normal images, not on real ones."""
    top_cells: int = 3
    """Cells of the map whose mean is the image score."""
    few_shot: int = 8
    """Up to so many images are remembered in all eight turns and flips."""

    @property
    def side(self) -> int:
        """Cells a side of the score map and of the EfficientNet's grid, whose deepest used stage has stride 16."""
        return self.sizes_px[1] // 16


CORESET = MemoryForm(components=(384, 168), alike=0)
"""The nearest-patch memory as published, to compare with."""

SIGNATURE_SIDE = 4
"""Images are compared by the means of so many cells a side: where what lies counts, and small defects do not."""


@dataclass(frozen=True, slots=True)
class Bank:
    """What one trunk remembers: ``mean`` (C,), ``projection`` (C, D), ``patches`` (n, N, D) or (P, D), its scale."""

    mean: Tensor
    projection: Tensor
    patches: Tensor
    centre: float
    spread: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Two banks, and the scores of normal images under memories built without them (none where views stand in)."""

    form: MemoryForm
    banks: tuple[Bank, Bank]
    normal_scores: tuple[float, ...]


class TrunkFeatures(nn.Module):
    """Both trunks' unit patch features of one gray image."""

    def __init__(self, trunks: Trunks, form: MemoryForm) -> None:
        super().__init__()
        self.form, self.vit, self.efficientnet = form, trunks.vit, trunks.efficientnet
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        for name, size in zip(TRUNK_NAMES, form.sizes_px, strict=True):
            self.register_buffer(f"shrink_{name}", resampling(form.input_px, size))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Turn uint8 gray (B, S, S) into unit features (B, N, C) of the ViT and of the EfficientNet."""
        gray = image.float()
        small, fine = (m @ gray @ m.T for m in (cast(Tensor, getattr(self, f"shrink_{n}")) for n in TRUNK_NAMES))
        coloured = normalise(small, self.mean, self.std)
        tokens = torch.stack(self.vit(coloured, self.form.vit_layers)).mean(dim=0)
        grid = grid_features(self.efficientnet(fine, self.form.efficientnet_stages), self.form.side)
        return functional.normalize(tokens, dim=-1), functional.normalize(grid, dim=-1)


class MemoryGraph(nn.Module):
    """What is exported: uint8 gray in, score map and raw image score out, resizing and normalisation inside."""

    def __init__(self, trunks: Trunks, memory: Memory) -> None:
        super().__init__()
        self.form = memory.form
        self.features = TrunkFeatures(trunks, memory.form)
        self.scales = [(bank.centre, bank.spread) for bank in memory.banks]
        for name, bank in zip(TRUNK_NAMES, memory.banks, strict=True):
            self.register_buffer(f"{name}_mean", bank.mean.float())
            self.register_buffer(f"{name}_projection", bank.projection.float())
            self.register_buffer(f"{name}_patches", bank.patches.half() if self.form.alike else bank.patches.float())
        if self.form.alike:
            self.register_buffer("signatures", signatures([bank.patches for bank in memory.banks]))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return score map (B, h, w), in spreads above a normal patch, and raw score (B,)."""
        queries = [
            (features - self._part(name, "mean")) @ self._part(name, "projection")
            for name, features in zip(TRUNK_NAMES, self.features(image), strict=True)
        ]
        banks = [self._part(name, "patches") for name in TRUNK_NAMES]
        if self.form.alike:
            asked = most_alike(signatures(queries), cast(Tensor, self.signatures), self.form.alike)
            banks = [patches[asked].float().flatten(1, 2) for patches in banks]  # (B, k * N, D)
        maps = [
            (as_map(nearest_distances(query, patches), self.form.side) - centre) / spread
            for query, patches, (centre, spread) in zip(queries, banks, self.scales, strict=True)
        ]
        return scored((maps[0] + maps[1]) / 2, self.form)

    def _part(self, name: str, part: str) -> Tensor:
        return cast(Tensor, getattr(self, f"{name}_{part}"))


class SelfMatchingGraph(nn.Module):
    """No normal images at all: a patch is scored by its nearest patches elsewhere in the same image.

    Finds what an image holds once. A defect that fills the image, or repeats, passes for normal.
    """

    def __init__(self, trunks: Trunks, form: MemoryForm, *, nearest: int = 20, apart: int = 2) -> None:
        super().__init__()
        self.form, self.nearest, self.apart = form, nearest, apart
        self.features = TrunkFeatures(trunks, form)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return score map (B, h, w), range [0, 2], and raw score (B,)."""
        maps = [
            as_map(self_distances(features, nearest=self.nearest, apart=self.apart), self.form.side)
            for features in self.features(image)
        ]
        return scored((maps[0] + maps[1]) / 2, self.form)


def signatures(queries: Sequence[Tensor]) -> Tensor:
    """What images are compared by, (B, K): both trunks' patches (B, N, D), averaged over a coarse grid."""
    parts = []
    for patches in queries:
        own = round(patches.shape[1] ** 0.5)
        coarse = resampling(own, SIGNATURE_SIDE).to(patches.device)
        # Not len(): it would freeze the batch of an exported graph.
        grid = patches.float().transpose(1, 2).reshape(patches.shape[0], -1, own, own)
        parts.append((coarse @ grid @ coarse.T).flatten(1))
    return torch.cat(parts, dim=1)


def most_alike(queries: Tensor, remembered: Tensor, k: int) -> Tensor:
    """Numbers (B, min(k, n)) of the remembered signatures (n, K) nearest to queries (B, K)."""
    closeness = 2 * queries @ remembered.T - remembered.square().sum(dim=1)
    return closeness.topk(min(k, len(remembered)), dim=1).indices


def nearest_distances(queries: Tensor, patches: Tensor) -> Tensor:
    """Euclidean distance of queries (B, N, D) to the nearest of patches (P, D), or (B, P, D) each its own: (B, N)."""
    # The squared norm of the query is the same for all patches: the largest of what is left decides.
    norms = patches.square().sum(dim=-1).unsqueeze(-2)
    closeness = (2 * queries @ patches.transpose(-1, -2) - norms).amax(dim=-1)
    return (queries.square().sum(dim=-1) - closeness).clamp_min(0).sqrt()


def self_distances(features: Tensor, *, nearest: int, apart: int) -> Tensor:
    """Mean cosine distance of unit features (B, N, C) to their ``nearest`` most alike in the same image: (B, N).

    Args:
        features: N a square grid, row by row.
        nearest: capped by how many there are.
        apart: cells closer than this in both directions are not asked: neighbours share pixels.
    """
    N = features.shape[1]
    side = round(N**0.5)
    y, x = torch.arange(N) // side, torch.arange(N) % side
    close = ((y[:, None] - y).abs() < apart) & ((x[:, None] - x).abs() < apart)
    n_asked = N - min(side, 2 * apart - 1) ** 2  # in the middle of the grid; nearer its border there are more
    alike = (features @ features.transpose(1, 2)).masked_fill(close.to(features.device), -1.0)
    return 1 - alike.topk(max(1, min(nearest, n_asked)), dim=-1).values.mean(dim=-1)


def as_map(distances: Tensor, side: int) -> Tensor:
    """Distances (B, N) of a square grid as maps (B, side, side), interpolated where the grid is another."""
    own = round(distances.shape[1] ** 0.5)
    maps = distances.reshape(-1, 1, own, own)
    if own != side:
        maps = functional.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.squeeze(1)


def scored(maps: Tensor, form: MemoryForm) -> tuple[Tensor, Tensor]:
    """Smooth maps (B, h, w) and take the mean of their highest cells: maps and raw scores (B,)."""
    if form.smoothing > 0:
        kernel = smoothing_matrix(maps.shape[-1], form.smoothing).to(maps.device)
        maps = kernel @ maps @ kernel.T
    top = min(form.top_cells, maps.shape[1] * maps.shape[2])
    return maps, maps.flatten(1).topk(top, dim=1).values.mean(dim=1)


def smoothing_matrix(side: int, sigma: float) -> Tensor:
    """A Gaussian along one axis of ``side`` cells as a matrix, rows summing to one (renormalised at the border)."""
    cells = torch.arange(side)
    weights = torch.exp(-0.5 * ((cells[:, None] - cells) / sigma).square())
    return weights / weights.sum(dim=1, keepdim=True)


def resampling(n_in: int, n_out: int) -> Tensor:
    """One axis of an image resize as a matrix (n_out, n_in): area averages down, bilinear up.

    Two matrix products resize an image exactly, and every exporter knows them.
    """
    edges = torch.linspace(0, n_in, n_out + 1, dtype=torch.float64)
    if n_out <= n_in:
        pixels = torch.arange(n_in, dtype=torch.float64)
        overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
        return (overlap.clamp_min(0) * n_out / n_in).float()
    identity = torch.eye(n_in).unsqueeze(0)
    return functional.interpolate(identity, size=n_out, mode="linear", align_corners=False)[0].T.contiguous()


def save(path: Path, memory: Memory, *, provenance: Mapping[str, str] | None = None) -> None:
    """Write a memory as a safetensors file: the trunks are not in it."""
    state = {"normal_scores": torch.tensor(memory.normal_scores)}
    for name, bank in zip(TRUNK_NAMES, memory.banks, strict=True):
        state |= {
            f"{name}.mean": bank.mean,
            f"{name}.projection": bank.projection,
            f"{name}.patches": bank.patches.half(),
            f"{name}.scale": torch.tensor([bank.centre, bank.spread], dtype=torch.float64),
        }
    header = {**(provenance or {}), "family": "memory", "form": json.dumps(asdict(memory.form))}
    weights_file.write(path, state, header)


def load(path: Path) -> Memory:
    """Read what ``save`` wrote.

    Raises:
        ConfigError: the file is absent, or holds no memory of this release.
    """
    state, header = weights_file.read(path, what="memory")
    try:
        raw: dict[str, Any] = json.loads(header["form"])
        settings: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
        form = MemoryForm(**settings)
        banks = [
            Bank(
                state[f"{name}.mean"],
                state[f"{name}.projection"],
                state[f"{name}.patches"].half(),
                *state[f"{name}.scale"].tolist(),
            )
            for name in TRUNK_NAMES
        ]
        if any((bank.patches.ndim == 3) != (form.alike > 0) for bank in banks):
            raise ValueError("its patches are not those of its form")
        return Memory(form, (banks[0], banks[1]), tuple(state["normal_scores"].tolist()))
    except (KeyError, TypeError, ValueError) as error:
        raise weights_file.not_ours(path, "memory", error) from error
