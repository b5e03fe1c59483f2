"""Protocols of discovery over labelled crops: novel classes among known ones, and their number.

All methods of a table see the same features, the same labels and the same seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.discovery import clustering, estimate_k
from semwatch_training.discovery.discovery_heads import HeadSettings
from semwatch_training.discovery.labelled_crops import Crops, Searched
from semwatch_training.discovery.novel_classes import compare, discover, merge_crops
from semwatch_training.evaluation import plots
from semwatch_training.evaluation.feature_map import feature_map
from semwatch_training.evaluation.report import Cell, Result, Table
from semwatch_training.metrics import class_metrics
from semwatch_training.metrics.uncertainty import Spread
from semwatch_training.system.progress_bars import Progress

SCORES = ("NMI", "ARI", "accuracy", "macro-F1", "known", "novel")


# ---- novel classes ----


def discovery_in_turn(
    features: NDArray[np.float32],
    labels: Sequence[str],
    *,
    seeds: Sequence[int],
    groups: Mapping[str, Sequence[str]] | None = None,
    of: str = "class",
    settings: HeadSettings | None = None,
    progress: Progress,
) -> Result:
    """Leave one group of classes unlabelled in turn, label half of the others, and find it again; k is given.

    Figures are over the unlabelled samples, one match over all of them.

    Args:
        features: (n, D).
        labels: of the samples.
        seeds: of labels, clustering and heads.
        groups: classes that are novel together, by name; None: each class alone.
        of: what a group is, such as "stage"; for the titles.
        settings: of the heads.
        progress: called after every problem.

    Returns:
        Mean and spread over groups and seeds, then ARI of each group, and a map of the features.

    Raises:
        ConfigError: fewer than two classes, or a group of none or of all of them.
    """
    truth = np.array(labels)
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ConfigError(f"discovery needs a known and an unknown class; there is only {classes}")
    groups = groups or {name: (name,) for name in classes}
    if bad := [name for name, novel in groups.items() if not 0 < len(set(novel) & set(classes)) < len(classes)]:
        raise ConfigError(f"with {of} {bad[0]!r} unknown there is no known or no novel class among {classes}")
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    done, total = count(1), len(groups) * len(seeds)
    for group, novel in groups.items():
        known_classes = [name for name in classes if name not in novel]
        for seed in seeds:
            given = labelled_half(truth, known_classes, seed)
            chosen = replace(settings or HeadSettings(), seed=seed)
            for name, assignment in compare(features, given, len(classes), chosen).items():
                hidden = given < 0
                scores = _cluster_scores(truth[hidden], assignment[hidden], known_classes)
                found.setdefault(name, {}).setdefault(group, []).append(scores)
            progress("discovery", next(done), total)
    note = (
        f"{len(truth)} samples, {len(classes)} classes, each {of} novel in turn, half of the other classes' samples "
        f"labelled; seeds {list(seeds)}; k given; spread over {len(groups)} x {len(seeds)} problems. Ours is "
        f"{(settings or HeadSettings()).rule!r}, the rest are baselines and other rules on the same features."
    )
    pooled = {name: [scores for runs in by_group.values() for scores in runs] for name, by_group in found.items()}
    tables = [
        _cluster_table(f"Discovery, one {of} unknown in turn", pooled, note),
        _table_by_group(found, groups, of),
    ]
    return tables, {"Features in two dimensions": feature_map(features, labels, seed=seeds[0])}


def _table_by_group(
    found: Mapping[str, Mapping[str, list[tuple[float, ...]]]], groups: Mapping[str, Sequence[str]], of: str
) -> Table:
    ari = SCORES.index("ARI")
    rows: list[tuple[Cell, ...]] = [
        (group, len(groups[group]), *(Spread.of(run[ari] for run in by_group[group]) for by_group in found.values()))
        for group in groups
    ]
    return Table(f"ARI by unknown {of}", (f"unknown {of}", "novel classes", *found), tuple(rows), "Spread over seeds.")


def discovery_of_images(
    base: Crops,
    found: Searched,
    *,
    frozen_width: int,
    seeds: Sequence[int],
    settings: HeadSettings | None = None,
    progress: Progress,
) -> Result:
    """Name images by what the search found in them: labelled base classes, novel classes unlabelled, k given.

    AnomalyNCD's setting: images whose gate stayed shut are defect-free; the others get the area-weighted class of their
    crops. One match over all images, defect-free ones included.

    Args:
        base: labelled crops of other material.
        found: the searched images; their labels are only read to judge.
        frozen_width: leading features that discovery reads.
        seeds: of clustering and heads.
        settings: of the heads.
        progress: called after every seed.

    Raises:
        ConfigError: the base holds no defect, or what ``discover`` refuses, such as fewer crops than classes.
    """
    base_names = sorted(set(base.labels) - {DEFECT_FREE})
    if not base_names:
        raise ConfigError("the labelled base holds no defect; give one of other material with classes of its own")
    kept = np.array([label in base_names for label in base.labels])
    features = np.vstack((base.features[kept], found.crops.features))[:, :frozen_width]
    of_base = np.array([base_names.index(label) for label in np.array(base.labels)[kept]])
    n_base, n_found = len(of_base), len(found.crops.features)
    given = np.concatenate((of_base, np.full(n_found, -1)))
    truth = np.array(found.labels)
    novel = sorted(set(found.crops.labels))  # defect-free among them where the gate opened in vain
    k = len(base_names) + len(novel)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for done, seed in enumerate(seeds, start=1):
        chosen = replace(settings or HeadSettings(), seed=seed)
        assignments = compare(features, given, k, chosen, gated=given < 0)
        for name, assignment in assignments.items():
            votes = np.eye(k, dtype=np.float32)[assignment[n_base:]]
            rows.setdefault(name, []).append(_image_scores(votes, found, truth))
        soft = discover(features, given, k, chosen, gated=given < 0).probabilities[n_base:]
        rows.setdefault(f"{chosen.rule}, soft votes", []).append(_image_scores(soft, found, truth))
        progress("discovery", done, len(seeds))
    opened = len(np.unique(found.crops.image_idx))
    note = (
        f"{len(truth)} images, gate open on {opened}, {n_found} crops; labelled base: {', '.join(base_names)} "
        f"({n_base} crops); {len(novel)} classes to find, k = {k} given; seeds {list(seeds)}; one match over "
        f"all images."
    )
    return [_cluster_table("Discovery from our own score maps", rows, note)], {}


def _image_scores(votes: NDArray[np.float32], found: Searched, truth: NDArray[np.str_]) -> tuple[float, ...]:
    images, probabilities = merge_crops(votes, found.crops.area_px.astype(np.float32), found.crops.image_idx)
    # A gate that stays shut says defect-free: a cluster of its own, joined by the crops' cluster that holds the most
    # like it only through the match.
    assignment = np.full(len(truth), votes.shape[1])
    assignment[images] = probabilities.argmax(axis=1)
    return _cluster_scores(truth, assignment, ())


def _cluster_scores(
    truth: NDArray[np.str_], assignment: NDArray[np.integer], known_classes: Sequence[str]
) -> tuple[float, ...]:
    split = class_metrics.known_novel(truth, assignment, known_classes)
    return (
        class_metrics.nmi(truth, assignment),
        class_metrics.ari(truth, assignment),
        class_metrics.accuracy(truth, assignment),
        class_metrics.macro_f1(truth, assignment),
        split.known,
        split.novel,
    )


def _cluster_table(title: str, found: Mapping[str, list[tuple[float, ...]]], note: str) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (name, *(Spread.of(column) for column in zip(*figures, strict=True))) for name, figures in found.items()
    ]
    return Table(title, ("method", *SCORES), tuple(rows), note)


def labelled_half(truth: NDArray[np.str_], known_classes: Sequence[str], seed: int) -> NDArray[np.intp]:
    """Class index of a random half of each known class's samples, one at least; -1 for all others: (n,)."""
    rng = np.random.default_rng(seed)
    given = np.full(len(truth), -1)
    for index, name in enumerate(known_classes):
        members = rng.permutation(np.flatnonzero(truth == name))
        given[members[: max(1, len(members) // 2)]] = index
    return given


# ---- the number of classes ----


def number_of_classes(
    features: NDArray[np.float32],
    labels: Sequence[str],
    *,
    n_problems: int,
    seed: int,
    rules: Sequence[estimate_k.Rule],
    progress: Progress,
) -> Result:
    """Draw problems from the classes at hand, known and novel ones at random, and let every rule estimate k.

    A problem has 2 or more known classes, 1 or more novel ones and 30 to 150 samples of each (all where there are
    fewer), half of the known ones' labelled.

    Raises:
        ConfigError: fewer than three classes, no problem, or features that are not finite.
    """
    truth = np.array(labels)
    classes = np.array(sorted(set(labels)))
    if n_problems < 1:
        raise ConfigError(f"rules are judged on one problem or more, not {n_problems}")
    if len(classes) < 3:
        raise ConfigError(f"problems of two known classes and a novel one need three classes; there are {len(classes)}")
    rng = np.random.default_rng(seed)
    true_k: list[int] = []
    estimates: dict[estimate_k.Rule, list[tuple[int, int, int]]] = {rule: [] for rule in rules}
    last: dict[str, plots.KCurve] = {}
    interval = (0, 0)
    for problem in range(n_problems):
        chosen, given = _drawn_problem(truth, classes, rng)
        n_known = int(given.max()) + 1
        ks = estimate_k.feasible(features[chosen], given)
        checked = clustering.checked(features[chosen], given)
        measured = estimate_k.measure(*checked, ks, seed=int(rng.integers(2**31)))
        true_k.append(len(np.unique(truth[chosen])))
        for rule in rules:
            answer = estimate_k.decide(measured, rule)
            estimates[rule].append((answer.k, *answer.interval))
            if rule == "consensus":
                interval = answer.interval
                curve = answer.curves["probability"]
                last = {"consensus": plots.KCurve(ks, curve.tolist(), answer.k)}
        progress(f"problems, {n_known} known", problem + 1, n_problems)
    rows: list[tuple[Cell, ...]] = []
    for rule, answers in estimates.items():
        table = np.array(answers)
        errors = class_metrics.k_errors(table[:, 0], true_k, table[:, 1:])
        rows.append((rule, errors.mean_abs, errors.bias, errors.exact, errors.coverage))
    note = (
        f"{n_problems} problems drawn from {len(classes)} classes, seed {seed}; true k {min(true_k)} to {max(true_k)}. "
        f"Errors are in classes, 0 is best; exact and covering shares are better when higher."
    )
    columns = ("rule", "mean |k - k*|", "bias", "exact", "interval covers k*")
    caption = "Probability of each k in the last problem"
    figures = {caption: plots.k_curves(last, interval=interval, truth=true_k[-1])} if last else {}
    return [Table("Number of classes", columns, tuple(rows), note)], figures


def _drawn_problem(
    truth: NDArray[np.str_], classes: NDArray[np.str_], rng: np.random.Generator
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Sample indices and their labels: 0.. for labelled samples of known classes, -1 for all others."""
    n_known = int(rng.integers(2, len(classes)))
    n_novel = int(rng.integers(1, len(classes) - n_known + 1))
    order = rng.permutation(classes)[: n_known + n_novel]
    chosen, given = [], []
    for index, name in enumerate(order):
        members = rng.permutation(np.flatnonzero(truth == name))[: int(rng.integers(30, 151))]
        chosen.append(members)
        labels = np.full(len(members), -1)
        if index < n_known:
            labels[: max(1, len(members) // 2)] = index
        given.append(labels)
    return np.concatenate(chosen), np.concatenate(given)
