"""Protocols over labelled crops: classification, discovery, the unknown rule, the number of classes.

Each takes features and labels and gives tables, and pictures by caption. All methods of a table see the same features,
the same splits and the same seeds. Detection has a room of its own, ``evaluate_detection``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from semwatch.classification import decide
from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch_training.discovery import clustering, estimate_k
from semwatch_training.discovery.discovery_heads import HeadSettings
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import Head
from semwatch_training.discovery.labelled_crops import Crops, Searched
from semwatch_training.discovery.novel_classes import compare, discover, merge_crops
from semwatch_training.evaluation import plots
from semwatch_training.evaluation.feature_map import feature_map
from semwatch_training.evaluation.report import Cell, Table
from semwatch_training.metrics import class_metrics
from semwatch_training.metrics.adc_metrics import Adc, adc_metrics, minority_accuracy, purity_contribution_curves
from semwatch_training.metrics.uncertainty import Rate, Spread
from semwatch_training.progress_bars import Progress

Result = tuple[list[Table], dict[str, Figure]]

SCORES = ("NMI", "ARI", "accuracy", "macro-F1", "known", "novel")


# ---- classification ----


def classification(
    crops: Crops, fit: HeadFit, *, seeds: Sequence[int], significance: float, decide_confidence: float, folds: int = 4
) -> Result:
    """Judge heads by cross-validation over images: every crop is named by a head that never saw its image.

    Returns:
        ADC figures of all and of each class (of the first seed), and the confusion matrix, purity-contribution curves
        and feature map.

    Raises:
        ConfigError: fewer images than folds, or what ``fit_head`` refuses.
    """
    truth = np.array(crops.labels)
    totals: list[tuple[float, ...]] = []
    first: tuple[Adc, list[str | None], NDArray[np.float64], NDArray[np.str_]] | None = None
    for seed in seeds:
        verdicts, named, confidence = _cross_validated(crops, fit, seed, folds, significance, decide_confidence)
        adc = adc_metrics(crops.labels, verdicts, nuisance={DEFECT_FREE} & set(crops.labels))
        plain = float((named == truth).mean()), class_metrics.macro_f1(truth, named)
        shares = adc.total.accuracy, adc.total.purity, adc.total.contribution, adc.escape_rate, minority_accuracy(adc)
        totals.append((*plain, *shares))
        first = first or (adc, verdicts, confidence, named)
    if first is None:
        raise ConfigError("classification needs at least one seed")
    adc, verdicts, confidence, named = first
    names = ("accuracy of the logits", "matched macro-F1", "accuracy", "purity", "contribution", "escapes", "minority")
    summary = Table(
        "Classification",
        ("", *names),
        (("all classes", *(Spread.of(column) for column in zip(*totals, strict=True))),),
        f"{len(truth)} crops of {len(np.unique(crops.image_idx))} images, {folds}-fold over images. Accuracy counts "
        f"undecided crops as wrong; purity is that of the decided, contribution their share; minority is the accuracy "
        f"over classes under 5 % of the crops.",
    )
    rows = tuple(
        (name, figures.n_true, figures.accuracy, figures.purity, figures.contribution, figures.escape_rate)
        for name, figures in adc.by_class.items()
    )
    by_class = Table(
        "ADC by class", ("class", "crops", "accuracy", "purity", "contribution", "escapes"), rows, f"Seed {seeds[0]}."
    )
    figures = {
        "Verdicts against truth; undecided ones go to manual review": plots.confusion(crops.labels, verdicts),
        "Purity against contribution of each class": plots.purity_contribution(
            purity_contribution_curves(crops.labels, named.tolist(), confidence)
        ),
        "Features of the crops in two dimensions": feature_map(
            crops.features[:, : fit.frozen_width], crops.labels, seed=seeds[0]
        ),
    }
    return [summary, by_class], figures


def _cross_validated(
    crops: Crops, fit: HeadFit, seed: int, folds: int, significance: float, decide_confidence: float
) -> tuple[list[str | None], NDArray[np.str_], NDArray[np.float64]]:
    images = np.unique(crops.image_idx)
    if len(images) < folds:
        raise ConfigError(f"{len(images)} images cannot be split in {folds}; give more images or fewer folds")
    fold_of_image = np.random.default_rng(seed).permutation(len(images)) % folds
    fold_of = fold_of_image[np.searchsorted(images, crops.image_idx)]
    labels = np.array(crops.labels)
    verdicts: list[str | None] = [None] * len(labels)
    named, confidence = np.empty(len(labels), labels.dtype), np.zeros(len(labels))
    for fold in range(folds):
        held_out = np.flatnonzero(fold_of == fold)
        fitted = _fit(crops, fold_of != fold, fit)
        logits, p_values = _answers(fitted, crops.features[held_out])
        for row, index in enumerate(held_out):
            verdict = decide(
                logits[row],
                p_values[row],
                fitted.labels,
                significance=significance,
                decide_confidence=decide_confidence,
            )
            verdicts[index] = verdict.label
        probability = torch.from_numpy(logits).softmax(dim=1).numpy()
        named[held_out] = np.array(fitted.labels)[probability.argmax(axis=1)]
        confidence[held_out] = probability.max(axis=1)
    return verdicts, named, confidence


def _fit(crops: Crops, chosen: NDArray[np.bool_], fit: HeadFit) -> Head:
    labels = np.array(crops.labels)[chosen].tolist()
    return fit_head(crops.features[chosen], labels, fit, images=crops.image_idx[chosen].tolist())


def _answers(head: Head, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    bad = int(np.count_nonzero(~np.isfinite(features).all(axis=1)))
    if bad:  # a head has no distance to NaN, and would call it known
        raise ConfigError(f"{bad} of {len(features)} rows of features hold NaN or infinity; encode those crops again")
    with torch.no_grad():
        logits, p_values = head(torch.from_numpy(features))
    return logits.numpy(), p_values.numpy()


# ---- the unknown rule ----


def unknown_rule(crops: Crops, fit: HeadFit, *, seeds: Sequence[int], significance: float) -> Result:
    """Leave one class out in turn; a head fitted on half of the images judges the other half and the strangers.

    The score is one minus the largest p-value. Defect-free crops, where there are any, are always among the known.

    Raises:
        ConfigError: fewer than three classes, one unknown and two known ones are the least; features that are not
            finite; or what ``fit_head`` refuses of half of the images.
    """
    labels = np.array(crops.labels)
    classes = [name for name in sorted(set(crops.labels)) if name != DEFECT_FREE]
    if len(set(crops.labels)) < 3:
        raise ConfigError(f"an unknown rule needs two known classes and a stranger; these crops have only {classes}")
    rows: list[tuple[Cell, ...]] = []
    aurocs: list[float] = []
    false_alarms = n_judged = n_caught = n_strangers = 0
    for stranger in classes:
        of_class: list[float] = []
        for seed in seeds:
            known = labels != stranger
            learnt = known & _half_of_images(crops.image_idx, seed)
            head = _fit(crops, learnt, fit)
            p_known, p_strange = (
                _answers(head, crops.features[chosen])[1].max(axis=1) for chosen in (known & ~learnt, ~known)
            )
            of_class.append(class_metrics.unknown_auroc(1 - p_known, 1 - p_strange))
            false_alarms += int((p_known <= significance).sum())
            n_judged += len(p_known)
            n_caught += int((p_strange <= significance).sum())
            n_strangers += len(p_strange)
        aurocs += of_class
        rows.append((stranger, int((labels == stranger).sum()), Spread.of(of_class)))
    rows.append(("all", len(labels), Spread.of(aurocs)))
    note = (
        f"Each class left out in turn, seeds {list(seeds)}; heads fitted on half of the known crops' images. At a "
        f"stated rate of {significance:.0%}, known crops called unknown: {Rate.of(false_alarms, n_judged)} (crops are "
        f"judged once per class and seed, so the interval is too narrow); strangers called unknown: "
        f"{Rate.of(n_caught, n_strangers)}."
    )
    return [Table("Unknown rule", ("left out", "crops", "AUROC unknown against known"), tuple(rows), note)], {}


def _half_of_images(image_idx: NDArray[np.intp], seed: int) -> NDArray[np.bool_]:
    images = np.unique(image_idx)
    chosen = np.random.default_rng(seed).permutation(images)[: len(images) // 2]
    return np.isin(image_idx, chosen)


# ---- discovery ----


def discovery_in_turn(
    features: NDArray[np.float32],
    labels: Sequence[str],
    *,
    seeds: Sequence[int],
    settings: HeadSettings | None = None,
    progress: Progress,
) -> Result:
    """Leave one class unlabelled in turn, label half of the others, and find it again; k is given.

    Figures are over the unlabelled samples, one match over all of them; mean and spread over classes and seeds.

    Raises:
        ConfigError: fewer than two classes.
    """
    truth = np.array(labels)
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ConfigError(f"discovery needs a known and an unknown class; there is only {classes}")
    found: dict[str, list[tuple[float, ...]]] = {}
    done, total = count(1), len(classes) * len(seeds)
    for novel in classes:
        known_classes = [name for name in classes if name != novel]
        for seed in seeds:
            given = labelled_half(truth, known_classes, seed)
            chosen = replace(settings or HeadSettings(), seed=seed)
            for name, assignment in compare(features, given, len(classes), chosen).items():
                hidden = given < 0
                found.setdefault(name, []).append(_cluster_scores(truth[hidden], assignment[hidden], known_classes))
            progress("discovery", next(done), total)
    note = (
        f"{len(truth)} samples, {len(classes)} classes, each novel in turn, half of the other classes' samples "
        f"labelled; seeds {list(seeds)}; k given; spread over classes and seeds."
    )
    return [_cluster_table("Discovery, one class unknown in turn", found, note)], {
        "Features in two dimensions": feature_map(features, labels, seed=seeds[0])
    }


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
        progress: told after every seed.

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
        f"{n_problems} problems drawn from {len(classes)} classes, seed {seed}; true k {min(true_k)} to {max(true_k)}."
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
