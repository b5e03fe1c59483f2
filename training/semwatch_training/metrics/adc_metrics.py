"""Automatic defect classification as fabs judge it: accuracy, purity, contribution and escapes.

All count defects; "called" means decided by the machine, the rest goes to manual review. For a class c, with the golden
label as truth:

    accuracy      called c, of those that are c (undecided ones count against it: this is recall)
    purity        really c, of those called c (precision)
    contribution  decided as anything, of those that are c; over all classes the share of work taken over
    escape rate   called nuisance, of the defects of interest that are c

Over all: accuracy is right / all, purity is right / decided, contribution is decided / all. A share of nothing (the
purity of a class never called) is NaN.
Vendors' documents name these figures without formulas; the definitions are the customary ones (FIELD 1.3).
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semwatch.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdcFigures:
    """Counts of one class, or of all, and the shares that follow."""

    n_true: int
    n_decided: int
    """Of ``n_true``, decided as anything."""
    n_called: int
    """Called this class, whatever they are."""
    n_right: int
    n_escaped: int | None
    """Defects of interest called nuisance; None where the class is nuisance itself, or no nuisance was named."""

    @property
    def accuracy(self) -> float:
        """Right of what is true."""
        return _share(self.n_right, self.n_true)

    @property
    def purity(self) -> float:
        """Right of what was called."""
        return _share(self.n_right, self.n_called)

    @property
    def contribution(self) -> float:
        """Decided of what is true."""
        return _share(self.n_decided, self.n_true)

    @property
    def escape_rate(self) -> float:
        """Called nuisance of what is of interest."""
        return math.nan if self.n_escaped is None else _share(self.n_escaped, self.n_true)


@dataclass(frozen=True, slots=True)
class Adc:
    """The judgement of one set of verdicts."""

    by_class: dict[str, AdcFigures]
    """Every class that is true or was called, sorted."""
    total: AdcFigures
    """``n_escaped`` is None here: see ``escape_rate``, which is a share of the defects of interest only."""
    escape_rate: float
    """Defects of interest called nuisance, of all defects of interest."""
    nuisance_rate: float
    """Nuisance called a defect of interest, of all called so: what review is bothered with for nothing."""


@dataclass(frozen=True, slots=True)
class PurityCurve:
    """Purity against contribution, from the surest call down; a call is kept when confidence >= threshold."""

    thresholds: NDArray[np.float64]
    contribution: NDArray[np.float64]
    purity: NDArray[np.float64]


def adc_metrics(truth: Sequence[str], verdicts: Sequence[str | None], *, nuisance: Collection[str] = ()) -> Adc:
    """Judge verdicts against golden labels.

    Args:
        truth: golden label of each defect.
        verdicts: the machine's label of each; None: not decided (unknown or non-decidable), left to manual review.
        nuisance: labels that are no defects of interest, such as the defect-free class; escapes need them.

    Raises:
        ConfigError: empty, or of unequal length.
    """
    if len(truth) != len(verdicts) or not truth:
        raise ConfigError(f"need one label and one verdict per defect, not {len(truth)} and {len(verdicts)}")
    pairs = list(zip(truth, verdicts, strict=True))
    names = sorted({*truth, *(v for v in verdicts if v is not None)})
    of_interest = [(t, v) for t, v in pairs if t not in nuisance]
    called_so = [t for t, v in pairs if v is not None and v not in nuisance]
    n_decided = sum(v is not None for _, v in pairs)
    return Adc(
        by_class={name: _figures(name, pairs, nuisance) for name in names},
        total=AdcFigures(len(pairs), n_decided, n_decided, sum(t == v for t, v in pairs), None),
        escape_rate=_share(sum(v in nuisance for _, v in of_interest), len(of_interest)) if nuisance else math.nan,
        nuisance_rate=_share(sum(t in nuisance for t in called_so), len(called_so)) if nuisance else math.nan,
    )


def minority_accuracy(adc: Adc, *, share: float = 0.05) -> float:
    """Accuracy over the classes that make up less than ``share`` of the defects; NaN if there is none."""
    rare = [c for c in adc.by_class.values() if 0 < c.n_true < share * adc.total.n_true]
    return _share(sum(c.n_right for c in rare), sum(c.n_true for c in rare))


def purity_contribution_curve(right: NDArray[np.bool_], confidence: NDArray[np.floating]) -> PurityCurve:
    """Trade purity against contribution over all thresholds of confidence.

    Args:
        right: (n,) whether each call is right.
        confidence: (n,) of the calls; equal ones are kept or dropped together.

    Raises:
        ConfigError: empty, of unequal length, or a confidence is not finite.
    """
    right, sure = np.asarray(right), np.asarray(confidence, dtype=np.float64)
    if right.ndim != 1 or right.shape != sure.shape or not right.size or right.dtype != bool:
        raise ConfigError(
            f"need one bool and one confidence per call, not {right.dtype} {right.shape} and {sure.shape}"
        )
    if not np.isfinite(sure).all():
        raise ConfigError(f"{int((~np.isfinite(sure)).sum())} of {len(sure)} confidences are not finite")
    order = np.argsort(-sure, kind="stable")
    sure, n_right = sure[order], np.cumsum(right[order])
    last = np.flatnonzero(np.append(np.diff(sure) != 0, True))
    return PurityCurve(sure[last], (last + 1) / len(right), n_right[last] / (last + 1))


def purity_contribution_curves(
    truth: Sequence[str], predicted: Sequence[str], confidence: NDArray[np.floating]
) -> dict[str, PurityCurve]:
    """`purity_contribution_curve` of each called class, sorted; contribution is the share of the class's calls kept.

    For all classes under one threshold call `purity_contribution_curve(truth == predicted, confidence)`.

    Raises:
        ConfigError: as `purity_contribution_curve`.
    """
    labels, calls, sure = np.asarray(truth), np.asarray(predicted), np.asarray(confidence)
    if not labels.shape == calls.shape == sure.shape or not labels.size:
        raise ConfigError(f"need label, call and confidence per defect, not {len(labels)}, {len(calls)}, {len(sure)}")
    return {
        str(name): purity_contribution_curve(labels[calls == name] == name, sure[calls == name])
        for name in np.unique(calls)
    }


def _figures(name: str, pairs: list[tuple[str, str | None]], nuisance: Collection[str]) -> AdcFigures:
    mine = [v for t, v in pairs if t == name]
    return AdcFigures(
        n_true=len(mine),
        n_decided=sum(v is not None for v in mine),
        n_called=sum(v == name for _, v in pairs),
        n_right=sum(v == name for v in mine),
        n_escaped=sum(v in nuisance for v in mine) if nuisance and name not in nuisance else None,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
