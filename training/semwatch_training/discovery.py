"""Discovery heads: name the known classes and find the novel ones, on cached features of a frozen encoder.

A labelled head (prototypes 0..C-1, trained on labels) and an unlabelled head (prototypes C..k-1, trained on Sinkhorn
pseudo-labels) share one softmax. Features are cached and small, so every step sees the whole bank and a fit takes
seconds. What is fitted is inductive: ``predict`` names images that were not there. The defect-free class is a labelled
class like any other.

Rules for the pseudo-labels of unlabelled samples:

- ``gated`` (ours, default): samples that the known/unknown gate rejected may only be novel; the others may be anything.
- ``literal`` (the paper): all of them may only be novel, which is right where the unlabelled hold no known class.
- ``unified`` (SimGCD): no transport; the teacher's sharpened softmax, and mean entropy against collapse.

Source: IC-DefectNCD section 3.4.3; UNO for concatenated heads and swapped views; SimGCD for the unified head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.nn import functional

from semwatch.errors import ConfigError
from semwatch_training import sinkhorn
from semwatch_training.clustering import class_means, plain_kmeans, semi_supervised_kmeans

Rule = Literal["gated", "literal", "unified"]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How discovery heads are trained."""

    rule: Rule = "gated"
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


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Fitted heads: everything that ``predict`` reads."""

    prototypes: NDArray[np.float32]
    """(k, d), of unit length but for a linear labelled head's."""
    bias: NDArray[np.float32]
    """(k,), 0 for cosine prototypes."""
    n_known: int
    """Prototypes 0..n_known - 1 are the labelled head."""
    mean: NDArray[np.float32]
    """(D,)"""
    directions: NDArray[np.float32]
    """(D, d): heads read ``(features - mean) @ directions``, scaled to unit length."""
    settings: HeadSettings


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """Fitted heads, and what they say of the samples they were fitted on."""

    heads: Heads
    assignment: NDArray[np.int64]
    """(n,) classes; the given label where there was one."""
    probabilities: NDArray[np.float32]
    """(n, k), of the heads alone, for labelled samples too."""
    prior: NDArray[np.float32]
    """(k,) shares of the classes among unlabelled samples, as last used."""
    losses: tuple[float, ...]
    """Of every head at the end."""

    @property
    def loss(self) -> float:
        """Of the heads that were kept."""
        return min(self.losses)

    @property
    def prototypes(self) -> NDArray[np.float32]:
        """(k, d) of the heads that were kept."""
        return self.heads.prototypes


def discover(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    k: int,
    settings: HeadSettings | None = None,
    *,
    gated: NDArray[np.bool_] | None = None,
    progress: Progress = lambda *_: None,
) -> Discovery:
    """Fit heads on labelled and unlabelled samples.

    Args:
        features: (V, n, D) of V augmented views, or (n, D) of one. Views are swapped: each learns the pseudo-labels of
            another. With one view the head teaches itself.
        labels: (n,) 0..C-1 without gaps, or -1 for unlabelled.
        k: classes in all, known ones included.
        settings: how.
        gated: (n,) True where the known/unknown gate rejected the sample; read by the rule ``gated`` alone, and not for
            labelled samples. None rejects nothing.
        progress: told after every epoch.

    Raises:
        ConfigError: arrays that do not fit each other, NaN, no unlabelled sample, fewer samples than k, labels with
            gaps or out of range, or samples that must be novel where k leaves no novel class.
    """
    settings = settings or HeadSettings()
    views, labels = _as_views(features), np.asarray(labels, np.int64)
    n_known = check_problem(views, labels, k)
    is_novel = _must_be_novel(gated, labels < 0, n_known, k, settings.rule)
    mean, directions = _fit_metric(views, labels, settings)
    bank = _project(views, mean, directions)
    known = torch.from_numpy(labels)
    weight, bias, prior, losses = _fit(bank, known, is_novel, k, settings, progress)
    best = int(losses.argmin())
    kept_weight, kept_bias = weight[best].numpy(), bias[best].numpy()
    heads = Heads(kept_weight, kept_bias, n_known, mean, directions, settings)
    probabilities = _probabilities(bank, heads, is_novel)
    assignment = np.where(labels < 0, probabilities.argmax(axis=1), labels)
    return Discovery(heads, assignment, probabilities, prior[best].numpy(), tuple(losses.tolist()))


def predict(
    discovery: Discovery, features: NDArray[np.float32], *, gated: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Return class probabilities (m, k) of samples that need not have been there when the heads were fitted.

    Args:
        discovery: fitted heads.
        features: (m, D), or (V, m, D) whose views are averaged. Each sample is judged by itself.
        gated: (m,) True where the known/unknown gate rejected the sample: it may only be novel. Under ``literal`` every
            sample may only be novel.

    Raises:
        ConfigError: another width than the heads were fitted on, NaN, or nothing novel for a rejected sample.
    """
    heads, views = discovery.heads, _as_views(features)
    if views.shape[-1] != len(heads.mean):
        raise ConfigError(f"the heads were fitted on {len(heads.mean)} features a sample, these have {views.shape[-1]}")
    _check_finite(views)
    unlabelled = np.ones(views.shape[1], np.bool_)
    is_novel = _must_be_novel(gated, unlabelled, heads.n_known, len(heads.prototypes), heads.settings.rule)
    return _probabilities(_project(views, heads.mean, heads.directions), heads, is_novel)


def merge_crops(
    probabilities: NDArray[np.float32],
    area_px: NDArray[np.floating],
    image_idx: NDArray[np.int64],
    *,
    temperature: float = 50.0,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Merge the probabilities (n, k) of crops into those of their images, weighted by softmax(sqrt(area) / T).

    Returns:
        Image indices (i,), ascending, and their probabilities (i, k).

    Source: AnomalyNCD's region merging (T = 50 on MTD), without its look at the true label.
    """
    images, of_crop = np.unique(image_idx, return_inverse=True)
    logit = np.sqrt(area_px) / temperature
    largest = np.full(len(images), -np.inf)
    np.maximum.at(largest, of_crop, logit)
    weight = np.exp(logit - largest[of_crop])
    merged = np.zeros((len(images), probabilities.shape[1]))
    np.add.at(merged, of_crop, weight[:, None] * probabilities)
    return images, (merged / np.bincount(of_crop, weights=weight)[:, None]).astype(np.float32)


def compare(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    k: int,
    settings: HeadSettings | None = None,
    *,
    gated: NDArray[np.bool_] | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, NDArray[np.int64]]:
    """Return the assignments (n,) of our heads and of the baselines, on the same features and with the same seed.

    ``k-means`` sees no label. ``GCD`` is semi-supervised k-means and ``SimGCD`` the unified head from a random start,
    both on the features as they are. ``GCD, whitened`` reads what our heads read, so that their own part shows.
    ``literal`` is the paper's rule. Arguments and errors are those of ``discover``.
    """
    settings = settings or HeadSettings()
    views, labels = _as_views(features), np.asarray(labels, np.int64)
    check_problem(views, labels, k)
    plain = views.mean(axis=0) - views[0].mean(axis=0)
    whitened = _project(views, *_fit_metric(views, labels, settings)).mean(dim=0).numpy()
    found = {
        "k-means": plain_kmeans(plain, k, seed=settings.seed).assignment,
        "GCD": semi_supervised_kmeans(plain, labels, k, seed=settings.seed).assignment,
        "GCD, whitened": semi_supervised_kmeans(whitened, labels, k, seed=settings.seed).assignment,
    }
    simgcd = replace(settings, rule="unified", start="random", n_heads=1, whiten=False, components=views.shape[-1])
    variants = {
        "SimGCD": simgcd,
        "unified": replace(settings, rule="unified"),
        "heads": replace(settings, rule="gated"),
    }
    if k > labels.max() + 1:
        variants["literal"] = replace(settings, rule="literal")
    for name, variant in variants.items():
        found[name] = discover(views, labels, k, variant, gated=gated, progress=progress).assignment
    return found


def check_problem(views: NDArray[np.float32], labels: NDArray[np.int64], k: int) -> int:
    """Return the number of known classes of a discovery problem: views (V, n, D), labels (n,), k classes.

    Raises:
        ConfigError: see ``discover``.
    """
    n = views.shape[1]
    if labels.shape != (n,):
        raise ConfigError(f"{n} samples need {n} labels, got an array of shape {labels.shape}")
    _check_finite(views)
    if n < k or k < 1:
        raise ConfigError(f"{n} samples cannot make {k} classes: lower k or give more samples")
    present = np.unique(labels[labels >= 0]).astype(int)
    if labels.min() < -1 or len(present) > k or not np.array_equal(present, np.arange(len(present))):
        raise ConfigError(
            f"labels must be 0..C-1 without gaps, C at most k = {k}, and -1 for unlabelled; got {np.unique(labels)}"
        )
    if (labels >= 0).all():
        raise ConfigError("nothing to discover: every sample has a label; mark unlabelled samples with -1")
    return len(present)


def _check_finite(views: NDArray[np.float32]) -> None:
    bad = np.flatnonzero(~np.isfinite(views).all(axis=(0, 2)))
    if len(bad):
        raise ConfigError(f"features of {len(bad)} samples hold NaN or infinity, the first is sample {bad[0]}")


def _as_views(features: NDArray[np.float32]) -> NDArray[np.float32]:
    if features.ndim not in (2, 3) or features.size == 0:
        raise ConfigError(f"features must be (n, D) or (V, n, D) and not empty, got {features.shape}")
    views: NDArray[np.float32] = np.asarray(features, np.float32)
    return views[None] if views.ndim == 2 else views


def _must_be_novel(
    gated: NDArray[np.bool_] | None, unlabelled: NDArray[np.bool_], n_known: int, k: int, rule: Rule
) -> Tensor:
    """Return (n,) True where a sample may not be of a known class."""
    if gated is not None and gated.shape != unlabelled.shape:
        raise ConfigError(f"{len(unlabelled)} samples need {len(unlabelled)} gate answers, got {gated.shape}")
    if rule == "literal":
        novel = unlabelled
    elif rule == "gated" and gated is not None:
        novel = unlabelled & gated
    else:
        novel = np.zeros_like(unlabelled)
    if novel.any() and n_known == k:
        raise ConfigError(f"{novel.sum()} samples must be novel, but k = {k} leaves no class beside the known: raise k")
    return torch.from_numpy(novel)


def _fit_metric(
    views: NDArray[np.float32], labels: NDArray[np.int64], settings: HeadSettings
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean (D,) and directions (D, d) of what heads read.

    Principal directions, whitened by how samples of one labelled class differ from each other, then the principal
    directions of that: what varies inside the known classes (background, lighting, place) counts little for the novel
    ones too. Without two samples of a class there is nothing to whiten by, and plain principal directions remain.

    Source: within-class whitening as in linear discriminant analysis; Ledoit-Wolf shrinkage.
    """
    mean = views[0].mean(axis=0)
    known = labels >= 0
    residual = views[:, known] - class_means(views[0], labels)[labels[known]]
    if not settings.whiten or not residual.any():
        return mean, _principal(views[0] - mean, settings.components)
    wide = _principal(views[0] - mean, settings.whitened_components)
    covariance, _ = ledoit_wolf((residual @ wide).reshape(-1, wide.shape[1]), assume_centered=True)
    values, axes = np.linalg.eigh(covariance)
    whitening = wide @ (axes / np.sqrt(np.maximum(values, 1e-6 * values[-1]))).astype(np.float32)
    return mean, whitening @ _principal((views[0] - mean) @ whitening, settings.components)


def _principal(centred: NDArray[np.float32], components: int) -> NDArray[np.float32]:
    """Return the leading directions (D, d) of centred samples (n, D); d is less where D or n is."""
    n, D = centred.shape
    if n >= D:
        return np.ascontiguousarray(np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :components], np.float32)
    return np.ascontiguousarray(np.linalg.svd(centred, full_matrices=False)[2].T[:, :components], np.float32)


def _project(views: NDArray[np.float32], mean: NDArray[np.float32], directions: NDArray[np.float32]) -> Tensor:
    """Return what heads read, (V, n, d) of unit length; a sample at the mean stays at 0 and fits all classes alike."""
    return functional.normalize(torch.from_numpy((views - mean) @ directions), dim=-1)


def _fit(
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
        log_p = _log_probabilities(bank, *_normed(weight, bias, n_known, settings), settings.student_temperature)
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


def _log_probabilities(bank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
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


def _probabilities(bank: Tensor, heads: Heads, is_novel: Tensor) -> NDArray[np.float32]:
    """Return class probabilities (n, k) averaged over views (V, n, d)."""
    weight, bias = torch.from_numpy(heads.prototypes), torch.from_numpy(heads.bias)
    log_p = _log_probabilities(bank, weight[None], bias[None], heads.settings.student_temperature)[0]
    forbidden = is_novel[:, None] & (torch.arange(len(weight)) < heads.n_known)
    probabilities: NDArray[np.float32] = log_p.masked_fill(forbidden, -torch.inf).softmax(dim=-1).mean(dim=0).numpy()
    return probabilities
