"""Discovery heads: name the known classes and find the novel ones, on cached features of a frozen encoder.

A labelled head (prototypes 0..C-1, trained on labels) and an unlabelled head (prototypes C..k-1, trained on Sinkhorn
pseudo-labels) share one softmax. Features are cached and small, so every step sees the whole bank and a fit takes
seconds. What is fitted is inductive: ``predict`` names images that were not there. The defect-free class is a labelled
class like any other.

Source: IC-DefectNCD section 3.4.3; UNO for concatenated heads and swapped views; SimGCD for the unified head.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from semwatch.errors import ConfigError
from semwatch_training.discovery.clustering import plain_kmeans, semi_supervised_kmeans
from semwatch_training.discovery.discovery_heads import HeadSettings, Rule, log_probabilities, train
from semwatch_training.discovery.whitening import within_class_metric
from semwatch_training.system.progress_bars import Progress


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
        progress: called after every epoch.

    Raises:
        ConfigError: arrays that do not fit each other, NaN, no unlabelled sample, fewer samples than k, labels with
            gaps or out of range, or samples that must be novel where k leaves no novel class.
    """
    settings = settings or HeadSettings()
    views, labels = _as_views(features), np.asarray(labels, np.int64)
    n_known = check_problem(views, labels, k)
    is_novel = _must_be_novel(gated, labels < 0, n_known, k, settings.rule)
    mean, directions = _metric(views, labels, settings)
    bank = _project(views, mean, directions)
    known = torch.from_numpy(labels)
    weight, bias, prior, losses = train(bank, known, is_novel, k, settings, progress)
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
    whitened = _project(views, *_metric(views, labels, settings)).mean(dim=0).numpy()
    found = {
        "k-means": plain_kmeans(plain, k, seed=settings.seed).assignment,
        "GCD": semi_supervised_kmeans(plain, labels, k, seed=settings.seed).assignment,
        "GCD, whitened": semi_supervised_kmeans(whitened, labels, k, seed=settings.seed).assignment,
    }
    simgcd = replace(settings, rule="unified", start="random", n_heads=1, whiten=False, components=views.shape[-1])
    variants = {
        "SimGCD": simgcd,
        "unified": replace(settings, rule="unified"),
        "gated": replace(settings, rule="gated"),
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


def _metric(
    views: NDArray[np.float32], labels: NDArray[np.int64], settings: HeadSettings
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean (D,) and directions (D, d) of what heads read."""
    n_whitened = settings.whitened_components if settings.whiten else 0
    return within_class_metric(views, labels, settings.components, whitened_components=n_whitened)


def _project(views: NDArray[np.float32], mean: NDArray[np.float32], directions: NDArray[np.float32]) -> Tensor:
    """Return what heads read, (V, n, d) of unit length; a sample at the mean stays at 0 and fits all classes alike."""
    return functional.normalize(torch.from_numpy((views - mean) @ directions), dim=-1)


def _probabilities(bank: Tensor, heads: Heads, is_novel: Tensor) -> NDArray[np.float32]:
    """Return class probabilities (n, k) averaged over views (V, n, d)."""
    weight, bias = torch.from_numpy(heads.prototypes), torch.from_numpy(heads.bias)
    log_p = log_probabilities(bank, weight[None], bias[None], heads.settings.student_temperature)[0]
    forbidden = is_novel[:, None] & (torch.arange(len(weight)) < heads.n_known)
    probabilities: NDArray[np.float32] = log_p.masked_fill(forbidden, -torch.inf).softmax(dim=-1).mean(dim=0).numpy()
    return probabilities
