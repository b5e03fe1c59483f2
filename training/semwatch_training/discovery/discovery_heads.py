"""Train discovery heads: prototypes on labels and on Sinkhorn pseudo-labels, many seeds side by side.

Rules for the pseudo-labels of unlabelled samples:

- ``gated`` (ours): samples that the known/unknown gate rejected may only be novel; the others may be anything.
- ``literal`` (the paper): all of them may only be novel, which is right where the unlabelled hold no known class.
- ``unified`` (SimGCD): no transport; the teacher's sharpened softmax, and mean entropy against collapse.

Source: IC-DefectNCD section 3.4.3; UNO for concatenated heads and swapped views; SimGCD for the unified head.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from semwatch_training.discovery import sinkhorn
from semwatch_training.discovery.clustering import semi_supervised_kmeans
from semwatch_training.system.progress_bars import Progress

Rule = Literal["gated", "literal", "unified"]


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How discovery heads are trained."""

    rule: Rule = "unified"
    """Whichever wins: on development problems ``unified``, in our metric, was as good as ``gated`` or better."""
    prior: Literal["estimated", "uniform"] = "estimated"
    """Of the classes among unlabelled samples: from the head's own predictions, or equal shares."""
    labelled_head: Literal["cosine", "linear"] = "cosine"
    start: Literal["kmeans", "random"] = "kmeans"
    """Prototypes begin at the centres of semi-supervised k-means, or anywhere."""
    n_heads: int = 8
    """Heads from different seeds; the one with the lowest loss is kept."""
    whiten: bool = True
    """Whiten by the scatter inside labelled classes; SimGCD's and GCD's features are read as they are."""
    whitened_components: int = 256
    """Principal directions that are whitened."""
    components: int = 64
    """Directions that heads read."""
    epochs: int = 60
    """Steps over the whole bank."""
    refresh_epochs: int = 4
    """The teacher's labels serve that many steps; making them costs more than a step."""
    learning_rate: float = 0.01
    student_temperature: float = 0.1
    teacher_temperatures: tuple[float, float] = (0.07, 0.04)
    """At the start, and from 40 % of the epochs on: the transport's epsilon, or the sharpening of ``unified``."""
    labelled_weight: float = 0.35
    """Share of the labelled loss."""
    entropy_weight: float = 2.0
    """Of the mean-entropy term of ``unified``; SimGCD takes 2 to 4."""
    transport_iterations: int = 10
    seed: int = 0


def train(
    bank: Tensor, labels: Tensor, is_novel: Tensor, k: int, settings: HeadSettings, progress: Progress
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train H heads side by side; return weights (H, k, d), biases (H, k), priors (H, k), losses (H,)."""
    n_known = int(labels.max()) + 1
    weight, prior = _initial(bank, labels, k, settings)
    weight.requires_grad_()
    bias = torch.zeros(weight.shape[:2], requires_grad=settings.labelled_head == "linear")
    parameters = [p for p in (weight, bias) if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs)
    total = torch.zeros(len(weight))
    unlabelled = labels < 0
    for epoch in range(settings.epochs):
        log_p = log_probabilities(bank, *_normed(weight, bias, n_known, settings), settings.student_temperature)
        # (H, V, n, k)
        if epoch % settings.refresh_epochs == 0:
            # (H, V, u, k)
            taught = log_p.detach()[:, :, unlabelled]
            target, prior = _pseudo_labels(taught, is_novel[unlabelled], prior, n_known, epoch, settings)
        total = _loss(log_p, target, labels, settings)
        optimiser.zero_grad()
        torch.autograd.backward(total.sum())
        optimiser.step()
        schedule.step()
        progress("heads", epoch + 1, settings.epochs)
    with torch.no_grad():
        weight, bias = _normed(weight, bias, n_known, settings)
    return weight, bias, prior, total.detach()


def _initial(bank: Tensor, labels: Tensor, k: int, settings: HeadSettings) -> tuple[Tensor, Tensor]:
    """Return prototypes (H, k, d), one seed per head, and the prior (H, k) they start with."""
    generator = torch.Generator().manual_seed(settings.seed)
    weight = functional.normalize(torch.randn(settings.n_heads, k, bank.shape[-1], generator=generator), dim=-1)
    prior = torch.full((settings.n_heads, k), 1 / k)
    if settings.start == "random":
        return weight, prior
    samples = functional.normalize(bank.mean(dim=0), dim=-1).numpy()
    for h in range(settings.n_heads):
        found = semi_supervised_kmeans(samples, labels.numpy(), k, seed=settings.seed + h, n_init=1)
        weight[h] = torch.from_numpy(found.centres)
        if settings.prior == "estimated":
            shares = torch.from_numpy(np.bincount(found.assignment[labels.numpy() < 0], minlength=k)).float()
            prior[h] = sinkhorn.update_prior(prior[h], shares, momentum=0.0)
    return weight, prior


def _normed(weight: Tensor, bias: Tensor, n_known: int, settings: HeadSettings) -> tuple[Tensor, Tensor]:
    """Return the prototypes with unit length; a linear labelled head keeps its own length and bias."""
    cosine = functional.normalize(weight, dim=-1)
    if settings.labelled_head == "cosine":
        return cosine, bias
    is_known = torch.arange(weight.shape[1]) < n_known
    return torch.where(is_known[:, None], weight, cosine), torch.where(is_known, bias, 0.0)


def log_probabilities(bank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities (H, V, n, k) of samples (V, n, d)."""
    cosine = torch.einsum("vnd,hkd->hvnk", bank, weight)
    return ((cosine + bias[:, None, None]) / temperature).log_softmax(dim=-1)


def _pseudo_labels(
    log_p: Tensor, is_novel: Tensor, prior: Tensor, n_known: int, epoch: int, settings: HeadSettings
) -> tuple[Tensor, Tensor]:
    """Return the teacher's soft labels (H, V, u, k) for each view, made from the view before it, and the next prior."""
    scores = settings.student_temperature * log_p  # the cosines, up to one constant a sample
    epsilon = _teacher_temperature(epoch, settings)
    if settings.rule == "unified":
        return (scores / epsilon).softmax(dim=-1).roll(1, dims=1), prior
    forbidden = is_novel[:, None] & (torch.arange(log_p.shape[-1]) < n_known)
    scores = scores.masked_fill(forbidden, -torch.inf)
    plan = sinkhorn.transport(scores, prior[:, None], epsilon=epsilon, max_iterations=settings.transport_iterations)
    if settings.prior == "estimated":
        own = (scores / epsilon).softmax(dim=-1)
        prior = sinkhorn.update_prior(prior, own.mean(dim=(1, 2)), momentum=0.7)
    return plan.roll(1, dims=1), prior


def _teacher_temperature(epoch: int, settings: HeadSettings) -> float:
    first, last = settings.teacher_temperatures
    return first + (last - first) * min(1.0, epoch / max(1.0, 0.4 * settings.epochs))


def _loss(log_p: Tensor, target: Tensor, labels: Tensor, settings: HeadSettings) -> Tensor:
    """Return each head's loss (H,) from log-probabilities (H, V, n, k) and targets (H, V, u, k) of the unlabelled."""
    is_labelled = labels >= 0
    loss = -(target * log_p[:, :, ~is_labelled]).sum(dim=-1).mean(dim=(1, 2))
    if settings.rule == "unified":
        mean_p = log_p.exp().mean(dim=(1, 2))
        # -(p log p) with a clamp: the printed log(p^-p) has a NaN gradient at p = 0.
        loss = loss + settings.entropy_weight * (mean_p * mean_p.clamp_min(1e-8).log()).sum(dim=-1)
    if not is_labelled.any():
        return loss
    own = log_p[:, :, is_labelled, labels[is_labelled]]
    return (1 - settings.labelled_weight) * loss - settings.labelled_weight * own.mean(dim=(1, 2))
