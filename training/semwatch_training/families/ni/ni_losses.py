"""Distances that say what normal tokens cannot explain, the losses made of them, and pseudo-defects of features.

Source: IC-DefectNCD section 3.2 and its parent INP-Former, whose code settles what the paper leaves open.
"""

import torch
from torch import Tensor
from torch.nn import functional


def distances(targets: Tensor, rebuilt: Tensor) -> Tensor:
    """Cosine distance per group and token: (B, G, N), range [0, 2]."""
    return 1 - functional.cosine_similarity(targets, rebuilt, dim=-1, eps=1e-6)


def matching_distances(targets: Tensor, tokens: Tensor) -> Tensor:
    """Cosine distance of each fused feature to its nearest normal token: (B, N).

    The paper's Table 4 baseline (direct NI matching), and the distance inside the NI loss.
    """
    fused = functional.normalize(targets.mean(dim=1), dim=-1, eps=1e-6)
    tokens = functional.normalize(tokens, dim=-1, eps=1e-6)
    return 1 - (fused @ tokens.transpose(1, 2)).amax(dim=-1)


def reconstruction_loss(targets: Tensor, rebuilt: Tensor, *, gamma: float = 3.0, max_weight: float = 50.0) -> Tensor:
    """Soft-mining cosine loss: hard tokens get more gradient, easy ones less; the value itself is not reweighted.

    The parent multiplies gradients in a hook. ``w b + (1 - w) stopgrad(b)`` has the value of b and w times its
    gradient, so it needs none. w = (d / mean d) ** gamma over the batch's map of a group, clipped for bf16.

    Source: IC-DefectNCD section 3.2 (cg); INP-Former ``global_cosine_hm_adaptive`` flattens each image over N and C.
    """
    with torch.no_grad():
        d = distances(targets, rebuilt)
        weight = (d / d.mean(dim=(0, 2), keepdim=True).clamp_min(1e-6)).pow(gamma).clamp_max(max_weight).unsqueeze(-1)
    mined = weight * rebuilt + (1 - weight) * rebuilt.detach()
    return 1 - functional.cosine_similarity(targets.flatten(2), mined.flatten(2), dim=-1).mean()


def normal_information_loss(
    targets: Tensor, tokens: Tensor, defect_mask: Tensor | None = None, *, margin: float = 0.5
) -> Tensor:
    """Pull normal features to their nearest normal token; push pseudo-defect features beyond a margin.

    Args:
        targets: (B, G, N, C).
        tokens: (B, M, C).
        defect_mask: (B, N) bool, True where a pseudo-defect was planted; None for the parent's coherence loss.
        margin: pseudo-defects farther than this cost nothing; unhinged, the term fights the reconstruction.

    Source: IC-DefectNCD section 3.2, L_normal, read as 1 - cosine (as printed it is a similarity).
    """
    d = matching_distances(targets, tokens)
    if defect_mask is None or not bool(defect_mask.any()):
        return d.mean()
    return d[~defect_mask].mean() + functional.relu(margin - d[defect_mask]).mean()


def plant_pseudo_defects(
    targets: Tensor, grid_hw: tuple[int, int], *, generator: torch.Generator, max_patches: int = 4
) -> tuple[Tensor, Tensor]:
    """Replace 1 to ``max_patches`` random rectangles of tokens by tokens of other images of the batch.

    Foreign tokens rather than zeros, whose cosine is undefined.

    Returns:
        The corrupted targets (B, G, N, C) and the mask (B, N), True where a token was replaced.
    """
    B, _, N, _ = targets.shape
    h, w = grid_hw
    mask = torch.zeros(B, h, w, dtype=torch.bool)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for image in mask:
        for _ in range(draw(1, max_patches + 1)):
            height, width = draw(1, max(2, h // 4)), draw(1, max(2, w // 4))
            top, left = draw(0, h - height + 1), draw(0, w - width + 1)
            image[top : top + height, left : left + width] = True
    flat = mask.reshape(B, N).to(targets.device)
    foreign = targets.roll(1, dims=0)[:, :, torch.randperm(N, generator=generator).to(targets.device)]
    return torch.where(flat[:, None, :, None], foreign, targets), flat
