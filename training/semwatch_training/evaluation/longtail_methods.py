"""Ways to fit a head on a long tail, all on the same crops: what is common, what others propose, ReCAME-Net's parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from semwatch_training.discovery.fit_head import HeadFit
from semwatch_training.families.recame import losses
from semwatch_training.families.recame.classifier import Student
from semwatch_training.families.recame.fit_recame import Schedule, distil, fit, tuned
from semwatch_training.families.recame.network import RecameForm, RecameNet, Regions

Fitted = Callable[[Tensor], Tensor]
"""Logits (B, K) of features (B, D)."""


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """Crops to learn from."""

    features: NDArray[np.float32]
    y: NDArray[np.intp]
    n_classes: int
    regions: Regions
    seed: int

    @property
    def counts(self) -> Tensor:
        """(K,) crops of each class."""
        return torch.from_numpy(np.bincount(self.y, minlength=self.n_classes).astype(np.float32))


PLAIN = Schedule(objective="cross entropy", hard_share=0.0, mutual=0.0, metric="none")
"""Of one network without any of ReCAME-Net's parts."""
ONE = RecameForm(experts=1, attention=False)
NCL = Schedule(not_selected="zero", is_teacher_detached=False, metric="none")
EXPERTS, STUDENT = "ReCAME-Net, experts", "ReCAME-Net, student"
CROSS_ENTROPY, BALANCED, LINEAR = "cross entropy", "balanced softmax", "linear head in service"


def network(form: RecameForm, schedule: Schedule) -> Callable[[Tail], RecameNet]:
    """A way to fit experts."""

    def fitted(tail: Tail) -> RecameNet:
        own = replace(schedule, seed=tail.seed)
        return fit(tail.features, tail.y, tail.n_classes, regions=tail.regions, form=form, schedule=own)

    return fitted


def student(tail: Tail) -> Fitted:
    """What serves."""
    schedule = Schedule(seed=tail.seed)
    teacher = network(RecameForm(), schedule)(tail)
    return Student(distil(teacher, tail.features, tail.y, schedule=schedule))


def adjusted(tail: Tail) -> Fitted:
    """Cross entropy, and afterwards the logits less the log of each class's number (Menon et al. 2021)."""
    plain, shift = network(ONE, PLAIN)(tail), losses.prior_shift(tail.counts.clamp_min(1))
    return lambda features: plain(features) - shift


def classifier_again(tail: Tail) -> Fitted:
    """Decoupled, cRT (Kang et al. 2020): cross entropy, then the head alone again with classes of equal weight."""
    schedule = replace(PLAIN, objective="weighted", epochs=20, seed=tail.seed)
    return tuned(network(ONE, PLAIN)(tail), tail.features, tail.y, schedule, lambda name: ".head." in name)


def biases(tail: Tail) -> Fitted:
    """Like LIFT (Shi et al. 2024): weights stay as cross entropy left them; biases and the head learn the tail."""
    schedule = replace(PLAIN, objective="balanced softmax", epochs=20, seed=tail.seed)
    moved = network(ONE, PLAIN)(tail)
    return tuned(moved, tail.features, tail.y, schedule, lambda name: name.endswith("bias") or ".head." in name)


def linear(tail: Tail, *, is_balanced: bool = True, tau: float = 0.0) -> Fitted:
    """The product's linear head; ``tau``: class vectors over that power of their length (tau-norm, Kang et al.)."""
    mean, std = tail.features.mean(axis=0), tail.features.std(axis=0) + 1e-3
    standard = (tail.features - mean) / std
    # In the span of the samples, where the penalty leaves the weights anyway.
    _, spread, axes = np.linalg.svd(standard, full_matrices=False)
    axes = axes[spread > 1e-6 * max(float(spread[0]), 1e-12)]
    weight = "balanced" if is_balanced else None
    found = LogisticRegression(C=HeadFit(frozen_width=1).regularisation, max_iter=2000, class_weight=weight)
    found.fit(standard @ axes.T, tail.y)
    directions = found.coef_ @ axes
    length = np.linalg.norm(directions, axis=1, keepdims=True)
    layer = nn.Linear(len(mean), tail.n_classes)
    with torch.no_grad():
        scaled = directions / length**tau / std
        bias = found.intercept_ * (tau == 0) - scaled @ mean  # tau-norm drops the biases
        layer.weight.copy_(torch.from_numpy(scaled))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer.requires_grad_(False)


FULL, FORM = Schedule(), RecameForm()

METHODS: Mapping[str, Callable[[Tail], Fitted]] = MappingProxyType(
    {
        LINEAR: linear,
        CROSS_ENTROPY: network(ONE, PLAIN),
        "weighted cross entropy": network(ONE, replace(PLAIN, objective="weighted")),
        "focal": network(ONE, replace(PLAIN, objective="focal")),
        "logit adjustment": adjusted,
        BALANCED: network(ONE, replace(PLAIN, objective="balanced softmax")),
        "decoupled, head again": classifier_again,
        "decoupled, tau-norm of a linear head": lambda tail: linear(tail, is_balanced=False, tau=1.0),
        "LIFT-like, biases and head": biases,
        "NCL-like, three experts": network(replace(FORM, attention=False), NCL),
        EXPERTS: network(FORM, FULL),
        STUDENT: student,
        "experts, two": network(replace(FORM, experts=2), FULL),
        "experts, one": network(replace(FORM, experts=1), FULL),
        "experts without attention": network(replace(FORM, attention=False), FULL),
        "experts without hard categories": network(FORM, replace(FULL, hard_share=0.0)),
        "experts, hard categories times 0": network(FORM, replace(FULL, not_selected="zero")),
        "experts without mutual distillation": network(FORM, replace(FULL, mutual=0.0)),
        "experts, parent's distillation": network(FORM, replace(FULL, is_teacher_detached=False)),
        "experts without metric loss": network(FORM, replace(FULL, metric="none")),
        "experts, raw metric loss": network(FORM, replace(FULL, metric="raw")),
        "experts without turns": network(FORM, replace(FULL, turns=False)),
    }
)
"""By what they are called in the tables; the rows after the student are ReCAME-Net with one part changed."""
CLUSTERED = (CROSS_ENTROPY, BALANCED, "NCL-like, three experts", EXPERTS, STUDENT)
"""Judged on classes of planted clusters too."""
