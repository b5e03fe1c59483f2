"""Losses for long tails: those of ReCAME-Net, the parents' literal forms as named options, and those to compare with.

Logits are (B, K), targets (B,) class numbers, counts (K,) training samples of each class.

Source: ReCAME-Net (arXiv 2510.19463) and its published code; its parents NCL (Li et al. 2022, hard categories and
nested distillation) and NBOD; balanced softmax (Ren et al. 2020); focal (Lin et al. 2017); logit adjustment (Menon et
al. 2021); supervised contrastive (Khosla et al. 2020); distillation (Hinton et al. 2015).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

NotSelected = Literal["excluded", "zero"]
"""What becomes of categories that are not selected: out of the softmax (logit -inf), or the literal logit times 0."""

RAW_MARGIN = 20.0
"""Of the raw-unit metric loss: features are not normalised there."""


def prior_shift(counts: Tensor, tau: float = 1.0) -> Tensor:
    """What is added to logits so that they answer for the training set's prior: tau log n_k; absent classes -inf."""
    return tau * counts.log()


def balanced_softmax(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy (B,) under the training prior: the logits themselves then answer for classes of equal number."""
    return functional.cross_entropy(logits + prior_shift(counts), y, reduction="none")


def focal(logits: Tensor, y: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross entropy (B,) times (1 - p)^gamma: what is right already counts little."""
    ce = functional.cross_entropy(logits, y, reduction="none")
    return (1 - torch.exp(-ce)).clamp_min(0) ** gamma * ce


def class_weights(counts: Tensor) -> Tensor:
    """Weights (K,) that make every class count alike, 1 on average over the samples."""
    return counts.sum() / (counts.gt(0).sum() * counts.clamp_min(1))


def n_hard(n_classes: int, share: float = 0.3, at_least: int = 3) -> int:
    """How many categories are hard beside the target: a share of all, as NCL has it (30 of 100)."""
    return min(max(at_least, round(share * n_classes)), n_classes - 1)


def hard_categories(logits: Tensor, y: Tensor, n: int) -> Tensor:
    """Mark the target and the n others of highest logit: (B, K) bool."""
    target = functional.one_hot(y, logits.shape[1]).bool()
    others = logits.detach().masked_fill(target, -torch.inf)
    return target.scatter(1, others.topk(n, dim=1).indices, True) if n else target


def selected(logits: Tensor, hard: Tensor, not_selected: NotSelected = "excluded") -> Tensor:
    """Logits where only the marked categories compete.

    The literal form multiplies the others by 0, so they stay in the softmax as if their logit were 0; the paper's
    parent restricts the softmax in words and multiplies in code.
    """
    return logits.masked_fill(~hard, -torch.inf) if not_selected == "excluded" else logits * hard


def hard_category_loss(logits: Tensor, y: Tensor, hard: Tensor, not_selected: NotSelected = "excluded") -> Tensor:
    """Cross entropy (B,) among the marked categories."""
    return functional.cross_entropy(selected(logits, hard, not_selected), y, reduction="none")


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence (B,) of the student's probabilities from the teacher's; logits of -inf are probability 0."""
    log_p, log_q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    p = log_p.exp()
    # A difference of two infinities is no number, nor is its gradient: both are taken out before they meet.
    out = torch.isneginf(log_p) | torch.isneginf(log_q)
    difference = log_p.masked_fill(out, 0) - log_q.masked_fill(out, 0)
    return (p * difference).sum(dim=1)


def mutual_distillation(logits: Sequence[Tensor], *, is_teacher_detached: bool = True) -> Tensor:
    """Each expert learns from every other: sum of divergences over ordered pairs, over E - 1: (B,).

    The parent's form (``is_teacher_detached=False``) lets gradients flow into the teacher too, so that a sure expert is
    pulled towards an unsure one. One expert has nobody to learn from: 0.
    """
    if len(logits) < 2:
        return logits[0].new_zeros(len(logits[0]))
    pairs = [(a, b) for i, a in enumerate(logits) for j, b in enumerate(logits) if i != j]
    found = [divergence(a, b.detach() if is_teacher_detached else b) for a, b in pairs]
    return torch.stack(found).sum(dim=0) / (len(logits) - 1)


def supervised_contrastive(embedding: Tensor, y: Tensor, temperature: float = 0.1) -> Tensor:
    """Pull samples of one class together on the unit sphere, against all others of the batch: a scalar.

    Samples without another of their class in the batch give nothing; a batch without any pair gives 0.
    """
    unit = functional.normalize(embedding, dim=1)
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    similarity = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    log_share = similarity - similarity.logsumexp(dim=1, keepdim=True)
    positive = (y[:, None] == y[None]) & ~itself
    n_positive = positive.sum(dim=1)
    per_sample = -log_share.masked_fill(~positive, 0).sum(dim=1) / n_positive.clamp_min(1)
    return per_sample.sum() / n_positive.gt(0).sum().clamp_min(1)


def raw_inter(features: Tensor, y: Tensor, margin: float = RAW_MARGIN) -> Tensor:
    """The literal inter-class loss: distances of same-class pairs, and what others lack of the margin, over B^2."""
    distance, same = _distances(features), y[:, None] == y[None]
    return torch.where(same, distance, (margin - distance).clamp_min(0)).sum() / len(y) ** 2


def raw_intra(features: Tensor, y: Tensor) -> Tensor:
    """The literal intra-class loss: distances of same-class pairs, over B^2."""
    return (_distances(features) * (y[:, None] == y[None])).sum() / len(y) ** 2


def distillation(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """How far a student's softened answers are from its teachers': (B,), of the same scale at any temperature."""
    return temperature**2 * divergence(student / temperature, teacher.detach() / temperature)


def _distances(features: Tensor) -> Tensor:
    """Euclidean distances (B, B); the gradient at distance 0 is 0."""
    squared = (features[:, None] - features[None]).square().sum(dim=2)
    is_zero = squared == 0
    return torch.where(is_zero, 1.0, squared).sqrt() * ~is_zero
