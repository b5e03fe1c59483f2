"""Classes among unknowns: how many, which unknowns make each, how compact it is, and what known class lies nearest.

The number of classes and the classes themselves are found among unknowns and the labelled bank together: an unknown
that is nothing new joins a known class and needs no decision. Distances and silhouettes are those of the space that
discovery heads read: directions whitened by how samples of one known class differ, unit length (0 to 2 apart).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError
from semwatch.models.head_bank import Bank
from semwatch_training.discovery.clustering import UNLABELLED, class_means, plain_kmeans, squared_distances
from semwatch_training.discovery.discovery_heads import HeadSettings
from semwatch_training.discovery.estimate_k import SPAN, KEstimate, estimate, silhouettes, unit_length
from semwatch_training.discovery.fit_head import MIN_PER_CLASS
from semwatch_training.discovery.novel_classes import discover, predict
from semwatch_training.discovery.whitening import principal_components
from semwatch_training.system.progress_bars import Progress

COHESIVE = 0.05
"""Mean silhouette from which a class counts as one that stands out; the recipe's own threshold comes later."""
STRAY = 2.0
"""A member so many times as far from its nearest as the middle one is no part of the class."""
APART = 1.05
"""How far the halves of a group of one kind lie apart, in radii of known classes: 19 of 20 groups less (measured on
the shipped crops, docs/learning.md)."""
SMALLEST_LOOK = 4
"""Fewer odd crops are no kind of their own: take them out one by one."""
MAX_SOUGHT = 400
"""Unknowns among which classes are sought at once."""
MAX_BANK = 2000
"""Labelled crops that take part; of more, the largest classes are thinned: the rest adds nothing about novel ones."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A class that was found among unknowns."""

    members: NDArray[np.intp]
    """Rows of the unknowns, the most typical (largest silhouette) first."""
    cohesion: float
    """Mean silhouette of the members among all classes, known ones included, from -1 to 1; 0 for a single member."""
    nearest_known: str | None
    """None where no class is known."""
    nearest_distance: float
    """Between the members' mean and the nearest known class's; NaN where no class is known."""
    looks: int = 1
    """Kinds of defect that its members look like."""

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.members)


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """What was found among m unknowns."""

    classes: tuple[Candidate, ...]
    """Largest first."""
    known: tuple[str | None, ...]
    """m known classes that unknowns were given to; None for members of a found class."""
    silhouette: NDArray[np.float32]
    """(m,) how much nearer each lies to its own class than to the next, from -1 to 1."""
    k: KEstimate
    """Number of classes, known ones included, with interval and curves."""


def find(
    bank: Bank,
    features: NDArray[np.float32],
    *,
    frozen_width: int,
    seed: int,
    progress: Progress = lambda *_: None,
) -> Candidates:
    """Find the classes that unknowns make beside those of the bank.

    No more classes are looked for than give ``MIN_PER_CLASS`` unknowns to each: fewer unknowns than that make none. Nor
    are more than ``SPAN`` at once: what is left is found in the next cycle.

    Of more than ``MAX_SOUGHT`` unknowns, classes are sought among a chance part, and the others are given to them: with
    thousands, every look of one class becomes a class of its own.

    Args:
        bank: labelled crops; may be empty.
        features: (m, D) of unknowns, the same features as the bank's; m = 0 finds nothing.
        frozen_width: leading features that are read, see ``HeadFit``; with the trained ones too, fewer compact classes
            were found on development crops.
        seed: of thinning, clustering and heads.
        progress: called after every step.

    Raises:
        ConfigError: features that are not finite, or of another width than the bank's.
    """
    _check(bank, features)
    names = sorted(set(bank.labels))
    sought = np.sort(np.random.default_rng(seed).permutation(len(features))[:MAX_SOUGHT])
    n_new = min(SPAN, len(sought) // MIN_PER_CLASS)
    if len(features) == 0 or (not names and n_new == 0):
        return _nothing(len(features), len(names))
    labelled = np.array([names.index(label) for label in bank.labels], np.int64)
    kept = _thinned(labelled, MAX_BANK, seed)
    everything = np.concatenate((bank.features[kept, :frozen_width], features[:, :frozen_width]))
    labels = np.concatenate((labelled[kept], np.full(len(features), UNLABELLED)))
    shown = np.concatenate((np.arange(len(kept)), len(kept) + sought))
    ks = range(max(1, len(names)), len(names) + n_new + 1)
    progress("number of classes", 0, 1)
    k = estimate(everything[shown], labels[shown], candidates=ks, seed=seed)
    progress("number of classes", 1, 1)
    believable = range(k.k, max(k.k, min(k.interval[1], ks[-1])) + 1)
    tried = [_found(everything, labels, shown, names, k, n, seed, progress) for n in believable]
    return max(tried, key=_n_cohesive)  # the first of equals: no more classes than there is reason for


def _found(
    everything: NDArray[np.float32],
    labels: NDArray[np.int64],
    shown: NDArray[np.intp],
    names: Sequence[str],
    k: KEstimate,
    n: int,
    seed: int,
    progress: Progress,
) -> Candidates:
    """What discovery finds when it looks for n classes, known ones included, in the rows that it is shown."""
    found = discover(everything[shown], labels[shown], n, HeadSettings(seed=seed), progress=progress)
    assignment = np.where(labels < 0, predict(found, everything).argmax(axis=1), labels)
    assignment[shown] = found.assignment
    space = unit_length(np.asarray((everything - found.heads.mean) @ found.heads.directions, np.float32))
    return _described(space, assignment, labels, names, k, n)


def _n_cohesive(found: Candidates) -> int:
    """Unknowns in classes that stand out."""
    return sum(c.size for c in found.classes if c.cohesion >= COHESIVE and c.size >= MIN_PER_CLASS)


def is_inside(features: NDArray[np.float32], members: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which features (m, D) lie within the range of a class's members (n, D): (m,).

    Inside is what lies no farther from its nearest member than members do from theirs; where features are many, a
    quarter more already lets another kind in. A member far from all others is one that clustering put there by mistake,
    and has no part in it. A class of one has no range.
    """
    if len(members) < 2 or not len(features):
        return np.zeros(len(features), np.bool_)
    # By medians first, which a stray does not move: by deviations it would hide itself.
    nearest = _to_nearest(members, _floored(np.median(np.abs(members - np.median(members, axis=0)), axis=0)))
    members = members[nearest <= STRAY**2 * max(float(np.median(nearest)), 1e-9)]
    spread = _floored(members.std(axis=0))  # of the members alone: strangers must not widen what they are measured by
    reach = float(_to_nearest(members, spread).max())
    own, others = (np.asarray(x / spread, np.float32) for x in (members, features))
    return np.asarray(squared_distances(others, own).min(axis=1) <= max(reach, 1e-9), np.bool_)


def _floored(spread: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(spread + 0.1 * spread.mean() + 1e-6, np.float32)


def _to_nearest(members: NDArray[np.float32], spread: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances (n,) of members (n, D) to the nearest other, in spreads (D,)."""
    own = np.asarray(members / spread, np.float32)
    among = squared_distances(own, own)
    np.fill_diagonal(among, np.inf)
    return np.asarray(among.min(axis=1), np.float32)


def looks_of(space: NDArray[np.float32], known: NDArray[np.float32], labels: NDArray[np.int64]) -> int:
    """How many kinds of defect a group seems to hold: 1, or 2 where its halves lie far apart.

    The group is cut in two by k-means. Two halves of one kind lie apart by about as much as the crops of a known class
    lie from its middle; halves of two kinds by more than ``APART`` times that.

    Args:
        space: (m, d) of the group, in the space that discovery heads read.
        known: (n, d) of labelled crops in the same space.
        labels: (n,) their classes, 0..C-1.
    """
    if len(space) < 2 * MIN_PER_CLASS or not len(known):
        return 1
    radius = float(np.sqrt(np.square(known - class_means(known, labels)[labels]).sum(axis=1).mean()))
    half = plain_kmeans(space, 2, seed=0).assignment
    if np.bincount(half, minlength=2).min() < SMALLEST_LOOK or radius <= 0:
        return 1
    apart = float(np.linalg.norm(space[half == 0].mean(axis=0) - space[half == 1].mean(axis=0)))
    return 2 if apart > APART * radius else 1


def split(features: NDArray[np.float32], parts: int, *, seed: int) -> NDArray[np.int64]:
    """Split the members of one class as a person asked: the part of each (n,), part 0 the largest.

    Args:
        features: (n, D) of the members.
        parts: 2 or more.
        seed: of the clustering.

    Raises:
        ConfigError: fewer than two parts, fewer than ``MIN_PER_CLASS`` members for each, members that are all alike, or
            features that are not finite.
    """
    if parts < 2:
        raise ConfigError(f"a class is split into 2 parts or more, not {parts}")
    if len(features) < parts * MIN_PER_CLASS:
        raise ConfigError(
            f"{len(features)} members are too few for {parts} parts: each needs {MIN_PER_CLASS}; ask for fewer parts, "
            f"or wait for more members"
        )
    _check_finite(features, "members")
    if (n_distinct := len(np.unique(features, axis=0))) < parts:
        raise ConfigError(f"the {len(features)} members have only {n_distinct} different looks, not {parts}")
    found = plain_kmeans(principal_components(features), parts, seed=seed).assignment
    by_size = np.argsort(-np.bincount(found, minlength=parts), kind="stable")
    return np.argsort(by_size)[found]


def _described(
    space: NDArray[np.float32],
    assignment: NDArray[np.int64],
    labels: NDArray[np.int64],
    names: Sequence[str],
    k: KEstimate,
    n: int,
) -> Candidates:
    """Candidates that discovery found; the labelled come first in ``space`` (n, d), the m unknowns after them."""
    unknown = labels < 0
    distances = np.sqrt(squared_distances(space, space))
    np.fill_diagonal(distances, 0.0)
    silhouette = silhouettes(distances, assignment)[unknown]
    of_unknowns, known_means = assignment[unknown], class_means(space, labels)
    classes = []
    for c in range(len(names), n):
        members = np.flatnonzero(of_unknowns == c)
        if len(members):
            members = members[np.argsort(-silhouette[members], kind="stable")]
            nearest, distance = _nearest(space[unknown][members].mean(axis=0), known_means, names)
            looks = looks_of(space[unknown][members], space[~unknown], labels[~unknown])
            classes.append(Candidate(members, float(silhouette[members].mean()), nearest, distance, looks))
    classes.sort(key=lambda found: -found.size)
    known = tuple(names[c] if c < len(names) else None for c in of_unknowns)
    return Candidates(tuple(classes), known, silhouette, k)


def _nearest(mean: NDArray[np.float32], known: NDArray[np.float32], names: Sequence[str]) -> tuple[str | None, float]:
    if not names:
        return None, math.nan
    distances = np.linalg.norm(known - mean, axis=1)
    return names[int(distances.argmin())], float(distances.min())


def _nothing(m: int, n_known: int) -> Candidates:
    k = KEstimate(n_known, (n_known, n_known), (n_known,), {}, "consensus")
    return Candidates((), (None,) * m, np.zeros(m, np.float32), k)


def _thinned(labels: NDArray[np.int64], n: int, seed: int) -> NDArray[np.intp]:
    """Rows, ascending: all, or where they are more than n, a chance part of the largest classes alone."""
    counts = np.bincount(labels)
    cap = max((cap for cap in range(1, counts.max(initial=1) + 1) if np.minimum(counts, cap).sum() <= n), default=1)
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(labels == c))[:cap] for c in range(len(counts))]
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.intp)


def _check(bank: Bank, features: NDArray[np.float32]) -> None:
    if features.ndim != 2 or (len(bank) and len(features) and features.shape[1] != bank.features.shape[1]):
        raise ConfigError(
            f"unknowns have features of shape {features.shape}, the bank's have {bank.features.shape[1]} a crop: "
            f"encode the unknowns with the encoder that the head belongs to"
        )
    _check_finite(features, "unknowns")
    _check_finite(bank.features, "crops of the bank")


def _check_finite(features: NDArray[np.float32], of_what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ConfigError(
            f"features of {len(bad)} {of_what} hold NaN or infinity, the first at row {bad[0]}; encode them again"
        )
