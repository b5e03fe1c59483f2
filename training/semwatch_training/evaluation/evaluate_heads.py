"""Protocols of heads over labelled crops: classification as fabs judge it, and the unknown rule.

All figures of a table are of the same crops, the same splits and the same seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from semwatch.defects import DEFECT_FREE
from semwatch.errors import ConfigError
from semwatch.line.classification import decide
from semwatch.settings.recipe import UnknownRule
from semwatch_training.discovery.fit_head import HeadFit, fit_head
from semwatch_training.discovery.head import Head
from semwatch_training.discovery.labelled_crops import Crops
from semwatch_training.evaluation import plots, unknown_scores
from semwatch_training.evaluation.feature_map import feature_map
from semwatch_training.evaluation.report import Cell, Result, Table
from semwatch_training.evaluation.searched_crops import Outcome
from semwatch_training.metrics import class_metrics
from semwatch_training.metrics.adc_metrics import Adc, adc_metrics, minority_accuracy, purity_contribution_curves
from semwatch_training.metrics.uncertainty import Rate, Spread

SHARES = ("accuracy", "purity", "contribution", "escapes")
BETTER = (
    "Accuracy counts undecided defects as wrong; purity is that of the decided, contribution their share; both are "
    "better when higher. Escapes are true defects dismissed as defect-free, by the head or unseen: lower is better."
)


# ---- classification ----


def classification(
    crops: Crops,
    fit: HeadFit,
    *,
    seeds: Sequence[int],
    rule: UnknownRule,
    outcome: Outcome | None = None,
    folds: int = 4,
) -> Result:
    """Judge heads by cross-validation over images: every crop is named by a head that never saw its image.

    Heads learn from all crops. With an ``outcome`` only what the search shows a reviewer is judged, and a defect that
    it missed is an escape; without one all crops are judged, as if every defect were found.

    Returns:
        ADC figures of all and of each class, and of the first seed the confusion matrix, purity-contribution curves and
        feature map.

    Raises:
        ConfigError: fewer images than folds, no crop to judge, or what ``fit_head`` refuses.
    """
    labels = np.array(crops.labels)
    judged = np.ones(len(labels), np.bool_) if outcome is None else outcome.judged
    missed = () if outcome is None else outcome.missed
    nuisance = {DEFECT_FREE} if outcome is not None else {DEFECT_FREE} & set(crops.labels)
    truth = (*labels[judged].tolist(), *missed)
    named_right: list[tuple[float, float]] = []
    adcs: list[Adc] = []
    first: tuple[list[str | None], NDArray[np.str_], NDArray[np.float64]] | None = None
    for seed in seeds:
        verdicts, named, confidence = _cross_validated(crops, fit, seed, folds, rule)
        if not judged.any():
            raise ConfigError("the search shows no crop to judge: the gate stayed shut; raise its false alarm rate")
        shown: list[str | None] = [verdict for verdict, kept in zip(verdicts, judged, strict=True) if kept]
        shown += [DEFECT_FREE] * len(missed)
        adcs.append(adc_metrics(truth, shown, nuisance=nuisance))
        right = named[judged] == labels[judged]
        named_right.append((float(right.mean()), class_metrics.macro_f1(labels[judged], named[judged])))
        first = first or (shown, named[judged], confidence[judged])
    if first is None:
        raise ConfigError("classification needs at least one seed")
    shown, named, confidence = first
    curves = purity_contribution_curves(labels[judged].tolist(), named.tolist(), confidence)
    figures = {
        "Verdicts against truth; undecided ones go to manual review": plots.confusion(truth, shown),
        "Purity against contribution of each class": plots.purity_contribution(curves),
        "Features of the crops in two dimensions": feature_map(
            crops.features[:, : fit.frozen_width], crops.labels, seed=seeds[0]
        ),
    }
    data = f"{len(labels)} crops of {len(np.unique(crops.image_idx))} images, {folds}-fold over images, seeds "
    note = f"{data}{list(seeds)}. {_of_search(outcome, truth)} {BETTER}"
    return [_summary(adcs, named_right, note), _by_class(adcs, truth, missed)], figures


def _of_search(outcome: Outcome | None, truth: Sequence[str]) -> str:
    if outcome is None:
        return "All crops are judged, as if every defect were found: escapes are the head's alone."
    n_defects = sum(label != DEFECT_FREE for label in truth)
    opened = "" if outcome.normals_opened is None else f" The gate opened on {outcome.normals_opened} of normal images."
    return (
        f"Judged as searched: {n_defects} true defects, {len(outcome.missed)} of them missed by the search and so "
        f"escapes, and {len(truth) - n_defects} false regions.{opened}"
    )


def _summary(adcs: Sequence[Adc], named_right: Sequence[tuple[float, float]], note: str) -> Table:
    totals = [
        (*right, adc.total.accuracy, adc.total.purity, adc.total.contribution, adc.escape_rate, minority_accuracy(adc))
        for adc, right in zip(adcs, named_right, strict=True)
    ]
    cells = tuple(Spread.of(column) for column in zip(*totals, strict=True))
    columns = ("", "accuracy of the logits", "matched macro-F1", *SHARES, "minority")
    minority = "Logits and macro-F1 are of found crops alone; minority is the accuracy over classes under 5 %."
    return Table("Classification", columns, (("all classes", *cells),), f"{note} {minority}")


def _by_class(adcs: Sequence[Adc], truth: Sequence[str], missed: Sequence[str]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name in sorted(set().union(*(adc.by_class for adc in adcs))):
        runs = [adc.by_class[name] for adc in adcs if name in adc.by_class]
        shares = [(run.accuracy, run.purity, run.contribution, run.escape_rate) for run in runs]
        cells = (Spread.of(column) for column in zip(*shares, strict=True))
        rows.append((name, truth.count(name), missed.count(name), *cells))
    return Table("ADC by class", ("class", "judged", "missed by the search", *SHARES), tuple(rows), BETTER)


def _cross_validated(
    crops: Crops, fit: HeadFit, seed: int, folds: int, rule: UnknownRule
) -> tuple[list[str | None], NDArray[np.str_], NDArray[np.float64]]:
    fold_of = _folds(crops, folds, seed)
    labels = np.array(crops.labels)
    verdicts: list[str | None] = [None] * len(labels)
    named, confidence = np.empty(len(labels), labels.dtype), np.zeros(len(labels))
    for fold in range(folds):
        held_out = np.flatnonzero(fold_of == fold)
        fitted = _fit(crops, fold_of != fold, fit)
        logits, p_values = _answers(fitted, crops.features[held_out])
        for row, index in enumerate(held_out):
            verdicts[index] = decide(logits[row], p_values[row], fitted.labels, rule).label
        probability = torch.from_numpy(logits).softmax(dim=1).numpy()
        named[held_out] = np.array(fitted.labels)[probability.argmax(axis=1)]
        confidence[held_out] = probability.max(axis=1)
    return verdicts, named, confidence


def _folds(crops: Crops, folds: int, seed: int) -> NDArray[np.intp]:
    """Fold of each crop: images stay whole, and each class is spread evenly, so that rare ones can be learnt in all."""
    images, first_crop = np.unique(crops.image_idx, return_index=True)
    if len(images) < folds:
        raise ConfigError(f"{len(images)} images cannot be split in {folds}; give more images or fewer folds")
    order = np.random.default_rng(seed).permutation(len(images))
    order = order[np.argsort(np.array(crops.labels)[first_crop[order]], kind="stable")]
    fold_of_image = np.empty(len(images), np.intp)
    fold_of_image[order] = np.arange(len(images)) % folds
    return fold_of_image[np.searchsorted(images, crops.image_idx)]


def _fit(crops: Crops, chosen: NDArray[np.bool_], fit: HeadFit) -> Head:
    labels = np.array(crops.labels)[chosen].tolist()
    return fit_head(crops.features[chosen], labels, fit, images=crops.image_idx[chosen].tolist())


def _answers(head: Head, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    _check_finite(features)
    with torch.no_grad():
        logits, p_values = head(torch.from_numpy(features))
    return logits.numpy(), p_values.numpy()


def _check_finite(features: NDArray[np.float32]) -> None:
    bad = int(np.count_nonzero(~np.isfinite(features).all(axis=1)))
    if bad:  # a head has no distance to NaN, and would call it known
        raise ConfigError(f"{bad} of {len(features)} rows of features hold NaN or infinity; encode those crops again")


# ---- the unknown rule ----

ROUNDING = 1e-7
"""A p-value of .05 in single precision is a little more than .05."""
UNKNOWN_COLUMNS = ("left out", "crops", "AUROC unknown against known")


def unknown_rule(
    crops: Crops, fit: HeadFit, *, seeds: Sequence[int], significance: float, crop_width: int | None = None
) -> Result:
    """Leave one class out in turn; a head fitted on half of the images judges the other half and the strangers.

    The score is one minus the largest p-value; others stand beside it in a table of their own. Defect-free crops, where
    there are any, are always among the known.

    Args:
        crops: labelled crops.
        fit: how the head is fitted.
        seeds: of the halves.
        significance: of the recipe.
        crop_width: leading features that are of the crop alone; None: they say nothing of the field.

    Raises:
        ConfigError: fewer than three classes, one unknown and two known ones are the least; features that are not
            finite; or what ``fit_head`` refuses of half of the images.
    """
    labels = np.array(crops.labels)
    classes = [name for name in sorted(set(crops.labels)) if name != DEFECT_FREE]
    if len(set(crops.labels)) < 3:
        raise ConfigError(f"an unknown rule needs two known classes and a stranger; these crops have only {classes}")
    rows: list[tuple[Cell, ...]] = []
    problems: list[_Problem] = []
    for stranger in classes:
        of_class = [_problem(crops, fit, stranger, seed, crop_width) for seed in seeds]
        aurocs = Spread.of(one.auroc(unknown_scores.OURS) for one in of_class)
        rows.append((stranger, int((labels == stranger).sum()), aurocs))
        problems += of_class
    rows.append(("all", len(labels), Spread.of(one.auroc(unknown_scores.OURS) for one in problems)))
    called = [1 - one.scores[unknown_scores.OURS] <= significance + ROUNDING for one in problems]
    known, strange = (
        np.concatenate([of[one.is_known == kind] for of, one in zip(called, problems, strict=True)])
        for kind in (True, False)
    )
    note = (
        f"Each class left out in turn, seeds {list(seeds)}; heads fitted on half of the known crops' images. At a "
        f"stated rate of {significance:.0%}, known crops called unknown: {Rate.of(int(known.sum()), len(known))} "
        f"(crops are judged once per class and seed, so the interval is too narrow); strangers called unknown: "
        f"{Rate.of(int(strange.sum()), len(strange))}; the more the better."
    )
    return [Table("Unknown rule", UNKNOWN_COLUMNS, tuple(rows), note), _score_table(problems, significance)], {}


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """One class left out: scores of strangeness (m,) by name, and which of the m crops are of known classes."""

    scores: dict[str, NDArray[np.float64]]
    is_known: NDArray[np.bool_]

    def auroc(self, name: str) -> float:
        of = self.scores[name]
        return class_metrics.unknown_auroc(of[self.is_known], of[~self.is_known])

    def recognised(self, name: str, false_unknown: float) -> float:
        of = self.scores[name]
        return unknown_scores.recognised(of[self.is_known], of[~self.is_known], false_unknown)


def _problem(crops: Crops, fit: HeadFit, stranger: str, seed: int, crop_width: int | None) -> _Problem:
    labels = np.array(crops.labels)
    learnt = (labels != stranger) & _half_of_images(crops.image_idx, seed)
    head, judged = _fit(crops, learnt, fit), crops.features[~learnt]
    is_known = labels[~learnt] != stranger
    _check_finite(judged)
    classes = np.unique(labels[learnt], return_inverse=True)[1]
    scores = dict(unknown_scores.scores(head, crops.features[learnt], classes, judged))
    scores |= unknown_scores.together(scores, is_known)
    if crop_width is not None and crop_width < fit.frozen_width:
        of_crop = _fit(crops, learnt, replace(fit, frozen_width=crop_width))
        scores[f"{unknown_scores.OURS}, crop alone"] = 1 - _answers(of_crop, judged)[1].max(axis=1).astype(np.float64)
    return _Problem(scores, is_known)


def _score_table(problems: Sequence[_Problem], significance: float) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            Spread.of(one.recognised(name, significance) for one in problems),
            Spread.of(one.auroc(name) for one in problems),
        )
        for name in problems[0].scores
    ]
    rows.sort(key=lambda row: -row[1].mean if isinstance(row[1], Spread) else 0.0)
    note = (
        f"Each score's own threshold is the one that {significance:.0%} of the known crops of the problem exceed: all "
        f"are compared at the same rate of false unknowns. Spread over classes and seeds. Joined scores are means of "
        f"ranks."
    )
    columns = ("score", f"strangers recognised at {significance:.0%} false unknown", "AUROC")
    return Table("Strangers by score", columns, tuple(rows), note)


def _half_of_images(image_idx: NDArray[np.intp], seed: int) -> NDArray[np.bool_]:
    images = np.unique(image_idx)
    chosen = np.random.default_rng(seed).permutation(images)[: len(images) // 2]
    return np.isin(image_idx, chosen)
