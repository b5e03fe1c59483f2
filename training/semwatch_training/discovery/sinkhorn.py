"""Pseudo-labels by optimal transport: Sinkhorn in the log domain, over a whole bank of samples, with any class prior.

A head alone may put every sample into one cluster. Transport keeps it from doing so by saying what share of the samples
each class takes. Its parents say "the same share", batch by batch; defects are long-tailed, so here the prior is an
argument and can be estimated. The bank is whole because the encoder is frozen: n x K scores are small, and no batch has
to stand for all.

Source: UNO (Fini et al. 2021) and SwAV (Caron et al. 2020) for the use; estimated priors: BYOP; relaxed marginals:
unbalanced transport (Chizat et al. 2018).
"""

import math

import torch
from torch import Tensor

from semwatch.errors import ConfigError


def transport(
    scores: Tensor,
    prior: Tensor,
    *,
    epsilon: float = 0.05,
    strength: float = 1.0,
    max_iterations: int = 50,
    tolerance: float = 1e-3,
) -> Tensor:
    """Return soft labels (..., n, K) whose rows sum to 1 and whose column means approach the prior.

    >>> scores = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.1, 0.0], [0.2, 0.0]])
    >>> transport(scores, torch.tensor([0.5, 0.5])).argmax(dim=1).tolist()
    [0, 0, 1, 1]

    Args:
        scores: (..., n, K), larger fits better; -inf forbids a class to a sample. A class that is forbidden to every
            sample takes none, and its share goes to the others.
        prior: (K,) or (..., K) shares, not negative; scaled to sum 1. A share of 0 forbids the class.
        epsilon: temperature; smaller is harder.
        strength: 1 holds the prior exactly where it can be held, 0 ignores it and gives ``softmax(scores / epsilon)``.
        max_iterations: at most.
        tolerance: stop once no class's share is further than this from its prior, relative to 1 / K.

    Raises:
        ConfigError: NaN, an empty prior, or a sample that may belong to no class.
    """
    _check(scores, prior, epsilon)
    if scores.shape[-2] == 0:
        return scores
    log_kernel = scores / epsilon
    n, K = scores.shape[-2:]
    possible = torch.isfinite(log_kernel).any(dim=-2) & (prior > 0)
    share = torch.where(possible, prior.to(scores.dtype).expand(possible.shape), 0.0)
    log_prior = (share / share.sum(dim=-1, keepdim=True)).log().unsqueeze(-2)
    log_kernel = log_kernel.masked_fill(~possible.unsqueeze(-2), -torch.inf)
    if not torch.isfinite(log_kernel).any(dim=-1).all():
        raise ConfigError("a sample may belong to no class: every class it is allowed has a prior of 0")
    log_plan = log_kernel.log_softmax(dim=-1)
    potential = torch.zeros_like(log_prior)
    for _ in range(max_iterations):
        log_share = log_plan.logsumexp(dim=-2, keepdim=True) - math.log(n)
        if strength == 1 and (log_share.exp() - log_prior.exp()).abs().max() * K < tolerance:
            break
        step = torch.where(torch.isfinite(log_share), log_prior - log_share, 0.0)
        # The potential's fixed point under relaxation: a share of the full step, minus what was already given.
        potential = strength * (potential + step)
        log_plan = (log_kernel + potential).log_softmax(dim=-1)
    return log_plan.exp()


def update_prior(prior: Tensor, counts: Tensor, *, momentum: float = 0.9, floor: float = 0.1) -> Tensor:
    """Move a prior (..., K) towards the shares that the head itself gives, from its counts (..., K) in any unit.

    ``floor`` is the smallest share a class may fall to, in units of 1 / K: a class whose share reached 0 could never
    come back.

    >>> update_prior(torch.tensor([0.5, 0.5]), torch.tensor([30.0, 10.0]), momentum=0.0)
    tensor([0.7500, 0.2500])

    Source: BYOP, which estimates the class distribution from predictions and smooths it by a moving average.
    """
    total = counts.sum(dim=-1, keepdim=True)
    shares = torch.where(total > 0, counts / total, prior)
    raised = (momentum * prior + (1 - momentum) * shares).clamp_min(floor / prior.shape[-1])
    return raised / raised.sum(dim=-1, keepdim=True)


def _check(scores: Tensor, prior: Tensor, epsilon: float) -> None:
    if scores.isnan().any() or scores.isposinf().any():
        raise ConfigError("scores hold NaN or +inf: check the features")
    if prior.isnan().any() or (prior < 0).any() or not (prior.sum(dim=-1) > 0).all():
        raise ConfigError("a prior needs shares of at least 0 that do not all vanish")
    if epsilon <= 0:
        raise ConfigError(f"epsilon must be above 0, not {epsilon}")
    if scores.shape[-2] and scores.isneginf().all(dim=-1).any():
        raise ConfigError("a sample may belong to no class: every score is -inf")
