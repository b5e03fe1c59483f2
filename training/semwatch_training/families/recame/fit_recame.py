"""Fit ReCAME-Net's experts on cached features, and distil them into the one student that serves.

A trunk is never run here: a fit takes seconds on one core. Every draw is of the schedule's seed.

Source: ReCAME-Net (arXiv 2510.19463): balanced softmax on all and on hard categories, mutual distillation on both, a
metric loss; weights of the terms as in its code, but where the reason stands beside them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from semwatch.errors import ConfigError
from semwatch_training.families.recame import losses
from semwatch_training.families.recame.losses import NotSelected
from semwatch_training.families.recame.network import NO_REGIONS, RecameForm, RecameNet, Regions, turned

Objective = Literal["balanced softmax", "cross entropy", "weighted", "focal"]
"""The loss of each expert on all categories."""
Metric = Literal["none", "contrastive", "raw"]
"""Normalised supervised contrastive, or the literal inter and intra losses on raw embeddings."""

INTER_WEIGHT, INTRA_WEIGHT = 0.05, 0.000625
"""The literal metric losses' weights."""
SMALLEST_DEVIATION = 1e-3


@dataclass(frozen=True, slots=True)
class Schedule:
    """How experts are fitted."""

    objective: Objective = "balanced softmax"
    hard_share: float = 0.3
    """Of all categories that are hard for a sample; 0: no hard category mining."""
    not_selected: NotSelected = "excluded"
    mutual: float = 0.6
    """Weight of mutual distillation, on all and on hard categories."""
    is_teacher_detached: bool = True
    metric: Metric = "contrastive"
    contrastive: float = 0.5
    """Weight of the supervised contrastive loss."""
    epochs: int = 40
    batch: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    dropout: float = 0.2
    """Of plain features and pooled channels, each expert's own; experts of one view would all say the same."""
    turns: bool = True
    """Regions are turned and flipped at random: how a defect lies is chance."""
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """What a network is fitted on."""

    features: Tensor
    """(n, D), regions last."""
    y: Tensor
    """(n,) class numbers below K."""
    counts: Tensor
    """(K,) crops of each class, 0 where there is none."""
    weights: Tensor
    """(n,) how much each counts, 1 on average."""


def fit(
    features: NDArray[np.float32],
    y: NDArray[np.intp],
    n_classes: int,
    *,
    regions: Regions = NO_REGIONS,
    form: RecameForm | None = None,
    schedule: Schedule | None = None,
    weights: NDArray[np.float64] | None = None,
) -> RecameNet:
    """Fit experts.

    Args:
        features: (n, D), the regions' numbers last.
        y: (n,) class numbers; a class may have a single crop, or none.
        n_classes: K.
        regions: what the last features are; by default none.
        form: of the network.
        schedule: how it is fitted.
        weights: (n,) how much each crop counts, over 0; None: all alike.

    Raises:
        ConfigError: features that are not finite, not n rows or too few for the regions, class numbers outside K, or
            crops of fewer than two classes.
    """
    crops = _checked(features, y, n_classes, weights)
    form, schedule = form or RecameForm(), schedule or Schedule()
    with threadpool_limits(limits=1), _seeded(schedule.seed):
        network = RecameNet(features.shape[1], regions, n_classes, form)
        _standardise(network, crops.features)
        _train(network, crops, schedule)
    return network.eval().requires_grad_(False)


def distil(
    teacher: RecameNet,
    features: NDArray[np.float32],
    y: NDArray[np.intp],
    *,
    schedule: Schedule | None = None,
    weights: NDArray[np.float64] | None = None,
) -> RecameNet:
    """Fit one student on what experts answer to the crops that they were fitted on: a network of one expert.

    Raises:
        ConfigError: see ``fit``.
    """
    crops = _checked(features, y, teacher.n_classes, weights)
    if features.shape[1] != teacher.width:
        raise ConfigError(f"{features.shape[1]} features a crop; these experts were fitted on {teacher.width}")
    schedule = schedule or Schedule()
    with threadpool_limits(limits=1), _seeded(schedule.seed):
        student = RecameNet(features.shape[1], teacher.regions, teacher.n_classes, replace(teacher.form, experts=1))
        student.mean.copy_(teacher.mean)
        student.deviation.copy_(teacher.deviation)
        _train(student, crops, schedule, teacher)
    return student.eval().requires_grad_(False)


def tuned(
    network: RecameNet,
    features: NDArray[np.float32],
    y: NDArray[np.intp],
    schedule: Schedule,
    moves: Callable[[str], bool],
) -> RecameNet:
    """Train a network on, in place, only the parameters that ``moves`` says by their names.

    Raises:
        ConfigError: see ``fit``.
    """
    crops = _checked(features, y, network.n_classes, None)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(moves(name))
    with threadpool_limits(limits=1), _seeded(schedule.seed):
        _train(network, crops, schedule)
    return network.eval().requires_grad_(False)


def _checked(
    features: NDArray[np.float32], y: NDArray[np.intp], n_classes: int, weights: NDArray[np.float64] | None
) -> Crops:
    n = len(y)
    if features.ndim != 2 or len(features) != n or (weights is not None and weights.shape != (n,)):
        raise ConfigError(f"features of shape {features.shape} do not fit {n} labels; give a row of each crop")
    if (n_bad := int(np.count_nonzero(~np.isfinite(features).all(axis=1)))) > 0:
        raise ConfigError(f"{n_bad} of {n} rows of features hold NaN or infinity; encode those crops again")
    if n and not (y.min() >= 0 and y.max() < n_classes):
        raise ConfigError(f"class numbers run from 0 to {n_classes - 1}, not from {y.min()} to {y.max()}")
    counts = np.bincount(y, minlength=n_classes)
    if np.count_nonzero(counts) < 2:
        raise ConfigError(f"{n} crops of {np.count_nonzero(counts)} class: a head tells two classes or more apart")
    count_as = np.ones(n) if weights is None else weights / weights.mean()
    return Crops(
        torch.from_numpy(np.ascontiguousarray(features, np.float32)),
        torch.from_numpy(y.astype(np.int64)),
        torch.from_numpy(counts.astype(np.float32)),
        torch.from_numpy(count_as.astype(np.float32)),
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's own random numbers begin anew within, and are left as they were; gradients flow whatever was set."""
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.manual_seed(seed)
        yield


def _standardise(network: RecameNet, features: Tensor) -> None:
    """Plain features to mean 0 and deviation 1; channels of regions to deviation 1, over all of their regions alike.

    Their zero stays, since a gate multiplies.
    """
    deviation = features.std(dim=0, correction=0)
    network.mean.copy_(features.mean(dim=0))
    if (width := network.regions.width) > 0:
        channels, side = network.regions
        grid = features[:, -width:].reshape(len(features), 2, channels, side**2)
        spread = grid.std(dim=(0, 3), correction=0)
        deviation[-width:] = spread[..., None].expand(-1, -1, side**2).flatten()
        network.mean[-width:] = 0
    network.deviation.copy_(deviation + SMALLEST_DEVIATION)


def _train(network: RecameNet, crops: Crops, schedule: Schedule, teacher: RecameNet | None = None) -> None:
    optimiser = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad],
        lr=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    n = len(crops.y)
    n_steps = schedule.epochs * -(-n // schedule.batch)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    network.train()
    for _ in range(schedule.epochs):
        for rows in torch.split(torch.randperm(n), schedule.batch):
            loss = _loss(network, crops, rows, schedule, teacher)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            rates.step()


def _loss(network: RecameNet, crops: Crops, rows: Tensor, schedule: Schedule, teacher: RecameNet | None) -> Tensor:
    features, y, weights = crops.features[rows], crops.y[rows], crops.weights[rows]
    if schedule.turns:
        turn, flip = torch.randint(4, ()).item(), torch.randint(2, ()).item()
        features = turned(features, network.regions, int(turn), is_flipped=bool(flip))
    parts = network.parts(features)
    embeddings = [expert.embedding(*_dropped(parts, schedule.dropout)) for expert in network.each()]
    raw = [expert.head(embedding) for expert, embedding in zip(network.each(), embeddings, strict=True)]
    is_balanced = schedule.objective == "balanced softmax"
    logits = [one + losses.prior_shift(crops.counts) for one in raw] if is_balanced else raw
    per_crop = torch.stack([_objective(one, y, crops.counts, schedule.objective) for one in logits]).sum(dim=0)
    if teacher is not None:
        with torch.no_grad():
            answers = teacher(features)
        per_crop = per_crop + losses.distillation(raw[0], answers)
    elif len(logits) > 1 or schedule.hard_share:
        per_crop = per_crop + _of_experts(logits, y, schedule)
    return (weights * per_crop).mean() + _metric(embeddings, y, schedule)


def _dropped(parts: tuple[Tensor, Tensor, Tensor], share: float) -> tuple[Tensor, Tensor, Tensor]:
    plain, average, maximum = parts
    return functional.dropout(plain, share), functional.dropout2d(average, share), maximum


def _objective(logits: Tensor, y: Tensor, counts: Tensor, objective: Objective) -> Tensor:
    """(B,) of logits that already hold the prior where the objective is balanced."""
    if objective == "focal":
        return losses.focal(logits, y)
    ce = functional.cross_entropy(logits, y, reduction="none")
    return ce * losses.class_weights(counts)[y] if objective == "weighted" else ce


def _of_experts(logits: Sequence[Tensor], y: Tensor, schedule: Schedule) -> Tensor:
    """Hard categories, those of the first expert for all, and what experts learn from each other: (B,)."""
    found = schedule.mutual * losses.mutual_distillation(logits, is_teacher_detached=schedule.is_teacher_detached)
    if schedule.hard_share == 0:
        return found
    n = losses.n_hard(logits[0].shape[1], schedule.hard_share)
    hard = losses.hard_categories(logits[0], y, n)
    among = [losses.selected(one, hard, schedule.not_selected) for one in logits]
    mined = torch.stack([functional.cross_entropy(one, y, reduction="none") for one in among]).sum(dim=0)
    mutual = losses.mutual_distillation(among, is_teacher_detached=schedule.is_teacher_detached)
    return found + mined + schedule.mutual * mutual


def _metric(embeddings: Sequence[Tensor], y: Tensor, schedule: Schedule) -> Tensor:
    if schedule.metric == "none":
        return embeddings[0].new_zeros(())
    if schedule.metric == "contrastive":
        terms = [schedule.contrastive * losses.supervised_contrastive(one, y) for one in embeddings]
    else:
        terms = [
            INTER_WEIGHT * losses.raw_inter(one, y) + INTRA_WEIGHT * losses.raw_intra(one, y) for one in embeddings
        ]
    return torch.stack(terms).sum()
