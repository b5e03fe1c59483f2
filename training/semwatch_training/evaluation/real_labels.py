"""Classes of real images from the served encoder's features: a logistic head on them, and clusters without labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.settings.recipe import UnknownRule
from semwatch_training.discovery import clustering
from semwatch_training.discovery.discovery_heads import HeadSettings
from semwatch_training.discovery.fit_head import MIN_IN_ALL, MIN_PER_CLASS, HeadFit
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.discovery.novel_classes import discover
from semwatch_training.evaluation import evaluate_heads, near_duplicates, real_data, real_splits
from semwatch_training.evaluation.evaluate_discovery import labelled_half
from semwatch_training.evaluation.real_line import Seen
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.metrics import class_metrics
from semwatch_training.metrics.uncertainty import Rate, Spread
from semwatch_training.system.progress_bars import Progress

EIGHT = (*real_data.FOUR_DEFECTS, "LER", real_data.CLEAN_LAYER, "CRACK", "VIA")
FIVE = (*real_data.FOUR_DEFECTS, "LER")
FOLDS, SHOTS, DRAWS = 5, 5, 10
REGION, FIELD, BOTH = "crop of the best region", "whole field as crop", "both"


class Labelled(NamedTuple):
    """Images of some classes as the encoder sees them."""

    features: dict[str, NDArray[np.float32]]
    """(n, D) by what was encoded."""
    labels: NDArray[np.str_]
    groups: NDArray[np.intp]
    fields: list[NDArray[np.uint8]]


def labelled(seen: Sequence[Seen], classes: Sequence[str]) -> Labelled | None:
    """Features and labels of the images of classes of the folder of patterns; None where fewer than two classes."""
    some = [
        one
        for one in seen
        if one.image.folder == real_data.LINE_SPACE and one.image.label in classes and one.region_features is not None
    ]
    labels = np.array([one.image.label for one in some])
    if len(set(labels.tolist())) < 2:
        return None
    region = np.stack([one.region_features for one in some if one.region_features is not None])
    field = np.stack([one.field_features for one in some if one.field_features is not None])
    fields = [one.field for one in some]
    features = {REGION: region, FIELD: field, BOTH: np.hstack((region, field))}
    return Labelled(features, labels, near_duplicates.groups(fields), fields)


def label_table(of: Labelled, *, seeds: Sequence[int], progress: Progress) -> Table:
    """Accuracy of a logistic head: cross-validated over groups of near duplicates, and from five images of a class."""
    rows: list[tuple[Cell, ...]] = []
    for done, (name, features) in enumerate(of.features.items()):
        whole, few = [], []
        for step, seed in enumerate(seeds, start=1):
            folds = real_splits.folds_of(of.labels.tolist(), of.groups, n_folds=FOLDS, seed=seed)
            named = np.empty_like(of.labels)
            for fold in range(FOLDS):
                judged = folds == fold
                if judged.any():
                    named[judged] = predicted(features[~judged], of.labels[~judged], features[judged])
            whole.append(float((named == of.labels).mean()))
            few.append(float(np.mean([_few_shot(features, of, 1000 * seed + draw) for draw in range(DRAWS)])))
            progress("labels", done * len(seeds) + step, len(of.features) * len(seeds))
        rows.append((name, features.shape[1], Spread.of(whole), Spread.of(few)))
    counts = ", ".join(f"{name} {int((of.labels == name).sum())}" for name in sorted(set(of.labels.tolist())))
    sizes = np.bincount(of.groups)
    note = (
        f"{len(of.labels)} images ({counts}) in {len(sizes)} groups of near duplicates, the largest of {sizes.max()}; "
        f"no group is on both sides. {_HEAD} Spread over seeds {list(seeds)}; few-shot also over {DRAWS} draws. CRACK "
        f"and VIA are the two of the eight classes that the design paper does not name: it speaks of cross sections."
    )
    columns = ("features of", "width", f"{FOLDS}-fold accuracy", f"{SHOTS}-shot accuracy")
    return Table(f"Labels, {len(set(of.labels.tolist()))} classes", columns, tuple(rows), note)


_HEAD = (
    f"Logistic head as the product fits it: standardised features, C = {HeadFit(frozen_width=1).regularisation}, "
    f"classes weighted alike."
)


def held_table(of: Labelled, held: Labelled, *, seeds: Sequence[int], progress: Progress) -> Table:
    """Accuracy of a logistic head learnt on one set and judged on another, without its near duplicates in the first."""
    near = near_duplicates.near(held.fields, of.fields).any(axis=1)
    if near.all():
        raise ConfigError("every held-out image is a near duplicate of one to learn from; give another --held folder")
    rows: list[tuple[Cell, ...]] = []
    truth = held.labels[~near]
    for done, (name, features) in enumerate(of.features.items(), start=1):
        judged = held.features[name][~near]
        named = predicted(features, of.labels, judged)
        few = []
        for seed in seeds:
            draws = [_drawn(of, np.random.default_rng(1000 * seed + draw)) for draw in range(DRAWS)]
            few.append(np.mean([(predicted(features[d], of.labels[d], judged) == truth).mean() for d in draws]))
        rows.append((name, Rate.of(int((named == truth).sum()), len(truth)), Spread.of(few)))
        progress("labels, held", done, len(of.features))
    note = (
        f"Learnt on {len(of.labels)} images, judged on {len(truth)} of the held-out folder; {int(near.sum())} near "
        f"duplicates of images to learn from left out. {_HEAD}"
    )
    return Table(
        "Labels, learnt here and judged on --held",
        ("features of", "accuracy", f"{SHOTS}-shot accuracy"),
        tuple(rows),
        note,
    )


def predicted(features: NDArray[np.float32], labels: NDArray[np.str_], judged: NDArray[np.float32]) -> NDArray[np.str_]:
    """Name judged features (m, D) by a logistic head on features (n, D).

    The head is fitted in the span of its n samples, where the penalty on the weights leaves it anyway: the answer is
    the same, and fewer than n numbers stand for D.
    """
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-3
    samples, others = (features - mean) / std, (judged - mean) / std
    _, spread, axes = np.linalg.svd(samples, full_matrices=False)
    axes = axes[spread > 1e-6 * max(float(spread[0]), 1e-12)]
    head = LogisticRegression(
        C=HeadFit(frozen_width=1).regularisation, max_iter=2000, class_weight="balanced", random_state=0
    ).fit(samples @ axes.T, labels)
    return np.asarray(head.predict(others @ axes.T))


def _few_shot(features: NDArray[np.float32], of: Labelled, seed: int) -> float:
    chosen = _drawn(of, np.random.default_rng(seed))
    judged = ~np.isin(of.groups, of.groups[chosen])
    if not judged.any():
        return float("nan")
    return float((predicted(features[chosen], of.labels[chosen], features[judged]) == of.labels[judged]).mean())


def _drawn(of: Labelled, rng: np.random.Generator) -> NDArray[np.intp]:
    """Five images of each class, of groups apart where there are so many."""
    chosen: list[int] = []
    for name in np.unique(of.labels):
        members = rng.permutation(np.flatnonzero(of.labels == name))
        _, first = np.unique(of.groups[members], return_index=True)
        order = [*members[np.sort(first)], *np.delete(members, first)]
        chosen += order[:SHOTS]
    return np.array(chosen, np.intp)


def stranger_tables(of: Labelled, width: int, crop_width: int, *, seeds: Sequence[int]) -> list[Table]:
    """How many crops of a class that the head does not know are recognised as strange; each class in turn.

    Args:
        of: labelled images; clean layers are defect-free.
        width: leading features that come from frozen networks.
        crop_width: of these, those that are of the crop alone.
        seeds: of the halves.

    Returns:
        No table where there are too few images for a head of half of them.
    """
    if len(of.labels) < 4 * MIN_IN_ALL or min(Counter(of.labels.tolist()).values()) < 4 * MIN_PER_CLASS:
        return []
    labels = tuple(DEFECT_FREE if name == real_data.CLEAN_LAYER else name for name in of.labels.tolist())
    crops = Crops(of.features[REGION], labels, of.groups, np.zeros(len(labels), np.intp), {}, {})
    fit = HeadFit(frozen_width=width)
    significance = UnknownRule().significance
    tables, _ = evaluate_heads.unknown_rule(crops, fit, seeds=seeds, significance=significance, crop_width=crop_width)
    return [replace(table, title=f"{table.title}, real classes") for table in tables]


# ---- discovery ----


def cluster_table(of: Labelled, *, seeds: Sequence[int]) -> Table:
    """k-means of all classes without a label, on features as they are; k is given."""
    rows: list[tuple[Cell, ...]] = []
    k = len(set(of.labels.tolist()))
    for name, features in of.features.items():
        found = [clustering.plain_kmeans(features - features.mean(axis=0), k, seed=seed).assignment for seed in seeds]
        rows.append((name, *_cluster_cells(of.labels, found)))
    note = (
        f"{len(of.labels)} images of {', '.join(sorted(set(of.labels.tolist())))}; accuracy after one Hungarian match."
    )
    return Table(f"Discovery, k-means of {k} classes", ("features of", "NMI", "ARI", "accuracy"), tuple(rows), note)


def _cluster_cells(truth: NDArray[np.str_], found: Sequence[NDArray[np.integer]]) -> tuple[Spread, Spread, Spread]:
    return (
        Spread.of(class_metrics.nmi(truth, one) for one in found),
        Spread.of(class_metrics.ari(truth, one) for one in found),
        Spread.of(class_metrics.accuracy(truth, one) for one in found),
    )


def discovery_table(of: Labelled, width: int, *, seeds: Sequence[int], progress: Progress) -> Table:
    """The product's own discovery: one class unlabelled in turn, half of the others' images labelled, k given.

    Args:
        of: with the crops of regions, which is what the product discovers in.
        width: leading features of the encoder that come from frozen networks; discovery reads these.
        seeds: of labels and heads.
        progress: called after every problem.
    """
    features = np.ascontiguousarray(of.features[REGION][:, :width])
    classes = sorted(set(of.labels.tolist()))
    scores: dict[str, list[tuple[float, float, float]]] = {}
    done = 0
    for novel in classes:
        for seed in seeds:
            given = labelled_half(of.labels, [name for name in classes if name != novel], seed)
            found = {
                "product": discover(features, given, len(classes), HeadSettings(seed=seed)).assignment,
                "k-means": clustering.plain_kmeans(
                    features - features.mean(axis=0), len(classes), seed=seed
                ).assignment,
            }
            hidden = given < 0
            for name, assignment in found.items():
                truth, mine = of.labels[hidden], assignment[hidden]
                scores.setdefault(name, []).append(
                    (
                        class_metrics.nmi(truth, mine),
                        class_metrics.ari(truth, mine),
                        class_metrics.accuracy(truth, mine),
                    )
                )
            done += 1
            progress("discovery", done, len(classes) * len(seeds))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, *(Spread.of(column) for column in zip(*some, strict=True))) for name, some in scores.items()
    )
    note = (
        f"{len(of.labels)} images, each of {len(classes)} classes novel in turn, half of the others' labelled; over "
        f"the unlabelled images; spread over {len(classes)} x {len(seeds)} problems; crops of the best region."
    )
    return Table("Discovery, one class unknown in turn", ("method", "NMI", "ARI", "accuracy"), rows, note)
