"""Self-distillation: the head, the loss, and the signs of collapse.

Source: DINO (Caron et al. 2021).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Projection(nn.Module):
    """DINO's head: three linear layers to a unit vector, and its cosine with each prototype.

    Class tokens of a trained trunk are much alike, so they are standardised over the batch first. Without that every
    cosine is nearly the same, the centred teacher answers uniformly, and short runs learn nothing.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.BatchNorm1d(width, affine=False, track_running_stats=False),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, class_tokens: Tensor) -> Tensor:
        """Map (B, C) to cosines (B, K)."""
        unit = functional.normalize(self.mlp(class_tokens), dim=-1)
        return unit @ functional.normalize(self.prototypes, dim=-1).T


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean cross-entropy of the student's answers under the teacher's, over all pairs of different views.

    Args:
        student: cosines (B, K) of each view; the teacher's views come first, in the teacher's order.
        teacher: probabilities (B, K) of each view it saw.
        temperature: of the student.

    Source: DINO, equation 3.
    """
    log_p = [(answer / temperature).log_softmax(dim=-1) for answer in student]
    losses = [
        -(target * answer).sum(dim=-1).mean()
        for w, target in enumerate(teacher)
        for v, answer in enumerate(log_p)
        if v != w
    ]
    return torch.stack(losses).mean()


def collapse_indicators(probabilities: Tensor, class_tokens: Tensor) -> dict[str, float]:
    """How far teacher and student are from giving every crop one answer; see ``train``.

    Args:
        probabilities: the teacher's, (B, K).
        class_tokens: the student's, (B, C), unit length.
    """
    K = probabilities.shape[1]
    marginal = probabilities.mean(dim=0)
    return {
        "teacher_entropy": float(_entropy(probabilities).mean()) / math.log(K),
        "marginal_entropy": float(_entropy(marginal)) / math.log(K),
        "feature_std": float(class_tokens.float().std(dim=0, unbiased=False).mean()) * class_tokens.shape[1] ** 0.5,
    }


def _entropy(probabilities: Tensor) -> Tensor:
    summed: Tensor = torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
    return -summed
